"""The load test as a program against the null server, for tests that look at both from outside."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import requests

PROJECT_ROOT = Path(__file__).resolve().parents[1]
SCRIPT = PROJECT_ROOT / "workloads" / "inference" / "load_test.py"
NULL_SERVER = PROJECT_ROOT / "tests" / "tools" / "null_server.py"


@contextmanager
def null_server(*arguments: str) -> Iterator[SimpleNamespace]:
    """A null server that answers as its arguments say; `counts` tells what came.

    That is by path and content type, JPEGs among it, and connections that posted.
    """
    command = (sys.executable, str(NULL_SERVER), *arguments)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        try:
            yield SimpleNamespace(
                url=url, counts=lambda: requests.get(f"{url}/counts", timeout=10).json()
            )
        finally:
            process.kill()


def load_test(
    folder: Path, url: str, *arguments: str, **how: object
) -> subprocess.CompletedProcess:
    return subprocess.run(
        (sys.executable, str(SCRIPT), "--server", url, "--results-dir", str(folder), *arguments),
        capture_output=True, text=True, check=False, timeout=120, **how,
    )  # fmt: skip


def only_result(folder: Path) -> dict:
    (path,) = folder.glob("load_test_*.json")
    return json.loads(path.read_text())
