"""One `[[client]]` table of a plan: what it may hold, and what is wrong with it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarking.cli import MOST_COUNTED
from benchmarking.planning import limits
from benchmarking.planning.redaction import hidden_in_command_line
from benchmarking.planning.workloads import WORKLOADS

# What each key holds: its type, what it is where it is left out, and how a complaint names it.
KEYS: Mapping[str, tuple[type, Any, str]] = {
    "name": (str, "", "a text"),
    "workload": (str, "", f"one of {', '.join(WORKLOADS)}"),
    "arguments": (list, [], 'a list of texts, as ["--epochs", "3"]'),
    "command": (str, "", 'a text or a list of texts, as ["./train.sh", "--fast"]'),
    "shell": (bool, False, "true or false"),
    "working_directory": (str, "", "a text"),
    "latency": (bool, False, "true or false"),
    "count": (int, 1, "a whole number of 1 or more"),
    "label": (str, "", "a text"),
    "environment": (dict, {}, 'a table of texts, as { DATA = "/data" }'),
    "inherit": (list, [], 'a list of texts, as ["HF_TOKEN"]'),
    "knobs": (dict, {}, "a table, as { mps_percentage = 50 }"),
}
SHARED_KEYS = ("workload", "command", "count", "label", "environment", "inherit", "knobs")
WORKLOAD_KEYS = ("arguments",)
COMMAND_KEYS = ("shell", "working_directory", "latency")
# Limits of one client under MPS; the other modes have none.
KNOBS = {
    "mps_percentage": limits.percentage,
    "mps_memory_limit": limits.memory_limit,
    "mps_priority": limits.priority,
}
HOLDS_NUL = "holds a NUL, which no program can be given: leave it out"
# Flags that the suite itself gives to each client.
FLAGS_OF_THE_SUITE = ("--device", "--gpu", "--events", "--hold", "--resolve", "--results-dir")
# Programs whose first word without a dash is a file, where it ends like one.
INTERPRETERS = re.compile(r"python[0-9.]*|bash|sh|node|perl|Rscript|julia")
SCRIPT_SUFFIXES = (".py", ".sh", ".js", ".pl", ".R", ".jl")

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_QUOTED = re.compile(r"""'[^']*'|"(?:\\.|[^"\\])*"|\\.""", re.DOTALL)
# Given to a program as a word, it would be passed over: `prepare.py && train.py` prepares alone.
_SHELL_OPERATOR = re.compile(r"(?<!\S)(?:[|;&<>]+(?!\S)|(?:\d?&?>|<)\S*)|;(?!\S)")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class PlanEntry:
    """One `[[client]]` table: a workload of ours with `arguments`, or a `command` line."""

    label: str
    count: int
    workload: str | None = None
    arguments: tuple[str, ...] = ()
    command: str | None = None
    shell: bool = False
    working_directory: str = ""
    latency: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    inherit: tuple[str, ...] = ()
    knobs: Mapping[str, str] = field(default_factory=dict)


class Table:
    """One table of a plan file, and the mistakes found in the file so far."""

    def __init__(self, content: Mapping[str, Any], where: str, mistakes: list[str]) -> None:
        self.content = content
        self._where = where
        self._mistakes = mistakes

    def complain(self, key: str, fix: str) -> None:
        """Add a mistake: a sentence that names file, key and fix."""
        self._mistakes.append(f"{self._where}: {key}: {fix}")

    def allow(self, keys: Collection[str]) -> None:
        """Complain of every other key."""
        for key in self.content:
            if key not in keys:
                self.complain(key, f"there is no such key here; there are {', '.join(keys)}")

    def get(self, key: str) -> Any:
        """Value of a key, its default where it is missing or of another type."""
        kind, default, wanted = KEYS[key]
        value = self.content.get(key, default)
        # To Python a bool is a whole number, to whoever writes a plan it is not.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.complain(key, f"is {_shown(value)}, but needs {wanted}")
            return default
        if isinstance(value, str) and "\0" in value:
            self.complain(key, HOLDS_NUL)
        return self.words(key) if kind is list else value

    def words(self, key: str) -> tuple[str, ...]:
        """A list of texts."""
        value = self.content.get(key, [])
        if not all(isinstance(word, str) for word in value):
            self.complain(key, 'holds something else than texts: put each in quotes, as "3"')
            return ()
        if any("\0" in word for word in value):
            self.complain(key, HOLDS_NUL)
        return tuple(value)


def read_entry(table: Table, folder: Path) -> PlanEntry:
    """Return the client of a table, whose relative folders start at `folder`."""
    has_workload, has_command = "workload" in table.content, "command" in table.content
    if has_workload == has_command:
        found = "gives both" if has_workload else "gives neither"
        table.complain("workload, command", f"{found}: give one of the two")
    table.allow((
        *SHARED_KEYS,
        *(WORKLOAD_KEYS if has_workload or not has_command else ()),
        *(COMMAND_KEYS if has_command or not has_workload else ()),
    ))  # fmt: skip
    count = table.get("count")
    if not 1 <= count <= MOST_COUNTED:
        table.complain("count", f"is {count}, but needs {KEYS['count'][2]}, {MOST_COUNTED} at most")
    environment = _environment(table)
    special = (
        _command_fields(table, folder, environment) if has_command else _workload_fields(table)
    )
    special["label"] = table.get("label") or special["label"]
    if _CONTROLS.search(special["label"]):
        table.complain("label", "leave line breaks and control characters out")
    return PlanEntry(
        **special,
        count=count,
        environment=environment,
        inherit=table.words("inherit"),
        knobs=_knobs(table),
    )


