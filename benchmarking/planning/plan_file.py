"""Plan files: a user's own list of clients, in TOML, checked as a whole before anything runs.

    name = "my-jobs"                      # optional; default: the file's name

    [[client]]
    workload = "resnet_training"          # one of ours
    arguments = ["--batch-size", "64"]    # come after those of the job size, and so override them
    count = 2

    [[client]]
    workload = "serving"                  # an inference server and its users, together one client
    arguments = ["--rate", "300", "--slo-ms", "50"]    # no --rate: half of what it delivers alone

    [[client]]
    command = ["./train.sh", "--fast"]    # or any command line; "a text" is split, not given to a
    shell = false                         # shell unless this says so
    label = "my training"
    working_directory = ".."              # from the plan file's folder, which is the default
    environment = { DATA = "/data" }
    inherit = ["HF_TOKEN"]                # variables of whoever starts the run; names are recorded
    latency = false                       # true: a run's duration is a response time
    knobs = { mps_percentage = 50, mps_memory_limit = "8G", mps_priority = "below-normal" }

`read_plan_file` finds every mistake at once; each is a sentence that names file, key and fix. The
command line's `--job` makes the same list without a file (job_lines.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarking.cli import SuiteError
from benchmarking.planning.plan_entries import PlanEntry, Table, read_entry
from benchmarking.planning.redaction import (
    NotRevealedError,
    Secrets,
    reveal,
    secrets_of_line,
    secrets_of_words,
    unsalted,
)
from benchmarking.planning.workloads import WORKLOADS

PERCENTAGE_IS_IGNORED = "on a partition of its own a client's percentage is ignored"
MOST_CHARACTERS = 1 << 20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class PlanFileError(SuiteError):
    """A plan file cannot be used; `mistakes` holds one sentence for each thing to mend."""

    def __init__(self, mistakes: list[str]) -> None:
        """Keep the sentences; the message is all of them, a line each."""
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


@dataclass(frozen=True)
class PlanFile:
    """A plan that has been read and found good.

    `path` is the file, or what stands for one in messages; relative folders start at `folder`.
    `text` is the file as it was but for secrets, which it names only.
    """

    path: str
    folder: Path
    text: str
    name: str
    entries: tuple[PlanEntry, ...]
    secrets: Secrets = field(default_factory=Secrets, compare=False)

    def require_no_percentage(self) -> None:
        """Raise `PlanFileError` where a client would have a percentage on a static partition."""
        if any("mps_percentage" in entry.knobs for entry in self.entries):
            said = f"{PERCENTAGE_IS_IGNORED}: leave mps_percentage out of the plan"
            raise PlanFileError([f"--mps-partitions: {said}"])

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for the manifest; the clients stand in the run's `plan.toml` alone."""
        return {
            "path": self.path,
            "folder": str(self.folder),
            "name": self.name,
            "sha256": text_hash(self.text),
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


def say_the_same(text: str, other: str) -> bool:
    """Whether two kept texts of plans, of which each is TOML, differ in nothing but comments."""
    return _toml(unsalted(text)) == _toml(unsalted(other))


def text_hash(text: str) -> str:
    """Return the SHA-256 of a plan file's text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_plan_file(path: Path) -> PlanFile:
    """Read and check a plan file; nothing that it names is run.

    Raises `PlanFileError` with all mistakes.
    """
    try:
        with path.open(encoding="utf-8-sig") as stream:
            text = stream.read(MOST_CHARACTERS + 1)
    except OSError as error:
        raise PlanFileError([f"{path} cannot be read ({error.strerror}): name a file"]) from error
    except UnicodeDecodeError as error:
        raise PlanFileError([f"{path} is not TOML ({error}): mend that place"]) from error
    if len(text) > MOST_CHARACTERS:
        raise PlanFileError([f"{path} is too long for a plan ({MOST_CHARACTERS} characters)"])
    return parse_plan(text, str(path.resolve()), path.resolve().parent, shown=str(path))


def parse_plan(text: str, path: str, folder: Path, *, shown: str | None = None) -> PlanFile:
    """Check the text of a plan; `shown` is what messages call it where that is not `path`.

    A text of a run, in which secrets were hidden, gets them back from the environment. Raises
    `PlanFileError` with all mistakes.
    """
    shown = shown or path
    try:
        content = reveal(_toml(text), os.environ)
    except (ValueError, RecursionError, NotRevealedError) as error:
        kind = "" if isinstance(error, NotRevealedError) else "is not TOML "
        raise PlanFileError([f"{shown} {kind}({error}): mend that place"]) from error
    mistakes: list[str] = []
    known = Table(content, shown, mistakes)
    known.allow(("name", "client"))
    default_name = re.sub(r"[^A-Za-z0-9._-]", "-", Path(path).stem).lstrip(".-_")[:100] or "plan"
    name = known.get("name") or default_name
    if not _NAME.fullmatch(name):
        known.complain("name", "use letters, digits, '.', '_' and '-', 100 at most, for a folder")
    tables = content.get("client")
    is_list = isinstance(tables, list) and all(isinstance(table, dict) for table in tables)
    if not tables or not is_list:
        known.complain("client", "list at least one client under the heading [[client]]")
        tables = []
    entries = [
        read_entry(Table(table, f"{shown}: client {number}", mistakes), folder)
        for number, table in enumerate(tables, start=1)
    ]
    if mistakes:
        raise PlanFileError(mistakes)
    hidden = _secrets_of(entries)
    kept = hidden.hide(text)
    if Secrets(hidden.names).hide(_toml(kept)) != _toml(kept):
        raise PlanFileError([f"{shown}: a secret is written with escapes: use inherit for it"])
    return PlanFile(path, folder, kept, name, tuple(_told_apart(entries)), hidden)


def _told_apart(entries: Iterable[PlanEntry]) -> Iterator[PlanEntry]:
    """Number those of one label but other work, or a report took them for copies of one job."""
    works: dict[str, list[PlanEntry]] = {}
    for entry in entries:
        same = works.setdefault(entry.label, [])
        work = dataclasses.replace(entry, count=1, knobs={})
        if work not in same:
            same.append(work)
        number = same.index(work) + 1
        label = f"{entry.label} ({number})" if number > 1 else entry.label
        yield dataclasses.replace(entry, label=label)


def _toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def _secrets_of(entries: Sequence[PlanEntry]) -> Secrets:
    """What of the plan is not to be recorded."""
    names: dict[str, str] = {}
    inherited: set[str] = set()
    for entry in entries:
        inherited |= set(entry.inherit)
        own = [item for item in entry.environment.items() if item[0] not in entry.inherit]
        names |= secrets_of_words(map("=".join, own))
        names |= secrets_of_line(entry.command or "")
        names |= secrets_of_words(entry.arguments)
    return Secrets(names, frozenset(inherited))
