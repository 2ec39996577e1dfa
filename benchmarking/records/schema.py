"""The published JSON Schemas of the result files, a file a kind of object, made from the structs.

They are written anew by `python3 -c 'from benchmarking.records.schema import publish; publish()'`.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import msgspec

from benchmarking.records import types

SCHEMAS = Path(__file__).resolve().parent / "schemas"
PUBLISHED = {
    "manifest": types.Manifest,
    "client": types.ClientRecord,
    "co_run": types.CoRunRecord,
    "sample": types.Sample,
    "phase": types.PhaseRecord,
    "refusal": types.Refusal,
}


def schema_texts() -> dict[Path, str]:
    """Return the text of each schema file."""
    return {SCHEMAS / f"{kind}.schema.json": _text(struct) for kind, struct in PUBLISHED.items()}


def _text(struct: type) -> str:
    """Return the schema of a struct, whatever holds nothing else on one line."""
    draft = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    text = json.dumps(draft | without_indentation(msgspec.json.schema(struct)), indent=2)
    return re.sub(r"[\[{]\s[^\[\]{}]*[\]}]", lambda found: " ".join(found[0].split()), text) + "\n"


def without_indentation(schema: Any) -> Any:
    """Return a schema whose descriptions are docstrings as Python 3.13 and newer keep them."""
    if isinstance(schema, dict):
        return {name: without_indentation(part) for name, part in schema.items()}
    return inspect.cleandoc(schema) if isinstance(schema, str) else schema


def publish() -> None:
    """Write the schema files anew."""
    for path, text in schema_texts().items():
        path.write_text(text, encoding="utf-8")
