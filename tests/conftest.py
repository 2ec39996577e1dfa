"""What every test shares: where the project is, and what some tests need: a GPU, a browser."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from driver_runner import DriverRunner
    from mode_script_runner import ModeScripts
    from suite_bench import Bench
    from workload_script import Here

PROJECT_ROOT = Path(__file__).resolve().parents[1]
GPU_TURNS = Path(__file__)  # locked while a test uses the GPU
sys.path.insert(0, str(PROJECT_ROOT))
# Runs of tests in other processes are nobody's business here.
os.environ["GPU_SHARING_LOCK_DIR"] = tempfile.mkdtemp(prefix="locks-")
atexit.register(shutil.rmtree, os.environ["GPU_SHARING_LOCK_DIR"], ignore_errors=True)
# Started in the background, or under nohup, pytest ignores them, and whatever it starts would.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.umask(0o022)  # under one that lets a group write, saved states would be refused
pytest.register_assert_rewrite("driver_runner", "mode_script_runner", "suite_bench", "waiting")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes share the cores already; each taking all of them only makes them wait.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def has_nvidia_gpu() -> bool:
    """Whether a driver on this machine answers and lists at least one GPU."""
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is None:
        return False
    listing = subprocess.run([nvidia_smi, "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU 0" in listing.stdout


def find_browser() -> str | None:
    """A browser that can be driven without a display, `None` where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what needs a GPU or a browser where there is none, and large downloads by default.

    Skipped tests would make the count of those that ran look larger than it is.
    """
    missing = [
        mark
        for mark, found in (
            ("gpu", has_nvidia_gpu()),
            ("browser", find_browser()),
            ("download", "download" in config.getoption("markexpr")),
        )
        if not found
    ]
    cannot_run = [item for item in items if any(item.get_closest_marker(mark) for mark in missing)]
    if cannot_run:
        config.hook.pytest_deselected(items=cannot_run)
        items[:] = [item for item in items if item not in cannot_run]


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Variables that a workload in this process has set are not the next test's."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures that tests recorded as properties, whichever process they ran in."""
    figures = [
        (name, value, report.nodeid)
        for report in terminalreporter.getreports("passed")
        if report.when == "call"
        for name, value in report.user_properties
    ]
    if figures:
        terminalreporter.section("figures")
    for name, value, test in sorted(figures):
        terminalreporter.write_line(f"{name} {value:,}  {test}")


@pytest.fixture
def scripts() -> Iterator[ModeScripts]:
    """The scripts of gpu-configs/ on a pretended machine of the test's own."""
    from mode_script_runner import mode_scripts

    with mode_scripts() as made:
        yield made


@pytest.fixture
def runner() -> Iterator[DriverRunner]:
    """The driver scripts on a pretended machine with a pretended suite."""
    from driver_runner import driver_runner

    with driver_runner() as made:
        yield made


@pytest.fixture(scope="module")
def asked() -> Iterator[DriverRunner]:
    """Driver scripts for questions that change nothing: dry runs, and what is refused."""
    from driver_runner import driver_runner

    with driver_runner() as made:
        yield made


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """The suite on a machine without a GPU."""
    from suite_bench import Bench

    return Bench(tmp_path)


@pytest.fixture
def card_bench(bench: Bench) -> Bench:
    """The suite on a machine with an H100."""
    bench.add_card()
    return bench


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Here:
    """Workloads run in the process of the test."""
    from workload_script import Here

    return Here(monkeypatch, capsys)


@pytest.fixture(autouse=True)
def own_gpu_generator(request: pytest.FixtureRequest) -> None:
    """Give each test that uses the GPU random numbers of its own.

    A captured graph keeps the state of the generator that it was captured with. One that failed, or
    that an earlier test has left to the garbage collector, must not reach into the next test.
    """
    torch = sys.modules.get("torch")
    if request.node.get_closest_marker("gpu") is None or torch is None:
        return
    if torch.cuda.is_initialized():
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool, bool]:
    """Let the tests that use the GPU take turns, in however many processes they run.

    Before everything else, so that pytest-timeout does not count the wait.
    """
    if item.get_closest_marker("gpu") is None:
        return (yield)
    with GPU_TURNS.open() as turns:
        fcntl.flock(turns, fcntl.LOCK_EX)
        return (yield)
