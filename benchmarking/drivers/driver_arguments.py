"""The flags that run_experiments.sh and stress_test.sh share, and wrong usage of both.

Standard library alone: usage errors are answered by the system's Python.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarking.cli import PROJECT_ROOT, SuiteError
from benchmarking.planning import limits
from benchmarking.planning.redaction import NotRevealedError, hidden_in_command_line, reveal
from benchmarking.records.writing import is_of_others

# Script, working folder and arguments of a run, each ended by NUL, for --resume.
SAVED_ARGUMENTS = "arguments.nul"

SHARED_HELP = """\
  --job 'COMMAND'       a job of your own in place of the mix, such as 'python train.py --epochs 1';
                        again for each further one
  --plan FILE           jobs of your own with their settings, in place of the mix
  --quick               small jobs, for a demonstration
  --allow-contention    measure although foreign processes are on the GPU (or: --beside-others)
  --repeats N           repeats of each co-run: rounds
  --output DIR          folder for the runs and the report; must not hold an earlier one
  --resume DIR          go on with what was cut off in that folder, with the flags saved there
  --gpu INDEX_OR_UUID   which GPU (default: the first one visible)
  --device auto|cuda|cpu  cpu: the CPU demonstration, even where there is a GPU
  --engine, --precision, --seed, --dataset, --data-dir   passed on to the jobs
  --mps-percentage even|N[,N...], --mps-memory-limit, --mps-priority   limits of the clients under
                        mps (see benchmarking/benchmark_suite.py --help)
  --dry-run             print every command and change nothing

