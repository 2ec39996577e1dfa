"""A copy of `benchmarking/` beside stand-ins for the programs that it runs, on a scripted card.

What the programs wait for by the clock is shorter in the copy: scripted clients do in a tenth of a
second what a job does in seconds.
"""

from __future__ import annotations

import atexit
import compileall
import functools
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import nvml_stub

PROJECT_ROOT = Path(__file__).resolve().parents[1]

# Constants of the programs by file. A window holds two process lists at least.
SHORTENED = {
    "blast_radius.py": {"RETRY_SECONDS": 0.2},
    "gpu_monitor.py": {"PROCESS_LIST_PERIOD_SECONDS": 0.1},
    # Scripted clients sleep for their work, and so does who waits for a core of a busy machine.
    "measuring/baselines.py": {"MOST_CPU_WAIT_FRACTION": 9, "TOLERATED_FRACTION": 9},
    "measuring/sampler.py": {"END_TIMEOUT_SECONDS": 1},
    "suite/preflight.py": {
        "GUIDE_MIN_SECONDS": 0.4, "SMALL_MIN_SECONDS": 0.4, "SETTLE_SECONDS": 0.1,
        "QUICK_SETTLE_SECONDS": 0.1, "CPU_SETTLE_SECONDS": 0.1,
    },
}  # fmt: skip


def copy_programs(root: Path, stand_in: Path, names: Iterable[str]) -> None:
    """Copy `benchmarking/` into `root`, and `stand_in` to each path of `names` below it."""
    shutil.copytree(_template(), root / "benchmarking")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(stand_in, root / name)


def shorten_windows(root: Path) -> None:
    """Let run_experiments.py measure scripted jobs for less than a second each."""
    path = root / "benchmarking" / "run_experiments.py"
    short = '("0.1", "0.4", "0.4")'
    path.write_text(re.sub(r"(?m)^(\w+_SECONDS) = \(.*$", rf"\1 = {short}", path.read_text()))


@functools.cache
def _template() -> Path:
    """The folder that is copied, made once a test process: shortened, and compiled already."""
    made = Path(tempfile.mkdtemp(prefix="programs-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    folder = made / "benchmarking"
    shutil.copytree(
        PROJECT_ROOT / "benchmarking", folder, ignore=shutil.ignore_patterns("__pycache__")
    )
    for file, constants in SHORTENED.items():
        text = (folder / file).read_text()
        for name, seconds in constants.items():
            text, count = re.subn(rf"^{name} = .*$", f"{name} = {seconds}", text, flags=re.M)
            assert count == 1, f"{file} has no {name} any more"
        (folder / file).write_text(text)
    compileall.compile_dir(folder, quiet=1)
    return folder


def scripted_card(root: Path, **state: object) -> tuple[Path, dict[str, str]]:
    """Script a card; return its state file and the environment of programs that shall see it."""
    card = nvml_stub.write_state(root / "card.txt", **state)
    environment = nvml_stub.stub_environment(nvml_stub.build_nvml_stub(root), card)
    unwanted = ("CUDA_", "TORCHINDUCTOR_")
    return card, {k: v for k, v in environment.items() if not k.startswith(unwanted)}


def processes_of(root: Path) -> list[str]:
    """Return the command lines of living processes that run something of `root`."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_text(errors="replace").replace("\0", " "))
        except OSError:
            continue
    return [line for line in lines if str(root) in line]
