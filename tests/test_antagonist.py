"""antagonist.py: the asked share of the time is the one that is reached and recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_client_contract import ANTAGONIST as SCRIPT
from workload_script import Here, only_result


def figures_of(here: Here, tmp_path: Path, *arguments: object) -> dict:
    """Run the script to its end and return its figures."""
    ended = here.run(SCRIPT, *arguments, "--results-dir", tmp_path)
    assert ended.returncode == 0, ended.stderr
    return only_result(SCRIPT, tmp_path)["figures"]


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


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["hbm", "sm", "pcie"])
def test_at_full_duty_the_card_is_busy_nearly_all_the_time(
    here: Here, kind: str, tmp_path: Path
) -> None:
    figures = figures_of(here, tmp_path, "--kind", kind, "--duration", 2)
    assert figures["achieved_duty_percent"] > 95
