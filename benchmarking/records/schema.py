"""The published JSON Schemas of the result files, the check against them, and older versions.

The schemas (draft 7) lie in `schemas/`, a file a kind of object. They name what readers rely on;
further fields are allowed. What an older program wrote is brought to the present version first.

Schema history:
    1  first version.
    2  manifests list `resumptions`; records have `start_skew_ms` and `busiest_thread_cpu_fraction`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

SCHEMA_VERSION = 2
SCHEMAS = Path(__file__).resolve().parent / "schemas"

MANIFEST, CLIENT, CO_RUN, SAMPLE = "manifest", "client", "co_run", "sample"
PHASE, REFUSAL = "phase", "refusal"  # lines of files beside the runs

# What a version brought, with what stands for it in a file of an earlier one.
_ADDED: Mapping[int, Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        2: {
            MANIFEST: {"resumptions": []},
            CLIENT: {"busiest_thread_cpu_fraction": None, "window_host_cpu_fraction": None},
            CO_RUN: {"start_skew_ms": None},
        }
    }
)


class UnknownVersionError(Exception):
    """An object is of a schema version that this program does not know."""


def upgraded(kind: str, value: dict[str, Any], version: object) -> dict[str, Any]:
    """Return an object of a file of schema `version` as the present version has it.

    Raises:
        UnknownVersionError: `version` is none of the past or present ones.
    """
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise UnknownVersionError(
            f"has schema version {version}, this program reads 1 to {SCHEMA_VERSION}"
        )
    for later in range(version + 1, SCHEMA_VERSION + 1):
        value = {**_ADDED[later].get(kind, {}), **value}
    return {**value, "schema_version": SCHEMA_VERSION} if kind == MANIFEST else value


def problem(kind: str, value: object) -> str | None:
    """Return what is wrong with an object of the present version; None when it is as published."""
    # Imported when a run is read: `--help` should not wait for it.
    from fastjsonschema import JsonSchemaValueException

    try:
        _validator(kind)(value)
    except JsonSchemaValueException as error:
        return error.message
    return None


@functools.cache
def _validator(kind: str) -> Callable[[object], object]:
    """Compile the schema of a kind of object into a function."""
    import fastjsonschema

    text = (SCHEMAS / f"{kind}.schema.json").read_text(encoding="utf-8")
    return fastjsonschema.compile(json.loads(text))
