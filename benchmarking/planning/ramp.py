"""Which count of clients to try next: up until one breaks, then by halves for the exact count."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Where `until_break` gives up: an MPS server takes 48 clients (60 from CUDA 12.9 on), and long
# before that a host runs out of cores for them.
MOST_CLIENTS = 64


class Ramp:
    """Chooses counts by what was found at the ones before.

    It goes through `counts`, smallest first, up to the first that breaks; with `until_break` it
    goes on past the last by doubling. With `bisect` it then halves the gap between the largest
    good count and the smallest bad one. `step` is the number of clients that make a whole mix:
    counts between two multiples of it would be counts of other jobs.
    """

    def __init__(
        self,
        counts: Sequence[int],
        *,
        step: int = 1,
        bisect: bool = False,
        until_break: bool = False,
    ) -> None:
        """Start with nothing tried; without `counts` there is nothing to try."""
        self._counts = sorted(counts)
        self._step = step
        self._bisect = bisect
        self._until_break = until_break
        self._holds: dict[int, bool] = {}

    @property
    def first_bad(self) -> int | None:
        """Smallest count that broke."""
        return min((count for count, holds in self._holds.items() if not holds), default=None)

    @property
    def last_good(self) -> int | None:
        """Largest count under the first bad one that held."""
        limit = self.first_bad or math.inf
        good = [count for count, holds in self._holds.items() if holds and count < limit]
        return max(good, default=None)

    def note(self, count: int, *, holds: bool) -> None:
        """Say what was found at a count."""
        self._holds[count] = holds

    def next_count(self) -> int | None:
        """Return the count to try next, `None` when the answer is found."""
        if self.first_bad is not None:
            return self._between(self.last_good or 0, self.first_bad) if self._bisect else None
        untried = [count for count in self._counts if count not in self._holds]
        if untried:
            return untried[0]
        return self._past(self.last_good) if self._until_break and self.last_good else None

    def _between(self, low: int, high: int) -> int | None:
        middle = (low + high) // 2 // self._step * self._step
        return middle if low < middle < high else None

    def _past(self, last: int) -> int | None:
        doubled = min(2 * last, MOST_CLIENTS) // self._step * self._step
        return doubled if doubled > last else None
