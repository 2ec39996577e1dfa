"""Numbers as a reader wants them: three significant digits, no powers of ten, fitting units."""

from __future__ import annotations

import math
from collections.abc import Sequence

_DIGITS = 3
_MS_PER_SECOND = 1000


def significant(value: float) -> str:
    """Three significant digits without an exponent: `0.280`, `12.7`, `-11.6`, `12,833`, `0`."""
    if math.isinf(value):
        return "∞"
    rounded = float(f"{value:.{_DIGITS - 1}e}")
    if rounded == 0:
        return "0"
    if abs(rounded) >= 10**_DIGITS:
        return f"{value:,.0f}"
    decimals = max(0, _DIGITS - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:.{decimals}f}"


def duration(milliseconds: float) -> str:
    """A duration given in ms, in s from 1000 ms on: `12.7 ms`, `13.0 s`; `∞` has no unit."""
    value, unit = _scaled(milliseconds)
    return f"{value} {unit}".rstrip()


def durations(milliseconds: Sequence[float]) -> str:
    """Durations given in ms, the unit once where they share it: `12.8 / 13.0 / 13.0 s`."""
    parts = [_scaled(value) for value in milliseconds]
    units = {unit for _, unit in parts}
    if len(units) == 1:
        return f"{' / '.join(value for value, _ in parts)} {units.pop()}".rstrip()
    return " / ".join(f"{value} {unit}".rstrip() for value, unit in parts)


def _scaled(milliseconds: float) -> tuple[str, str]:
    if math.isinf(milliseconds):
        return significant(milliseconds), ""
    # Judged after rounding, so that 999.6 ms is 1.00 s and never "1,000 ms".
    if float(f"{milliseconds:.{_DIGITS - 1}e}") >= _MS_PER_SECOND:
        return significant(milliseconds / _MS_PER_SECOND), "s"
    return significant(milliseconds), "ms"
