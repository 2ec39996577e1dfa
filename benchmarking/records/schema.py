"""The published JSON Schemas of the result files, a file a kind of object, made from the structs.

They are written anew by `python3 -c 'from benchmarking.records.schema import publish; publish()'`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

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
    text = json.dumps(draft | msgspec.json.schema(struct), indent=2)
    return re.sub(r"[\[{]\s[^\[\]{}]*[\]}]", lambda found: " ".join(found[0].split()), text) + "\n"


def publish() -> None:
    """Write the schema files anew."""
    for path, text in schema_texts().items():
        path.write_text(text, encoding="utf-8")
