"""Slots of pictures: who is let in, when a slot is free again, what happens to those who wait."""

from __future__ import annotations

import io
import queue
import threading
import time

import pytest
from PIL import Image
from server_process import jpeg

from workloads.inference import image_service
from workloads.inference.batcher import Outcome
from workloads.inference.image_input import is_large, small_array
from workloads.inference.image_service import ABANDON, ImageService, Refusal
from workloads.inference.shared_block import BlockShape, FrontEndRegion, SharedBlock


class Front:
    """A service whose event loop and engine are the test."""

    def __init__(self, max_inside: int = 2, slots: int = 2, max_pixels: int = 100_000) -> None:
        self.block = SharedBlock(BlockShape(front_ends=2, slots=slots, max_batch=4))
        self.region = self.block.front_ends[0]
        self.submitted: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self.calls: queue.SimpleQueue = queue.SimpleQueue()
        self.results: list = []
        self.service = ImageService(
            self.block, self.region, self, threads=1, max_inside=max_inside,
            max_pixels=max_pixels, answer_seconds=5.0, call_soon=lambda *call: self.calls.put(call),
        )  # fmt: skip

    def submit(self, slot: int, images: int) -> None:
        self.submitted.put((slot, images))

    def classify(self, content: bytes) -> None:
        self.service.classify("image/jpeg", content, time.monotonic(), self.results.append)

    def next_submitted(self) -> tuple[int, int]:
        return self.submitted.get(timeout=10)

    def run_next_call(self) -> None:
        function, *arguments = self.calls.get(timeout=10)
        function(*arguments)

    def gauge(self, index: int) -> int:
        return int(self.region.gauges[index])


def test_an_answer_has_the_outputs_and_the_times_of_its_slot():
    front = Front()
    front.classify(jpeg())
    slot, images = front.next_submitted()
    assert images == 0
    assert front.region.images[slot].any()
    assert front.gauge(FrontEndRegion.DECODING) == 0
    assert front.gauge(FrontEndRegion.INSIDE) == 1
    front.region.outputs[slot] = range(10)
    now = time.monotonic()
    front.region.timings[slot] = (now + 1.0, now + 1.5, 3)
    front.service.answered([(slot, Outcome.DONE)])
    (inference,) = front.results
    assert inference.outputs.tolist() == list(range(10))
    assert inference.gpu_seconds == pytest.approx(0.5)
    assert inference.wait_seconds == pytest.approx(1.0, abs=0.5)
    assert (inference.batch_images, inference.decode_seconds > 0) == (3, True)
    assert front.gauge(FrontEndRegion.INSIDE) == 0


def test_who_waits_too_long_is_refused_but_the_slot_stays_taken_until_the_device_let_go():
    front = Front()
    front.classify(jpeg())
    slot, _ = front.next_submitted()
    front.service.end_overdue(time.monotonic() + 4.0)
    assert front.results == []
    front.service.end_overdue(time.monotonic() + 6.0)
    assert front.results[0].status == 503
    assert front.next_submitted() == (slot, ABANDON)
    assert front.gauge(FrontEndRegion.INSIDE) == 1
    front.service.answered([(slot, Outcome.ABANDONED)])
    assert front.gauge(FrontEndRegion.INSIDE) == 0
    assert len(front.results) == 1


def test_the_bound_counts_the_requests_of_the_other_front_ends():
    front = Front(max_inside=2)
    front.block.front_ends[1].gauges[FrontEndRegion.INSIDE] = 1
    front.classify(jpeg())
    with pytest.raises(Refusal, match="try again") as refusal:
        front.classify(jpeg())
    assert refusal.value.status == 503
    front.block.front_ends[1].gauges[FrontEndRegion.INSIDE] = 0
    front.classify(jpeg())
    with pytest.raises(Refusal):  # No slot is left.
        front.classify(jpeg())


def test_large_pictures_keep_no_small_one_waiting(monkeypatch):
    free = threading.Event()

    def slow_when_large(opened):
        if is_large(opened):
            assert free.wait(10)
        return small_array(opened)

    monkeypatch.setattr(image_service, "small_array", slow_when_large)
    front = Front(slots=4, max_inside=4, max_pixels=10_000_000)
    file = io.BytesIO()
    Image.new("L", (2100, 2100)).save(file, "PNG")
    for _ in range(3):
        front.classify(file.getvalue())
    front.classify(jpeg())
    small, _ = front.next_submitted()
    assert front.gauge(FrontEndRegion.DECODING) == 0
    free.set()
    assert sorted([small, *[front.next_submitted()[0] for _ in range(3)]]) == [0, 1, 2, 3]


def test_a_picture_that_cannot_be_decoded_gives_its_slot_back():
    front = Front(max_inside=1)
    for content, status in ((b"no picture", 400), (jpeg(size=320), 413), (b"", 400)):
        front.classify(content)
        front.run_next_call()
        assert front.results.pop().status == status
    assert front.gauge(FrontEndRegion.INSIDE) == front.gauge(FrontEndRegion.DECODING) == 0


@pytest.mark.parametrize(
    ("outcome", "status"),
    [(Outcome.QUEUE_FULL, 503), (Outcome.CLOSED, 503), (Outcome.FAILED, 500)],
)
def test_work_that_was_not_done_is_an_error_of_the_server(outcome, status):
    front = Front()
    front.service.classify_synthetic(4, front.results.append)
    slot, images = front.next_submitted()
    assert images == 4
    front.service.answered([(slot, outcome)])
    assert front.results[0].status == status
