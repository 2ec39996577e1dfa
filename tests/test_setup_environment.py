"""setup_environment.sh: which Python is taken, and a .venv that is made, finished and recognized.

A copy of the script runs in a folder of the test's own, with the real venv and pip, against a
one-file package in a folder: no network.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import PROJECT_ROOT

from benchmarking import environment

DRIVER = """
set -Eeuo pipefail
source ./setup_environment.sh
environment::set_up "$PWD/requirements.txt"
printf 'python: %s\\n' "$PYTHON"
"""

REQUIREMENT = r"[a-z0-9_-]+>=[0-9.]+,<[0-9]+(; python_version < \"3\.[0-9]+\")? +# \S.+"
# A pip during whose work somebody presses Ctrl-C: all of the foreground get the signal, and pip, as
# the real one, takes its time and ends with a status of its own.
SLOW_PIP = """
import os, signal, sys, time
if "install" in sys.argv:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.killpg(0, signal.SIGINT)
    time.sleep(1)
    print("pip has ended")
    sys.exit(2)
"""


@dataclass
class Project:
    """A folder with the set-up script and a requirements file for it."""

    folder: Path

    @property
    def venv(self) -> Path:
        return self.folder / ".venv"

    def start(
        self, *, wheels: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a driver that only sets the environment up; pip sees `wheels` and nothing else."""
        own = ("PYTHON", "PYTHONPATH")
        inherited = {name: value for name, value in os.environ.items()
                     if not name.startswith("PIP_") and name not in own}  # fmt: skip
        offline = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{inherited['PATH']}",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(wheels or self.folder / "no-wheels"),
        }
        return subprocess.run(
            ["bash", "-c", DRIVER],
            cwd=self.folder, env={**inherited, **offline, **environment}, capture_output=True,
            text=True, timeout=120, check=False, start_new_session=True,
        )  # fmt: skip

    def site_packages(self) -> Path:
        return next(self.venv.glob("lib/python*/site-packages"))


def make_project(folder: Path) -> Project:
    (folder / "benchmarking").mkdir(parents=True)
    for program in ("setup_environment.sh", "benchmarking/environment.py"):
        shutil.copy(PROJECT_ROOT / program, folder / program)
    (folder / "requirements.txt").write_text("tiny-tool>=1.2,<2  # for tests\n")
    return Project(folder)


