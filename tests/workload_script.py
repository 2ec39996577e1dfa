"""A workload run by hand, in a process of its own or in this one, and the one result it leaves."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT_ROOT

from workloads.common import cli, client
from workloads.common.errors import EXIT_USAGE


def run_script(
    script: str, *arguments: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the script to its end in a process of its own."""
    return subprocess.run(
        (sys.executable, str(PROJECT_ROOT / script), *map(str, arguments)),
        capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, **environment},
    )  # fmt: skip


class Here:
    """Workloads run in this process, for what needs no other: torch is imported once for all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def run(
        self, what: str | Callable[[], int], *arguments: object
    ) -> subprocess.CompletedProcess[str]:
        """Run a script, or a `main` of one, to its end."""
        name = what if isinstance(what, str) else "workload.py"
        self._monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        self._capsys.readouterr()
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        try:
            with pytest.raises(SystemExit) as ended:
                if isinstance(what, str):
                    runpy.run_path(str(PROJECT_ROOT / what), run_name="__main__")
                else:
                    cli.run_main(what)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        said = self._capsys.readouterr()
        return subprocess.CompletedProcess(arguments, ended.value.code, said.out, said.err)


def loaded(
    monkeypatch: pytest.MonkeyPatch, kind: type[client.Workload], parse: Callable, *flags: object
) -> Any:
    """A workload with these flags, loaded and not warm yet."""
    monkeypatch.setattr(sys, "argv", ["workload.py", *map(str, flags)])
    workload = kind(parse())
    workload.load()
    return workload


def only_result(script: str, folder: Path) -> dict:
    """Return the only result of the script in a folder."""
    (path,) = folder.glob(f"{Path(script).stem}_*.json")
    return json.loads(path.read_text())


def assert_refused(
    done: subprocess.CompletedProcess[str], fix: str, code: int = EXIT_USAGE
) -> None:
    """The script ended with its exit code and one sentence, which names the fix."""
    assert done.returncode == code, done.stderr
    *before, sentence = done.stderr.strip().splitlines()
    assert fix in sentence
    # A busy machine may take so long that a sign of life comes first ("loading: 15 s").
    assert [line for line in before if not re.fullmatch(r".+: \d+ s", line)] == []
