"""One block of memory that the GPU process and the front ends share, and what lies where in it.

The block is an anonymous file (memfd): it has no name that a killed process could leave behind,
and it is gone with the last process that maps it. It holds an engine region and one region a
front end. Every word in it has one writer at a time, so nothing in it is locked: a region belongs
to its front end, except the images and answers of a slot, which belong to the GPU process from
when the slot was submitted until its answer was announced.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import asdict, dataclass

import numpy as np

from workloads.inference.image_input import IMAGE_SIZE

ENDPOINTS = ("predict", "batch_predict")
PARTS = ("decode", "queue", "gpu", "total")
# Upper bounds of the latency histograms of /metrics; one more bucket takes what is above.
LATENCY_BOUNDS_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
RECENT_REQUESTS = 100_000  # raw latencies kept for each endpoint, all front ends together
TICKS = 128  # counts of successful requests, one for each tenth of a second
STATUSES = 600
TOP_CLASSES = 5
_ALIGNMENT = 4096


@dataclass(frozen=True)
class BlockShape:
    """What the layout follows from; both sides must have the same.

    Attributes:
        front_ends: Number of front-end regions.
        slots: Pictures that each front end can have in flight.
        max_batch: The largest batch that the engine counts.
    """

    front_ends: int
    slots: int
    max_batch: int

    def as_dict(self) -> dict[str, int]:
        """Return the shape for a message to another process."""
        return asdict(self)


class _Cursor:
    """Hands out arrays of a buffer, one after another; without a buffer it only measures."""

    def __init__(self, buffer: mmap.mmap | None) -> None:
        self._buffer = buffer
        self.position = 0

    def take(self, dtype: type, *shape: int) -> np.ndarray | None:
        start = self.position
        self.position += int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.align(8)
        if self._buffer is None:
            return None
        return np.ndarray(shape, dtype, self._buffer, start)

    def align(self, bytes_: int) -> None:
        self.position = -(-self.position // bytes_) * bytes_


class EngineRegion:
    """Written by the GPU process.

    Attributes:
        waiting: int64 of shape (1,): images that wait for the device.
        batches: int64 of shape (max_batch + 1,): how many batches had that many images.
        alive: int64 of shape (front_ends,): 1 while that front end lives.
        crowded_seconds: float64 of shape (1,): when somebody last waited for a connection to become
            free (CLOCK_MONOTONIC).
    """

    def __init__(self, cursor: _Cursor, shape: BlockShape) -> None:
        """Lay the region out where the cursor stands."""
        self.waiting = cursor.take(np.int64, 1)
        self.batches = cursor.take(np.int64, shape.max_batch + 1)
        self.alive = cursor.take(np.int64, shape.front_ends)
        self.crowded_seconds = cursor.take(np.float64, 1)


class FrontEndRegion:
    """Written by one front end, except ``outputs`` and ``timings``.

    Attributes:
        gauges: int64: connections closed so far, requests inside, pictures being decoded,
            requests cut off by the end of a drain (see the indices below).
        seen_seconds: float64 of shape (1,): when the event loop last showed itself
            (CLOCK_MONOTONIC).
        statuses: int64 of shape (endpoints, 600): answers by HTTP status.
        classified: int64 of shape (endpoints,): images classified.
        first_seconds: float64 of shape (1,): start of the first request, 0 before it.
        last_seconds: float64 of shape (1,): end of the last successful request.
        ticks: int64 of shape (128, 2): number of a tenth of a second, successes in it.
        histogram: int64 of shape (endpoints, parts, bounds + 1).
        sums: float64 of shape (endpoints, parts): seconds in sum.
        written: int64 of shape (endpoints,): rows ever written to ``recent``.
        recent: float64 of shape (endpoints, rows, 5), a ring: start, decode, queue, gpu and total
            of each successful request, in seconds; NaN where it had no such part.
        outputs: float32 of shape (slots, 10): probabilities, then class indices.
        timings: float64 of shape (slots, 3): start and end of the batch (CLOCK_MONOTONIC
            seconds), images in it.
        images: uint8 of shape (slots, 224, 224, 3).
    """

    CLOSED, INSIDE, DECODING, CUT_OFF = range(4)

    def __init__(self, cursor: _Cursor, shape: BlockShape) -> None:
        """Lay the region out where the cursor stands."""
        endpoints, parts = len(ENDPOINTS), len(PARTS)
        self.gauges = cursor.take(np.int64, 4)
        self.seen_seconds = cursor.take(np.float64, 1)
        self.statuses = cursor.take(np.int64, endpoints, STATUSES)
        self.classified = cursor.take(np.int64, endpoints)
        self.first_seconds = cursor.take(np.float64, 1)
        self.last_seconds = cursor.take(np.float64, 1)
        self.ticks = cursor.take(np.int64, TICKS, 2)
        self.histogram = cursor.take(np.int64, endpoints, parts, len(LATENCY_BOUNDS_SECONDS) + 1)
        self.sums = cursor.take(np.float64, endpoints, parts)
        self.written = cursor.take(np.int64, endpoints)
        rows = RECENT_REQUESTS // shape.front_ends
        self.recent = cursor.take(np.float64, endpoints, rows, 1 + parts)
        self.outputs = cursor.take(np.float32, shape.slots, 2 * TOP_CLASSES)
        self.timings = cursor.take(np.float64, shape.slots, 3)
        cursor.align(_ALIGNMENT)
        self.images = cursor.take(np.uint8, shape.slots, IMAGE_SIZE, IMAGE_SIZE, 3)
        cursor.align(_ALIGNMENT)


class SharedBlock:
    """The mapped block with its regions.

    Attributes:
        descriptor: The anonymous file, to be handed to a front end.
        shape: What the layout follows from.
        engine: The GPU process's region.
        front_ends: One region a front end.
    """

    def __init__(self, shape: BlockShape, descriptor: int | None = None) -> None:
        """Map the block behind ``descriptor``, or a new one full of zeros.

        Memory is taken page by page as it is first used, so slots that are never needed at the
        same time cost nothing.
        """
        self.shape = shape
        if descriptor is None:
            descriptor = os.memfd_create("inference-server")
            os.ftruncate(descriptor, self._lay_out(None))
        self.descriptor = descriptor
        self._lay_out(mmap.mmap(descriptor, 0))

    def _lay_out(self, buffer: mmap.mmap | None) -> int:
        cursor = _Cursor(buffer)
        self.engine = EngineRegion(cursor, self.shape)
        self.front_ends = [FrontEndRegion(cursor, self.shape) for _ in range(self.shape.front_ends)]
        return cursor.position

    def gauge(self, index: int) -> int:
        """Return the sum of one gauge over all front ends."""
        return sum(int(region.gauges[index]) for region in self.front_ends)
