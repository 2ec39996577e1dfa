"""The published JSON Schemas of the result files, a file a kind of object, made from the structs.

`python3 -m benchmarking.records.schema` writes them anew.
"""

from __future__ import annotations

import json
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
    draft = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {
        SCHEMAS / f"{kind}.schema.json": json.dumps(draft | msgspec.json.schema(struct), indent=2)
        + "\n"
        for kind, struct in PUBLISHED.items()
    }


if __name__ == "__main__":
    for path, text in schema_texts().items():
        path.write_text(text, encoding="utf-8")
