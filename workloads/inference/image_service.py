"""Takes pictures through decoding and the device, within the bounds of the whole server.

A request that is let in gets a slot: the place of its picture and of its answer in the memory that
the front end shares with the GPU process. Decoding threads fill slots and submit them; answers
come back by slot number. A slot is free again when its answer has come, also if nobody waits for
that any more: only then does the device read it no longer.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from PIL.Image import Image

from workloads.inference.batcher import Outcome
from workloads.inference.image_input import ImageRejected, is_large, open_image, small_array
from workloads.inference.shared_block import FrontEndRegion, SharedBlock
from workloads.inference.upload import BadUpload, find_image

Result = TypeVar("Result")
# A record of one submission: slot, then how many synthetic images (0: the slot's own picture).
ABANDON = 0xFFFFFFFF


class Engine(Protocol):
    """The way to the GPU process."""

    def submit(self, slot: int, images: int) -> None:
        """Queue the picture in ``slot``, or ``images`` synthetic ones; ABANDON gives it up.

        Any thread may call it. The answer comes through ``ImageService.answered``.
        """


class Refusal(Exception):
    """A request that gets no result.

    Attributes:
        status: The HTTP status to answer with.
    """

    def __init__(self, status: int, message: str) -> None:
        """Keep what is wrong, as one sentence for the client."""
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Inference:
    """One answer of the device.

    Attributes:
        outputs: float32 row of the picture: probabilities, then class indices.
        decode_seconds: Reading and scaling the picture.
        wait_seconds: Waiting for a decoding thread and for the device.
        gpu_seconds: The batch, from its copy to the device to its answer.
        batch_images: Images in that batch, its neighbors' included.
    """

    outputs: np.ndarray
    decode_seconds: float
    wait_seconds: float
    gpu_seconds: float
    batch_images: int


Answer = Callable[[Inference | Refusal], None]


class _Job:
    """One request inside; ``answer`` is taken away when it has been called."""

    __slots__ = ("answer", "begun_seconds", "queued_seconds", "since_seconds", "slot")

    def __init__(self, slot: int, answer: Answer, since_seconds: float) -> None:
        self.slot = slot
        self.answer: Answer | None = answer
        self.since_seconds = since_seconds
        self.begun_seconds = since_seconds
        self.queued_seconds = since_seconds


class ImageService:
    """Pictures in, answers out; everything but decoding happens on the event loop's thread."""

    def __init__(
        self,
        block: SharedBlock,
        region: FrontEndRegion,
        engine: Engine,
        *,
        threads: int,
        max_inside: int,
        max_pixels: int,
        answer_seconds: float,
        call_soon: Callable[..., None],
    ) -> None:
        """Start the decoding threads.

        Args:
            block: The memory of the whole server.
            region: This front end's part of it.
            engine: The way to the GPU process.
            threads: Pictures decoded at the same time.
            max_inside: Requests inside the whole server; more are refused.
            max_pixels: The largest picture that is decoded.
            answer_seconds: The longest that a request waits.
            call_soon: Runs a call on the event loop's thread.
        """
        self._block = block
        self._region = region
        self._engine = engine
        self._max_inside = max_inside
        self._max_pixels = max_pixels
        self._answer_seconds = answer_seconds
        self._call_soon = call_soon
        # The one that was used last comes first: its memory is still in the caches.
        self._free = list(range(block.shape.slots))
        self._jobs: dict[int, _Job] = {}
        self._uploads: queue.SimpleQueue[tuple[_Job, str, bytes]] = queue.SimpleQueue()
        self._decoding_lock = threading.Lock()
        self._large: queue.SimpleQueue[tuple[_Job, Image]] = queue.SimpleQueue()
        large_threads = 2 if len(block.front_ends) == 1 else 1
        for work in (*[self._decode_all] * threads, *[self._decode_all_large] * large_threads):
            threading.Thread(target=work, name="decode", daemon=True).start()

    def classify(
        self, content_type: str, body: bytes, since_seconds: float, answer: Answer
    ) -> None:
        """Decode the picture in an upload and classify it.

        Args:
            content_type: The request's header.
            body: The request's body.
            since_seconds: When the request was complete (CLOCK_MONOTONIC).
            answer: Called once, on the event loop's thread, with what became of it.

        Raises:
            Refusal: The server is full.
        """
        job = self._let_in(answer, since_seconds)
        self._count_decoding(1)
        self._uploads.put((job, content_type, body))

    def classify_synthetic(self, images: int, answer: Answer, *, first: bool = True) -> None:
        """Classify ``images`` synthetic pictures, at most one batch of them.

        Args:
            images: How many.
            answer: As of ``classify``.
            first: False for the next batch of a request that is inside already and was just
                answered: it keeps its place.

        Raises:
            Refusal: The server is full.
        """
        job = self._let_in(answer, time.monotonic(), always=not first)
        self._engine.submit(job.slot, images)

    def answered(self, results: Iterable[tuple[int, int]]) -> None:
        """Take back slots with their outcomes, and answer those who wait."""
        for slot, outcome in results:
            job = self._jobs[slot]
            result = self._result_of(job, Outcome(outcome))
            self._let_go(job)
            self._answer(job, result)

    def end_overdue(self, now: float) -> None:
        """Refuse those who have waited too long; their slots come back later."""
        for job in list(self._jobs.values()):
            if job.answer is not None and now - job.since_seconds > self._answer_seconds:
                message = f"no answer within {self._answer_seconds:g} s; try again later"
                self._answer(job, Refusal(503, message))
                # Without effect on one that is still being decoded.
                self._engine.submit(job.slot, ABANDON)

    def _let_in(self, answer: Answer, since_seconds: float, *, always: bool = False) -> _Job:
        inside = 0 if always else self._block.gauge(FrontEndRegion.INSIDE)
        if not self._free or inside >= self._max_inside:
            raise Refusal(503, "too many requests are waiting; try again in a moment")
        job = _Job(self._free.pop(), answer, since_seconds)
        self._jobs[job.slot] = job
        self._region.gauges[FrontEndRegion.INSIDE] = len(self._jobs)
        return job

    def _let_go(self, job: _Job) -> None:
        del self._jobs[job.slot]
        self._free.append(job.slot)
        self._region.gauges[FrontEndRegion.INSIDE] = len(self._jobs)

    @staticmethod
    def _answer(job: _Job, result: Inference | Refusal) -> None:
        answer, job.answer = job.answer, None
        if answer is not None:
            answer(result)

    def _result_of(self, job: _Job, outcome: Outcome) -> Inference | Refusal:
        if outcome is Outcome.DONE:
            started, ended, images = self._region.timings[job.slot].tolist()
            return Inference(
                outputs=self._region.outputs[job.slot].copy(),
                decode_seconds=job.queued_seconds - job.begun_seconds,
                wait_seconds=job.begun_seconds - job.since_seconds + started - job.queued_seconds,
                gpu_seconds=ended - started,
                batch_images=int(images),
            )
        if outcome is Outcome.QUEUE_FULL:
            return Refusal(503, "too many images are waiting; try again in a moment")
        if outcome is Outcome.CLOSED:
            return Refusal(503, "the server is shutting down")
        return Refusal(500, "the device failed; the server's log has the details")

    def _count_decoding(self, change: int) -> None:
        with self._decoding_lock:
            self._region.gauges[FrontEndRegion.DECODING] += change

    def _decode_all(self) -> None:
        while True:
            job, content_type, body = self._uploads.get()
            job.begun_seconds = time.monotonic()
            opened = _attempt(_open, content_type, body, self._max_pixels)
            large = not isinstance(opened, Refusal) and is_large(opened)
            refusal = None if large else self._decode(job, opened)
            # First: whoever takes the picture looks whether more are to be expected, and a large
            # one is not to be expected soon.
            self._count_decoding(-1)
            if large:
                self._large.put((job, opened))
            else:
                self._pass_on(job, refusal)

    def _decode_all_large(self) -> None:
        """Decode large pictures, so that they keep no small ones waiting and few are in memory."""
        while True:
            job, opened = self._large.get()
            self._pass_on(job, self._decode(job, opened))

    def _decode(self, job: _Job, opened: Image | Refusal) -> Refusal | None:
        """Decode a picture into its slot; return why not, if so."""
        if isinstance(opened, Refusal):
            return opened
        # Looked at before and after, since decoding may take long.
        picture = _attempt(small_array, opened) if job.answer is not None else None
        if isinstance(picture, Refusal):
            return picture
        if job.answer is None:
            return Refusal(503, "nobody waits for it")
        self._region.images[job.slot] = picture
        return None

    def _pass_on(self, job: _Job, refusal: Refusal | None) -> None:
        job.queued_seconds = time.monotonic()
        if refusal is None:
            self._engine.submit(job.slot, 0)
        else:
            self._call_soon(self._reject, job, refusal)

    def _reject(self, job: _Job, refusal: Refusal) -> None:
        self._let_go(job)
        self._answer(job, refusal)


def _open(content_type: str, body: bytes, max_pixels: int) -> Image:
    return open_image(find_image(content_type, body), max_pixels)


def _attempt(step: Callable[..., Result], *arguments: object) -> Result | Refusal:
    """Return what ``step`` returns, or the answer to whoever sent what it cannot take."""
    try:
        return step(*arguments)
    except BadUpload as error:
        return Refusal(400, str(error))
    except ImageRejected as error:
        return Refusal(error.status, str(error))
    # A decoding thread must outlive whatever happens: it is not started again.
    except Exception as error:
        logging.getLogger("inference_server").error("decoding failed", exc_info=error)
        return Refusal(500, "internal error; the server's log has the details")
