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

import pytest
from conftest import PROJECT_ROOT

from workloads.common import cli
from workloads.common.errors import EXIT_USAGE


def runner_of(script: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs the script with arguments, variables and a working folder."""

    def run_script(
        *arguments: str, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            (sys.executable, str(PROJECT_ROOT / script), *arguments),
            capture_output=True, text=True, check=False, cwd=cwd,
            env={**os.environ, **environment},
        )  # fmt: skip

    return run_script


class Here:
    """Workloads run in this process, for what needs no other: torch is imported once for all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def run(
        self, what: str | Callable[[], int], *arguments: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a script, or a `main` of one, to its end."""
        name = what if isinstance(what, str) else "workload.py"
        self._monkeypatch.setattr(sys, "argv", [name, *arguments])
        self._capsys.readouterr()
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as ended:
                if isinstance(what, str):
                    runpy.run_path(str(PROJECT_ROOT / what), run_name="__main__")
                else:
                    cli.run_main(what)
        finally:
            signal.signal(signal.SIGTERM, before)
        said = self._capsys.readouterr()
        return subprocess.CompletedProcess(arguments, ended.value.code, said.out, said.err)


def result_reader(script: str) -> Callable[[Path], dict]:
    """Return a function that reads the only result of the script in a folder."""

    def only_result(folder: Path) -> dict:
        (path,) = folder.glob(f"{Path(script).stem}_*.json")
        return json.loads(path.read_text())

    return only_result


def assert_refused(
    done: subprocess.CompletedProcess[str], fix: str, code: int = EXIT_USAGE
) -> None:
    """The script ended with its exit code and one sentence, which names the fix."""
    assert done.returncode == code, done.stderr
    *before, sentence = done.stderr.strip().splitlines()
    assert fix in sentence
    # A busy machine may take so long that a sign of life comes first ("loading: 15 s").
    assert [line for line in before if not re.fullmatch(r".+: \d+ s", line)] == []
