"""A copy of `benchmarking/` beside stand-ins for the programs that it runs, on a scripted card."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import nvml_stub

PROJECT_ROOT = Path(__file__).resolve().parents[1]


def copy_programs(root: Path, stand_in: Path, names: Iterable[str]) -> None:
    """Copy `benchmarking/` into `root`, and `stand_in` to each path of `names` below it."""
    shutil.copytree(
        PROJECT_ROOT / "benchmarking", root / "benchmarking",
        ignore=shutil.ignore_patterns("__pycache__"),
    )  # fmt: skip
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(stand_in, root / name)


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
            lines.append(path.read_text().replace("\0", " "))
        except OSError:
            continue
    return [line for line in lines if str(root) in line]
