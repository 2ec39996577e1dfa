"""Plan files: a user's own list of clients, in TOML, checked as a whole before anything runs.

    name = "my-jobs"                      # optional; default: the file's name

    [[client]]
    workload = "resnet_training"          # one of ours
    arguments = ["--batch-size", "64"]    # come after those of the job size, and so override them
    count = 2

    [[client]]
    workload = "serving"                  # an inference server and its users, together one client
    arguments = ["--rate", "300", "--slo-ms", "50"]    # no --rate: half of what it bears alone

    [[client]]
    command = ["./train.sh", "--fast"]    # or any command line; "a text" is split, not given to a
    shell = false                         # shell unless this says so
    label = "my training"
    working_directory = ".."              # from the plan file's folder, which is the default
    environment = { DATA = "/data" }
    latency = false                       # true: a run's duration is a response time
    knobs = { mps_percentage = 50, mps_memory_limit = "8G", mps_priority = "below-normal" }

`read_plan_file` finds every mistake at once; each is a sentence that names file, key and fix.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarking.suite import mps_knobs
from benchmarking.suite.plan import (
    COMMAND_SCRIPT,
    COMMAND_WORKLOAD,
    WORKLOADS,
    JobOptions,
    PlannedClient,
    planned_client,
)

FILE_KEYS = ("name", "client")
SHARED_KEYS = ("workload", "command", "count", "label", "environment", "knobs")
WORKLOAD_KEYS = ("arguments",)
COMMAND_KEYS = ("shell", "working_directory", "latency")
# Limits of one client under MPS; the other modes have none.
KNOBS = {
    "mps_percentage": mps_knobs.percentage,
    "mps_memory_limit": mps_knobs.memory_limit,
    "mps_priority": mps_knobs.priority,
}
# Flags that the suite itself gives to each client.
FLAGS_OF_THE_SUITE = ("--device", "--gpu", "--events", "--hold", "--resolve", "--results-dir")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class PlanFileError(Exception):
    """A plan file cannot be used; `mistakes` holds one sentence for each thing to mend."""

    def __init__(self, mistakes: list[str]) -> None:
        """Keep the sentences; the message is all of them, a line each."""
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


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
    knobs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PlanFile:
    """A plan file that has been read and found good; `text` is the file as it was."""

    path: Path
    text: str
    name: str
    entries: tuple[PlanEntry, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for the manifest."""
        return {
            "path": str(self.path),
            "name": self.name,
            "clients": [dataclasses.asdict(entry) for entry in self.entries],
        }

    @property
    def has_latency(self) -> bool:
        """Whether durations of some client are response times."""
        return any(
            WORKLOADS[entry.workload].has_latency if entry.workload else entry.latency
            for entry in self.entries
        )

    @property
    def members(self) -> tuple[PlanEntry, ...]:
        """One entry for each client: every entry as often as its `count` says."""
        return tuple(entry for entry in self.entries for _ in range(entry.count))