Changes to the GPU's settings are made only when told to, need root (sudo without a password, or a
root shell), and are undone at the end:
  --mig                 the mig mode may switch MIG on and make its instances
  --mig-profile NAME    size of these instances (default 1g.5gb, or this GPU's one-slice profile)
  --mig-layout LIST     or the instance of each job, such as 2g.20gb,1g.10gb,1g.10gb
  --exclusive           MPS with compute mode EXCLUSIVE_PROCESS
  --timeslice default|short|medium|long   length of a time slice
"""

Check = Callable[["str | None"], Any]


class UsageError(SuiteError):
    """Arguments that make no sense; the help is named, too."""


class DriverParser(argparse.ArgumentParser):
    """Parses a driver's arguments."""

    def __init__(self, script: str, help_text: str, switches: Sequence[str]) -> None:
        """Take the name of the script, the whole text of its help, its flags without a value."""
        super().__init__(prog=script, add_help=False, allow_abbrev=False)
        self._help_text = help_text
        self.add_argument("--help", "-h", action="help")
        for flag in ("--quick", "--exclusive", "--mig", "--dry-run", *switches):
            self.add_argument(flag, action="store_true")
        self.add_argument("--allow-contention", "--beside-others", action="store_true")

    def format_help(self) -> str:
        """Return the help as it was written."""
        return self._help_text

    def error(self, message: str) -> NoReturn:
        """Raise the message as `UsageError`."""
        raise UsageError(message.removeprefix("argument "))

    def checked(self, name: str, check: Check, text: str | None) -> Any:
        """Return what a check makes of a text; what it does not take is an error of this name."""
        try:
            return check(text)
        except ValueError as error:
            self.error(f"{name}{error}")

    def parse(self, arguments: Sequence[str], checks: Mapping[str, Check]) -> argparse.Namespace:
        """Return the options; `checks` are the driver's own flags with a value.

        `words` are the arguments, `positional` those that are no flags. With --resume they are the
        arguments saved in its folder, `resumed`, given where they were.
        """
        words, resumed = list(arguments), None
        if words and words[0].partition("=")[0] == "--resume":
            words, resumed = self._read_saved(words)
        checks = {**SHARED_CHECKS, **checks}
        for flag in checks:
            self.add_argument(flag, action="append", nargs="?", default=[])
        options, rest = self.parse_known_args(words)
        unknown = [word for word in rest if word.startswith("-")]
        if unknown:
            self.error(f"unknown option: {unknown[0]}")
        for flag, check in checks.items():
            name = flag.strip("-").replace("-", "_")
            values = [self.checked(flag, check, text) for text in getattr(options, name)]
            last = values[-1] if values else DEFAULTS.get(name)
            setattr(options, name, values if flag == "--job" else last)
        jobs = {"--mix": options.mix, "--plan": options.plan, "--job": options.job}
        given = [flag for flag, value in jobs.items() if value]
        if len(given) > 1:
            self.error(f"{given[0]} and {given[1]}: give one of the two")
        options.script, options.words, options.resumed = self.prog, words, resumed
        options.positional = rest
        return options

    def _read_saved(self, words: list[str]) -> tuple[list[str], Path]:
        """Return the words saved in the folder that --resume names, and go where they were given.

        Raises `SuiteError` where somebody else could have written them: they are run as commands.
        """
        _, equals, value = words[0].partition("=")
        values = [value] * bool(equals) + words[1:]
        if len(values) != 1:
            self.error(
                "--resume needs a folder and takes no other flags: it goes on with those saved "
                "there"
            )
        folder = Path(values[0]).resolve()
        try:
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW  # it may be a link, or a pipe
            with open(os.open(folder / SAVED_ARGUMENTS, flags), "rb") as stream:
                status = os.fstat(stream.fileno())
                script, origin, *saved = map(os.fsdecode, stream.read().split(b"\0")[:-1])
        except (OSError, ValueError):
            self.error(
                f"--resume: '{values[0]}' holds no {SAVED_ARGUMENTS}; name the folder of an "
                f"earlier {self.prog}"
            )
        if is_of_others(status):
            raise SuiteError(
                f"--resume: {folder / SAVED_ARGUMENTS} is not yours alone, and what it holds would "
                "be run; copy the folder, look at it, chmod go-w it, or start anew"
            )
        if script != self.prog:
            self.error(f"--resume: {folder} was made by {script}; go on with that")
        try:
            os.chdir(origin)
        except OSError:
            raise SuiteError(f"the folder that it was started from is gone: {origin}") from None
        try:
            return reveal(saved, os.environ), folder
        except NotRevealedError as error:
            raise SuiteError(f"--resume: {error}") from None


def matching(pattern: str, what: str) -> Check:
    """Return a check for text that matches a pattern as a whole; `what` it is, for the message."""

    def check(text: str | None) -> str:
        if text is None or not re.fullmatch(pattern, text, re.ASCII):
            raise ValueError(f" needs {what}")
        return text

    return check


def one_of(*choices: str) -> Check:
    """Return a check for one of these words."""
    return matching("|".join(choices), f"one of: {' '.join(choices)}")


def path(is_good: Callable[[str], bool] = lambda path: True, complaint: str = "") -> Check:
    """Return a check for a path; it is returned such that no program takes it for a flag.

    Ask by os.path: pathlib raises for a name that is too long.
    """

    def check(text: str | None) -> str:
        text = SOME_TEXT(text)
        if not is_good(text):
            raise ValueError(f": '{text}' {complaint}")
        return f"./{text}" if text.startswith("-") else text

    return check


def _no_resume(text: str | None) -> NoReturn:
    raise ValueError(" goes on with the flags saved in its folder: give no others")


def _listed(check: Callable[[str], str], what: str, *words: str) -> Check:
    """Return a check for one of the words, or values with commas between that `check` lets pass."""

    def checked(text: str | None) -> str:
        text = SOME_TEXT(text)
        try:
            for part in [] if text in words else text.split(","):
                check(part.strip())
        except ValueError:
            raise ValueError(f" needs {what}") from None
        return text

    return checked


SOME_TEXT = matching(r"(?s).+", "a value")
WHOLE_NUMBER = matching("[1-9][0-9]{0,3}", "a whole number from 1 on, 9999 at most")
ABOVE_0 = r"(?=.*[1-9])\d+(\.\d+)?"
# The flags with a value that both drivers have; a `ValueError` is the end of the message.
SHARED_CHECKS: Mapping[str, Check] = {
    "--resume": _no_resume,
    "--output": path(),
    "--gpu": SOME_TEXT,
    "--device": one_of("auto", "cpu", "cuda"),
    "--repeats": WHOLE_NUMBER,
    "--timeslice": one_of("default", "short", "medium", "long"),
    "--plan": path(os.path.isfile, "is not a file"),
    "--job": SOME_TEXT,
    "--mig-profile": SOME_TEXT,
    "--mig-layout": matching(
        f"{limits.PROFILE}(,{limits.PROFILE})*",
        "MIG profiles with commas between, such as 2g.20gb,1g.10gb",
    ),
    "--engine": one_of("eager", "graph", "compile"),
    "--precision": one_of("fp32", "tf32", "bf16"),
    "--dataset": one_of("auto", "cifar10", "folder", "synthetic"),
    "--data-dir": path(os.path.isdir, "is not a folder"),
    "--seed": matching(r"\d+", "a whole number from 0 on"),
    "--mps-percentage": _listed(limits.percentage, "even, or percentages up to 100", limits.EVEN),
    "--mps-memory-limit": _listed(limits.memory_limit, "sizes such as 512M or 8G"),
    "--mps-priority": _listed(limits.priority, "normal or below-normal"),
}
# The profile is the guide's; setup_mig.sh takes this card's profile of the same size for it.
DEFAULTS = {"device": "auto", "mig_profile": "1g.5gb"}


def jobs_of(options: argparse.Namespace, usual_mix: str) -> list[str]:
    """Return the suite's flags for the jobs."""
    if options.plan:
        return ["--plan", options.plan]
    if options.job:
        return [word for job in options.job for word in ("--job", job)]
    return ["--mix", options.mix or usual_mix]


def save_arguments(options: argparse.Namespace, folder: str) -> None:
    """Keep the arguments for --resume, for their owner alone; raises `OSError`."""
    words = [options.script, os.getcwd(), *hidden_in_command_line(options.words)]
    file = os.open(
        os.path.join(folder, SAVED_ARGUMENTS), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600
    )
    with open(file, "wb") as stream:
        stream.write(b"".join(os.fsencode(word) + b"\0" for word in words))


def suite_flags(options: argparse.Namespace) -> list[str]:
    """Return the flags that every run of the suite gets."""
    return [
        *(["--allow-contention"] if options.allow_contention else []),
        *flags_of(options, "device", "engine", "precision", "dataset", "data_dir", "seed"),
    ]


def mps_flags(options: argparse.Namespace) -> list[str]:
    """Return the limits of clients under MPS."""
    return flags_of(options, "mps_percentage", "mps_memory_limit", "mps_priority")


def flags_of(options: argparse.Namespace, *names: str) -> list[str]:
    """Return the flags of these names that were given, with their values."""
    words = []
    for name in names:
        value = getattr(options, name)
        words += [] if value is None else [f"--{name.replace('_', '-')}", value]
    return words


def command_name(script: str) -> str:
    """Return how the script is called from the present folder."""
    try:
        name = os.path.relpath(PROJECT_ROOT / script)
    except OSError:  # the present folder is gone
        name = ".."
    if name.startswith(".."):
        return str(PROJECT_ROOT / script)
    return name if "/" in name else f"./{name}"
