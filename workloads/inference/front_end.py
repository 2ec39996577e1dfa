"""A front end: the event loop that holds connections, reads requests and answers them.

It runs on a thread of the GPU process, or as the only thing in a process of its own
(front_end_process.py); it knows neither torch nor where the device is.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from workloads.inference.http_app import Application, ServerState
from workloads.inference.http_messages import BodyMemory, HttpLimits
from workloads.inference.http_protocol import HttpProtocol
from workloads.inference.image_service import Engine, ImageService
from workloads.inference.server_stats import ServerStats, StatsWriter
from workloads.inference.shared_block import FrontEndRegion, SharedBlock

# For at most this long a drain leaves idle keep-alive connections open, so that a client about to
# send its next request gets an answer instead of a reset.
IDLE_GRACE_SECONDS = 0.5
OVERDUE_CHECK_SECONDS = 0.5
# So long others are believed to wait for a connection after one was last seen to.
CROWD_SECONDS = OVERDUE_CHECK_SECONDS
DRAIN_CHECK_SECONDS = 0.02
# For the bodies of all requests at a time: a thousand clients may each send the largest one.
BODY_MEMORY_BYTES = 512 << 20


@dataclass(frozen=True)
class FrontEndSettings:
    """The limits of a front end.

    Attributes:
        threads: Pictures decoded at the same time.
        max_inside: Requests inside the whole server; more are refused.
        max_body_bytes: The longest request body.
        max_pixels: The largest picture that is decoded.
        max_batch: The largest batch of one forward pass.
        max_batch_predict: The largest ``batch_size`` of ``/batch_predict``.
        request_seconds: From a request's first byte to its last, and from there to its answer.
        api_key: What a client has to know for all but ``/health``; None: nothing.
    """

    threads: int
    max_inside: int
    max_body_bytes: int
    max_pixels: int
    max_batch: int
    max_batch_predict: int
    request_seconds: float
    api_key: str | None

    def as_dict(self) -> dict[str, float | str | None]:
        """Return the settings for a message to another process."""
        return asdict(self)


class FrontEnd:
    """Connections and their requests, on one event loop."""

    def __init__(
        self, index: int, block: SharedBlock, engine: Engine, settings: FrontEndSettings
    ) -> None:
        """Prepare; ``run`` answers.

        Args:
            index: Which front end of ``block`` this is.
            block: The memory of the whole server.
            engine: The way to the GPU process.
            settings: See ``FrontEndSettings``.
        """
        self.loop = asyncio.new_event_loop()
        self._region = block.front_ends[index]
        self._crowded_seconds = block.engine.crowded_seconds
        self._limits = HttpLimits(settings.max_body_bytes, settings.request_seconds)
        self._memory = BodyMemory(max(BODY_MEMORY_BYTES, 2 * settings.max_body_bytes))
        self._connections: set[HttpProtocol] = set()
        self._adopting = 0
        self._drain_started_seconds: float | None = None
        self._drain_end_seconds = float("inf")
        call_soon = self.loop.call_soon_threadsafe
        self._service = ImageService(
            block, self._region, engine,
            threads=settings.threads, max_inside=settings.max_inside,
            max_pixels=settings.max_pixels, answer_seconds=settings.request_seconds,
            call_soon=call_soon,
        )  # fmt: skip
        self._application = Application(
            self._service, StatsWriter(self._region), ServerStats(block),
            max_batch=settings.max_batch, max_batch_predict=settings.max_batch_predict,
            max_body_bytes=settings.max_body_bytes, api_key=settings.api_key,
            call_soon=call_soon,
        )  # fmt: skip

    def run(self) -> None:
        """Answer until a drain is over."""
        asyncio.set_event_loop(self.loop)
        self._end_overdue()
        self.loop.run_forever()
        # The connections that were cut tell so once more.
        self.loop.run_until_complete(asyncio.sleep(0))

    # On the event loop's thread; another thread goes through ``loop.call_soon_threadsafe``.

    def adopt(self, connection: socket.socket) -> None:
        """Serve an accepted connection."""
        self._adopting += 1
        self.loop.create_task(self._adopt(connection))

    def set_state(self, state: ServerState) -> None:
        """Take what the GPU process tells."""
        self._application.state = state

    def answered(self, results: Iterable[tuple[int, int]]) -> None:
        """Take the slots whose work is over, each with its ``Outcome``."""
        self._service.answered(results)

    def begin_drain(self, timeout_seconds: float) -> None:
        """Answer what has arrived, then let ``run`` end, after ``timeout_seconds`` at the most."""
        if self._drain_started_seconds is None:
            self._drain_started_seconds = time.monotonic()
            self._drain_end_seconds = self._drain_started_seconds + timeout_seconds
            self._continue_drain()

    async def _adopt(self, connection: socket.socket) -> None:
        protocol = HttpProtocol(self._limits, self._memory, self._application.handle, self._forget)
        try:
            await self.loop.connect_accepted_socket(lambda: protocol, connection)
        except OSError:
            # It was gone before it was here.
            connection.close()
            self._region.gauges[FrontEndRegion.CLOSED] += 1
        else:
            if not protocol.lost:
                self._connections.add(protocol)
        finally:
            self._adopting -= 1

    def _forget(self, protocol: HttpProtocol) -> None:
        self._connections.discard(protocol)
        self._region.gauges[FrontEndRegion.CLOSED] += 1

    def _end_overdue(self) -> None:
        now = time.monotonic()
        self._region.seen_seconds[0] = now
        # Whoever sends too slowly holds up a shutdown as it holds up others.
        crowded = (
            now - float(self._crowded_seconds[0]) < CROWD_SECONDS
            or self._drain_started_seconds is not None
        )
        for protocol in list(self._connections):
            protocol.end_if_overdue(now, crowded)
        self._service.end_overdue(now)
        self.loop.call_later(OVERDUE_CHECK_SECONDS, self._end_overdue)

    def _continue_drain(self) -> None:
        now = time.monotonic()
        for protocol in self._connections:
            protocol.close_after_answers()
        in_grace = now < self._drain_started_seconds + IDLE_GRACE_SECONDS and self._connections
        busy = sum(protocol.busy for protocol in self._connections) + self._adopting
        if now < self._drain_end_seconds and (busy or in_grace):
            self.loop.call_later(DRAIN_CHECK_SECONDS, self._continue_drain)
            return
        self._region.gauges[FrontEndRegion.CUT_OFF] = busy
        for protocol in self._connections:
            protocol.end()
        self.loop.stop()