def read_plan_file(path: Path) -> PlanFile:
    """Read and check a plan file; nothing that it names is run.

    Raises `PlanFileError` with all mistakes.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except OSError as error:
        raise PlanFileError([f"{path} cannot be read ({error.strerror}): name a file"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanFileError([f"{path} is not TOML ({error}): mend that place"]) from error
    mistakes: list[str] = []
    known = _Table(content, str(path), mistakes)
    known.allow(FILE_KEYS)
    default_name = re.sub(r"[^A-Za-z0-9._-]", "-", path.stem).lstrip(".-_") or "plan"
    name = known.get("name", str, default_name, "a text")
    if not _NAME.fullmatch(name):
        known.complain("name", "use letters, digits, '.', '_' and '-', as it names a folder")
    tables = content.get("client")
    is_list = isinstance(tables, list) and all(isinstance(table, dict) for table in tables)
    if not tables or not is_list:
        known.complain("client", "list at least one client under the heading [[client]]")
        tables = []
    entries = [
        _entry(_Table(table, f"{path}: client {number}", mistakes), path.resolve().parent)
        for number, table in enumerate(tables, start=1)
    ]
    if mistakes:
        raise PlanFileError(mistakes)
    return PlanFile(path.resolve(), text, name, tuple(entries))


class _Table:
    """One table of the file, and the mistakes found in it so far."""

    def __init__(self, content: Mapping[str, Any], where: str, mistakes: list[str]) -> None:
        self.content = content
        self._where = where
        self._mistakes = mistakes

    def complain(self, key: str, fix: str) -> None:
        self._mistakes.append(f"{self._where}: {key}: {fix}")

    def allow(self, keys: Collection[str]) -> None:
        for key in self.content:
            if key not in keys:
                self.complain(key, f"there is no such key here; there are {', '.join(keys)}")

    def get(self, key: str, kind: type, default: Any, wanted: str) -> Any:
        """Value of a key, or the default where it is missing or of another type."""
        value = self.content.get(key, default)
        # To Python a bool is a whole number, to whoever writes a plan it is not.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.complain(key, f"is {value!r}, but needs {wanted}")
            return default
        return value

    def words(self, key: str) -> tuple[str, ...]:
        """A list of texts."""
        value = self.get(key, list, [], 'a list of texts, as ["--epochs", "3"]')
        if not all(isinstance(word, str) for word in value):
            self.complain(key, 'holds something else than texts: put each in quotes, as "3"')
            return ()
        return tuple(value)


def _entry(table: _Table, folder: Path) -> PlanEntry:
    has_workload, has_command = "workload" in table.content, "command" in table.content
    if has_workload == has_command:
        found = "gives both" if has_workload else "gives neither"
        table.complain("workload, command", f"{found}: give one of the two")
    table.allow((
        *SHARED_KEYS,
        *(WORKLOAD_KEYS if has_workload or not has_command else ()),
        *(COMMAND_KEYS if has_command or not has_workload else ()),
    ))  # fmt: skip
    count = table.get("count", int, 1, "a whole number of 1 or more")
    if count < 1:
        table.complain("count", f"is {count}, but needs a whole number of 1 or more")
    label = table.get("label", str, "", "a text")
    special = _command_fields(table, folder) if has_command else _workload_fields(table)
    return PlanEntry(
        **{**special, "label": label or special["label"]},
        count=count,
        environment=_environment(table),
        knobs=_knobs(table),
    )


def _workload_fields(table: _Table) -> dict[str, Any]:
    known = ", ".join(WORKLOADS)
    workload = table.get("workload", str, "", f"one of {known}")
    if workload and workload not in WORKLOADS:
        table.complain("workload", f"there is no workload {workload!r}; there are {known}")
    arguments = table.words("arguments")
    for word in arguments:
        flag = word.partition("=")[0]
        if flag in FLAGS_OF_THE_SUITE:
            table.complain("arguments", f"leave {flag} away, the suite gives it to every client")
    kind = WORKLOADS.get(workload)
    return {"workload": workload, "arguments": arguments, "label": kind.label if kind else workload}


def _command_fields(table: _Table, folder: Path) -> dict[str, Any]:
    directory = folder / table.get("working_directory", str, "", "a text")
    if not directory.is_dir():
        table.complain("working_directory", f"there is no folder {directory}: name one")
    shell = table.get("shell", bool, False, "true or false")
    line = _command_line(table, shell)
    words = _split(table, line)
    if words and not shell and not _can_run(words[0], directory):
        table.complain(
            "command", f"there is no program {words[0]!r} that can be run in {directory}: mend the "
            "name, make the file executable, or set shell = true for a shell's own words",
        )  # fmt: skip
    return {
        "command": line,
        "shell": shell,
        "working_directory": str(directory.resolve()),
        "latency": table.get("latency", bool, False, "true or false"),
        "label": Path(words[0]).name if words else "command",
    }


def _command_line(table: _Table, shell: bool) -> str:
    """The command as one line: what a list of words becomes, too."""
    if isinstance(table.content["command"], list):
        if shell:
            table.complain("command", "with shell = true give one text, not a list")
        return shlex.join(table.words("command"))
    return table.get("command", str, "", 'a text or a list of texts, as ["./train.sh", "--fast"]')


def _split(table: _Table, line: str) -> list[str]:
    try:
        words = shlex.split(line)
    except ValueError as error:
        table.complain("command", f"cannot be split into words ({error}): close the quotes")
        return []
    if not words and table.content["command"] in ("", []):
        table.complain("command", "is empty: give a program and its arguments")
    return words


def _can_run(program: str, directory: Path) -> bool:
    """Whether a program is there: a path from the working directory, a name on the PATH."""
    path = str(directory / program) if os.sep in program else program
    return shutil.which(path) is not None


def _environment(table: _Table) -> dict[str, str]:
    found: Mapping[str, Any] = table.get(
        "environment", dict, {}, 'a table of texts, as { DATA = "/data" }'
    )
    for name, value in found.items():
        wrong = _wrong_variable(name, value)
        if wrong:
            table.complain(f"environment.{name}", wrong)
    return dict(found)


def _knobs(table: _Table) -> dict[str, str]:
    given = table.get("knobs", dict, {}, "a table, as { mps_percentage = 50 }")
    found: dict[str, str] = {}
    for name, value in given.items():
        if name not in KNOBS:
            table.complain(f"knobs.{name}", f"there is no such knob; there are {', '.join(KNOBS)}")
            continue
        try:
            found[name] = KNOBS[name](str(value))
        except ValueError as error:
            table.complain(f"knobs.{name}", str(error))
    return found


def _wrong_variable(name: str, value: Any) -> str | None:
    if not _VARIABLE.fullmatch(name):
        return "is no name of a variable: use letters, digits and '_'"
    if name == "CUDA_VISIBLE_DEVICES" or name.startswith("CUDA_MPS_"):
        return "belongs to the sharing mode: leave it away, the suite sets it"
    return None if isinstance(value, str) else 'needs a text: put it in quotes, as "1"'


def plan_clients(
    plan: PlanFile, count: int, options: JobOptions, *, python: str, root: str
) -> tuple[PlannedClient, ...]:
    """Return `count` clients of a plan file: its clients in order, starting over after the last.

    `root` is the project's folder.
    """
    members = plan.members
    return tuple(
        _planned(i, members[i % len(members)], options, python=python, root=root)
        for i in range(count)
    )


def _planned(
    client: int, entry: PlanEntry, options: JobOptions, *, python: str, root: str
) -> PlannedClient:
    if entry.workload is not None:
        made = planned_client(
            client, entry.workload, options, python=python, root=root, arguments=entry.arguments
        )
    else:
        made = _command_client(client, entry, python=python, root=root)
    # What is in the environment can be part of the work.
    variables = [f"{name}={value}" for name, value in entry.environment.items()]
    key = f"{made.job_key} {shlex.join(variables)}" if variables else made.job_key
    limits = {name.removeprefix("mps_"): value for name, value in entry.knobs.items()}
    environment = {**entry.environment, **mps_knobs.variables(**limits)}
    return dataclasses.replace(made, label=entry.label, job_key=key, environment=environment)


def _command_client(client: int, entry: PlanEntry, *, python: str, root: str) -> PlannedClient:
    job = ["--command", str(entry.command), "--working-directory", entry.working_directory]
    job += ["--shell"] if entry.shell else []
    job += ["--latency"] if entry.latency else []
    return PlannedClient(
        client=client,
        workload=COMMAND_WORKLOAD,
        label=entry.label,
        job_key=shlex.join([COMMAND_WORKLOAD, *job]),
        command=(python, f"{root}/{COMMAND_SCRIPT}", *job),
    )
