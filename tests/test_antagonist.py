"""antagonist.py: the asked share of the time is the one that is reached and recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
from held_client import HeldClient
from workload_script import Here, assert_refused, result_reader

SCRIPT = "workloads/custom/antagonist.py"


def figures_of(here: Here, tmp_path: Path, *arguments: object) -> dict:
    """Run the script to its end and return its figures."""
    ended = here.run(SCRIPT, *map(str, arguments), "--results-dir", str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    return result_reader(SCRIPT)(tmp_path)["figures"]


@pytest.mark.parametrize(("kind", "duty"), [("hbm", 0.25), ("sm", 0.5), ("hbm", 0)])
def test_the_share_of_the_time_is_reached_within_5_points(
    here: Here, kind: str, duty: float, tmp_path: Path
) -> None:
    figures = figures_of(here, tmp_path, "--kind", kind, "--duty", duty, "--duration", 1,
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
def test_what_cannot_be_done_is_one_sentence(
    here: Here, arguments: tuple[str, ...], said: str
) -> None:
    assert_refused(here.run(SCRIPT, *arguments), said)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["hbm", "sm", "pcie"])
def test_at_full_duty_the_card_is_busy_nearly_all_the_time(
    here: Here, kind: str, tmp_path: Path
) -> None:
    figures = figures_of(here, tmp_path, "--kind", kind, "--duration", 2)
    assert figures["achieved_duty_percent"] > 95
