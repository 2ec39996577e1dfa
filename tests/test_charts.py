"""A print in grey still tells the modes of a chart apart."""

from __future__ import annotations

import itertools

import pytest

from benchmarking.analysis import charts

STYLES = {**charts._STYLES, "another mode": charts._OTHER_STYLE}


def luminance(color: str) -> float:
    """0 (black) to 255 (white), as a grey print weighs the colors."""
    red, green, blue = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue


@pytest.mark.parametrize("pair", list(itertools.combinations(STYLES, 2)), ids=" and ".join)
def test_two_modes_differ_in_grey_in_hatch_and_in_marker(pair: tuple[str, str]) -> None:
    one, other = (STYLES[mode] for mode in pair)
    assert abs(luminance(one["color"]) - luminance(other["color"])) >= 25
    assert one["hatch"] != other["hatch"]
    assert one["marker"] != other["marker"]