def _workload_fields(table: Table) -> dict[str, Any]:
    workload = table.get("workload")
    if workload and workload not in WORKLOADS:
        known = ", ".join(WORKLOADS)
        table.complain("workload", f"there is no workload {workload!r}; there are {known}")
    arguments = table.get("arguments")
    for flag in (word.partition("=")[0] for word in arguments):
        if flag in FLAGS_OF_THE_SUITE:
            table.complain("arguments", f"leave {flag} out, the suite gives it to every client")
    kind = WORKLOADS.get(workload)
    return {"workload": workload, "arguments": arguments, "label": kind.label if kind else workload}


def _command_fields(table: Table, folder: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    directory = folder / table.get("working_directory")
    if not os.path.isdir(directory):
        table.complain("working_directory", f"there is no folder {directory}: name one")
    shell = table.get("shell")
    is_list = isinstance(table.content["command"], list)
    if is_list and shell:
        table.complain("command", "with shell = true give one text, not a list")
    line = shlex.join(table.words("command")) if is_list else table.get("command")
    words = _split(table, line, is_for_shell=shell)
    if words and not shell:
        _check_files(table, words, directory, str((os.environ | environment).get("PATH", "")))
    return {
        "command": line,
        "shell": shell,
        "working_directory": str(directory.resolve()),
        "latency": table.get("latency"),
        "label": Path(script_of(words) or words[0]).name if words else "command",
    }


def _split(table: Table, line: str, *, is_for_shell: bool) -> list[str]:
    try:
        words = shlex.split(line)
    except ValueError as error:
        if is_for_shell:  # what a shell takes, only a shell can say
            return line.split()
        table.complain("command", f"cannot be split into words ({error}): close the quotes")
        return []
    found = None if is_for_shell else _SHELL_OPERATOR.search(_QUOTED.sub("_", line))
    if found:
        table.complain("command", f"{found[0]} is read by a shell alone: give the line to sh -c, "
                       "or put quotes around what is meant as it stands")  # fmt: skip
        return []
    if not words and table.content["command"] in (line, []):
        table.complain("command", "is empty: give a program and its arguments")
    return words


def _check_files(table: Table, words: Sequence[str], directory: Path, path: str) -> None:
    """Whether the program is there, a path from the working directory or a name on PATH.

    Of an interpreter's script, too.
    """
    program = str(directory / words[0]) if os.sep in words[0] else words[0]
    script = script_of(words)
    if shutil.which(program, path=path) is None:
        table.complain(
            "command", f"there is no program {_shown(words[0])} that can be run in {directory}: "
            "mend the name, make the file executable, or give a shell's own words to sh -c",
        )  # fmt: skip
    elif script is not None and not os.path.exists(directory / script):
        table.complain("command", f"there is no file {script!r} in {directory}: mend the name")


def script_of(words: Sequence[str]) -> str | None:
    """The file that an interpreter is given, `None` where there is none to be told."""
    if not INTERPRETERS.fullmatch(Path(words[0]).name):
        return None
    for word in words[1:]:
        if word in ("-m", "-c", "-e"):
            return None
        if not word.startswith("-"):
            return word if Path(word).suffix in SCRIPT_SUFFIXES else None
    return None


def _shown(value: Any) -> str:
    """What a plan holds, for a complaint: it is recorded, so secrets in it are hidden."""
    return repr(hidden_in_command_line([value])[0] if isinstance(value, str) else value)


def _environment(table: Table) -> dict[str, str]:
    """The client's variables, inherited ones among them."""
    found = dict(table.get("environment"))
    for name, value in found.items():
        wrong = _wrong_variable(name)
        if wrong is None and not isinstance(value, str):
            wrong = 'needs a text: put it in quotes, as "1"'
        if wrong is None and "\0" in value:
            wrong = HOLDS_NUL
        if wrong:
            table.complain(f"environment.{name}", wrong)
    for name in table.get("inherit"):
        wrong = _wrong_variable(name)
        if wrong is None and name not in os.environ:
            wrong = "is not set where this was started: export it, or leave it out"
        if wrong:
            table.complain(f"inherit.{name}", wrong)
        found[name] = os.environ.get(name, "")
    return found


def _wrong_variable(name: str) -> str | None:
    if not _VARIABLE.fullmatch(name):
        return "is no name of a variable: use letters, digits and '_'"
    if name == "CUDA_VISIBLE_DEVICES" or name.startswith("CUDA_MPS_"):
        return "belongs to the sharing mode: leave it out, the suite sets it"
    return None


def _knobs(table: Table) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in table.get("knobs").items():
        if name not in KNOBS:
            table.complain(f"knobs.{name}", f"there is no such knob; there are {', '.join(KNOBS)}")
            continue
        try:
            found[name] = KNOBS[name](str(value))
        except ValueError as error:
            table.complain(f"knobs.{name}", str(error))
    return found