def add_wheel(folder: Path, version: str) -> None:
    """Write a wheel of tiny-tool, a package with one module."""
    folder.mkdir(exist_ok=True)
    info = f"tiny_tool-{version}.dist-info"
    files = {
        "tiny_tool.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny-tool\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"tiny_tool-{version}-py3-none-any.whl", "w") as wheel:
        for name, text in [*files.items(), (f"{info}/RECORD", record)]:
            wheel.writestr(name, text)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    add_wheel(folder, "1.2")
    return folder


@pytest.fixture(scope="module")
def first_start(
    tmp_path_factory: pytest.TempPathFactory, wheels: Path
) -> tuple[Project, subprocess.CompletedProcess[str]]:
    """Started in a folder whose modules are somebody else's, and must never be run."""
    made = make_project(tmp_path_factory.mktemp("first") / "project")
    for name in ("venv", "ensurepip", "pip", "sys", "importlib", "argparse", "re", "tiny_tool",
                 "multiprocessing", "subprocess", "encodings"):  # fmt: skip
        (made.folder / f"{name}.py").write_text(f"open({str(made.folder / 'was_run')!r}, 'w')\n")
    return made, made.start(wheels=wheels, PYTHONPATH=".:/nonexistent:relative:")


@pytest.fixture
def complete(first_start: tuple[Project, object], tmp_path: Path) -> Project:
    """A project whose .venv is complete."""
    shutil.copytree(first_start[0].folder, tmp_path / "project", symlinks=True)
    return Project(tmp_path / "project")


def test_the_first_start_makes_a_venv_and_says_what_goes_into_it(
    first_start: tuple[Project, subprocess.CompletedProcess[str]],
) -> None:
    made, result = first_start
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"python: {made.venv}/bin/python\n"
    assert f"Installing into {made.venv}, once" in result.stderr
    assert "tiny-tool>=1.2,<2" in result.stderr
    assert (made.site_packages() / "tiny_tool.py").exists()
    assert not (made.folder / "was_run").exists()


def test_the_next_start_says_nothing_and_takes_what_somebody_else_filled(
    complete: Project, first_start: tuple[Project, object]
) -> None:
    (stamp,) = complete.venv.glob("complete-*")
    for _ in range(2):
        result = complete.start(PYTHONPATH=".")
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == f"python: {complete.venv}/bin/python\n"
        assert stamp.exists()
        stamp.unlink()
    assert not (first_start[0].folder / "was_run").exists()


def test_an_active_python_that_has_everything_is_used_pythonpath_included(
    tmp_path: Path, wheels: Path
) -> None:
    project = make_project(tmp_path / "project")
    with zipfile.ZipFile(next(wheels.iterdir())) as wheel:
        wheel.extractall(tmp_path / "packages")
    result = project.start(PYTHONPATH=str(tmp_path / "packages"))
    assert result.returncode == 0, result.stderr
    assert not project.venv.exists()
    assert result.stdout.startswith("python: ")
    assert str(project.folder) not in result.stdout


def test_offline_what_is_missing_is_listed_and_the_next_start_finishes_the_work(
    complete: Project, wheels: Path
) -> None:
    newer = "tiny-tool>=1.3,<2\ntorch>=2.11,<3\n"
    (complete.folder / "requirements.txt").write_text(newer)
    result = complete.start()
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert "tiny-tool>=1.3,<2: found version 1.2" in lines
    assert "torch>=2.11,<3: not installed" in lines
    assert lines[-1].startswith("error: pip could not install the packages above")
    assert any("6 GB on disk" in line for line in lines)

    (complete.folder / "requirements.txt").write_text("tiny-tool>=1.3,<2\n")
    both = complete.folder / "wheels"
    add_wheel(both, "1.3")
    result = complete.start(wheels=both)
    assert result.returncode == 0, result.stderr
    assert "1.3" in (complete.site_packages() / "tiny_tool.py").read_text()
    assert "GB on disk" not in result.stderr


def test_of_two_first_starts_at_once_one_installs_and_the_other_waits(
    tmp_path: Path, wheels: Path
) -> None:
    project = make_project(tmp_path / "project")
    with ThreadPoolExecutor(2) as pool:
        starts = [pool.submit(project.start, wheels=wheels) for _ in range(2)]
    done = [start.result() for start in starts]
    assert [one.returncode for one in done] == [0, 0], done
    said = [one.stderr for one in done]
    assert sorted("Installing into" in text for text in said) == [False, True], said
    assert sum("Waiting for another installation" in text for text in said) == 1, said


def test_who_may_only_read_the_project_holds_up_no_installation(
    tmp_path: Path, wheels: Path
) -> None:
    project = make_project(tmp_path / "project")
    with contextlib.ExitStack() as stack:
        for path in [project.folder, *project.folder.rglob("*")]:
            if path.stat().st_mode & 0o4:  # others may open it
                descriptor = os.open(path, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert project.start(wheels=wheels).returncode == 0
    locks = [path for path in project.folder.iterdir() if path.name.endswith(".lock")]
    assert [path.stat().st_mode & 0o777 for path in locks] == [0o600]


def test_ctrl_c_during_an_installation_ends_with_130_and_no_advice(complete: Project) -> None:
    next(complete.venv.glob("complete-*")).unlink()
    shutil.rmtree(complete.site_packages() / "pip")
    (complete.site_packages() / "pip.py").write_text(SLOW_PIP)
    (complete.folder / "requirements.txt").write_text("tiny-tool>=1.3,<2\n")
    result = complete.start()
    assert result.returncode == 130
    assert result.stderr.endswith("pip has ended\n")
    assert "error:" not in result.stderr
    assert "Traceback" not in result.stderr


def test_a_program_is_become_with_its_words_as_they_are(complete: Project) -> None:
    program = complete.folder / "program.py"
    program.write_text(
        "import os, sys\nprint(sys.argv[1:], os.environ['GPU_SHARING_PYTHON'], os.getpid())\n"
    )
    words = ["--", "--dry-run", "--help", "", "x y", "--"]
    for flags in ([], ["--dry-run"]):
        process = subprocess.Popen(
            [sys.executable, "-I", "benchmarking/environment.py", "run", *flags, str(program),
             *words],
            cwd=complete.folder, env={**os.environ, "PYTHON": f"{complete.venv}/bin/python"},
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        printed, _ = process.communicate(timeout=60)
        assert printed == f"{words} {complete.venv}/bin/python {process.pid}\n"


def test_a_cdpath_sends_nobody_elsewhere(complete: Project) -> None:
    (complete.folder.parent / "other" / "project").mkdir(parents=True)
    driver = "set -eu; source project/setup_environment.sh; printf '%s' \"$ENVIRONMENT_ROOT\""
    found = subprocess.check_output(
        ["bash", "-c", driver], cwd=complete.folder.parent, text=True,
        env={**os.environ, "CDPATH": str(complete.folder.parent / "other")},
    )  # fmt: skip
    assert found == str(complete.folder)


def test_a_package_that_does_not_import_is_not_taken_for_complete(complete: Project) -> None:
    next(complete.venv.glob("complete-*")).unlink()
    (complete.site_packages() / "tiny_tool.py").write_text("import half_written\n")
    complete.start(PYTHON=f"{complete.venv}/bin/python")
    result = complete.start()
    assert result.returncode == 1
    assert "cannot be imported (ModuleNotFoundError" in result.stderr
    assert f"delete {complete.venv} and start again" in result.stderr


def test_a_venv_whose_python_is_gone_is_made_anew(complete: Project, wheels: Path) -> None:
    for link in (complete.venv / "bin").glob("python*"):
        link.unlink()
        link.symlink_to("/nonexistent/python")
    result = complete.start(wheels=wheels)
    assert result.returncode == 0, result.stderr
    assert f"Making {complete.venv} with" in result.stderr


def test_a_python_that_the_caller_names_is_used_or_refused_never_replaced(
    complete: Project, tmp_path: Path
) -> None:
    good = f"{complete.venv}/bin/python"
    assert complete.start(PYTHON=good).stdout == f"python: {good}\n"

    lacking = complete.start(PYTHON=sys.executable)
    assert lacking.returncode == 1
    assert "tiny-tool>=1.2,<2: not installed" in lacking.stderr
    assert "lacks the packages above" in lacking.stderr

    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    refused = complete.start(PYTHON=str(old))
    assert refused.returncode == 1
    assert "is not a Python >= 3.10" in refused.stderr


def test_versions_are_compared_as_numbers() -> None:
    fitting = (("2.11.0+cu130", ">=2.11,<3"), ("0.26.0", ">=0.26,<1"), ("1.0", ""), ("1.0", "==1"),
               ("13.615.71", ">=12.560.30,<14"))  # fmt: skip
    others = (("2.10.9", ">=2.11,<3"), ("3.0", ">=2.11,<3"), ("3.0.0rc1", ">=2.11,<3"))
    found = [case for case in (*fitting, *others) if environment.within_bounds(*case)]
    assert found == list(fitting)


def test_every_requirement_has_a_lower_bound_a_ceiling_and_a_comment_and_is_here() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = (PROJECT_ROOT / name).read_text().splitlines()
        packages = [line for line in lines if line and not line.startswith(("#", "-r"))]
        assert packages
        for line in packages:
            assert re.fullmatch(REQUIREMENT, line), line
    requirements = environment.read_requirements(PROJECT_ROOT / "requirements-dev.txt")
    assert {"torch", "pytest"} <= {package for package, _ in requirements}
    for package, bounds in requirements:
        assert environment.problem_with(package, bounds, really_import=False) is None


def test_a_package_for_older_pythons_is_wanted_by_them_alone(tmp_path: Path) -> None:
    wanted = tmp_path / "requirements.txt"
    wanted.write_text(
        'old>=1,<2; python_version < "3.1"  # x\nnew>=1,<2; python_version < "9.0"  # y\n'
    )
    assert environment.read_requirements(wanted) == [("new", ">=1,<2")]
