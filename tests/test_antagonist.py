"""antagonist.py: the asked share of the time is the one that is reached and recorded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from held_client import HeldClient

PROJECT_ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "workloads/custom/antagonist.py"


def figures_of(tmp_path: Path, *arguments: object) -> dict:
    """Run the script to its end and return its figures."""
    command = [sys.executable, str(PROJECT_ROOT / SCRIPT), *map(str, arguments)]
    ended = subprocess.run([*command, "--results-dir", str(tmp_path)], capture_output=True,
                           text=True, timeout=200, check=False)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    [path] = tmp_path.glob("antagonist_*.json")
    return json.loads(path.read_text())["figures"]


@pytest.mark.parametrize(("kind", "duty"), [("hbm", 0.25), ("sm", 0.5), ("hbm", 0)])
def test_the_share_of_the_time_is_reached_within_5_points(
    kind: str, duty: float, tmp_path: Path
) -> None:
    figures = figures_of(tmp_path, "--kind", kind, "--duty", duty, "--duration", 1,
                         "--device", "cpu")  # fmt: skip
    assert figures["achieved_duty_percent"] == pytest.approx(100 * duty, abs=5)
    assert (figures["rate"] > 0) == (duty > 0)
    if duty:
        share = figures["rate"] / figures["rate_while_busy"]
        assert 100 * share == pytest.approx(figures["achieved_duty_percent"], abs=0.1)


def test_a_client_stops_in_the_middle_of_its_pause(tmp_path: Path) -> None:
    with HeldClient(tmp_path, SCRIPT, "--kind", "hbm", "--duty", "0.01", "--duration", "600",
                    "--device", "cpu") as held:  # fmt: skip
        held.start_working()
        held.say("stop")
        assert held.exit_code(20) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--kind", "hbm", "--duty", "1.5"), "not a number from 0 to 1"),
        (("--kind", "disk"), "invalid choice"),
        (("--kind", "pcie", "--device", "cpu"), "needs a GPU"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(arguments: tuple[str, ...], said: str) -> None:
    command = [sys.executable, str(PROJECT_ROOT / SCRIPT), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 2
    assert said in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["hbm", "sm", "pcie"])
def test_at_full_duty_the_card_is_busy_nearly_all_the_time(kind: str, tmp_path: Path) -> None:
    figures = figures_of(tmp_path, "--kind", kind, "--duration", 2)
    assert figures["achieved_duty_percent"] > 95
