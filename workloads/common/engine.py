"""The execution engines: one step launched eagerly, as a CUDA graph, or compiled into a graph.

An eager step of a small model on a fast GPU is bound by Python, and then every sharing mode
looks alike (measured on an H100: four eager ResNet50 trainings reach 22.8k img/s under time
slicing and 21.7k under MPS, the same trainings with a captured step 32.0k and 62.4k). So a whole
training step is one graph replay: data selection, augmentation, forward, backward, optimizer.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

from workloads.common import torch
from workloads.common.device import ComputeDevice

if TYPE_CHECKING:
    import numpy as np
    from torch.cuda import _POOL_HANDLE as PoolHandle

    from workloads.common.client import Recorder, StepTimes

T = TypeVar("T")

WARM_UP_STEPS = 3
PIPELINE_DEPTH = 4


class TrainState:
    """A copy of everything that a training step changes, to start a job again from the same state.

    Restoring happens in place, since a captured graph holds the addresses of these tensors.
    Optimizer tensors that did not exist yet are filled with zeros, which is how SGD's momentum
    and AdamW's moments and step count start.
    """

    def __init__(
        self,
        modules: Iterable[torch.nn.Module],
        optimizer: torch.optim.Optimizer,
        extra_tensors: Sequence[torch.Tensor] = (),
    ) -> None:
        """Copy parameters and buffers of ``modules``, ``extra_tensors`` and the random state."""
        self._optimizer = optimizer
        model_tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        self._live = [*model_tensors, *extra_tensors]
        self._saved = [tensor.detach().clone() for tensor in self._live]
        self._cpu_rng = torch.get_rng_state()
        self._cuda_rng = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        """Put the saved state back, in place."""
        with torch.no_grad():
            for live, saved in zip(self._live, self._saved, strict=True):
                live.copy_(saved)
            for state in self._optimizer.state.values():
                for value in state.values():
                    if isinstance(value, torch.Tensor):
                        value.zero_()
        torch.set_rng_state(self._cpu_rng)
        if self._cuda_rng is not None:
            torch.cuda.set_rng_state(self._cuda_rng)


class EpochTotals:
    """Loss and correct answers of an epoch; adding is device work that a CUDA graph can hold."""

    def __init__(self, device: torch.device) -> None:
        self.loss_sum = torch.zeros((), device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What a repeated job has to start from again."""
        return self.loss_sum, self.correct

    def add(self, logits: torch.Tensor, labels: torch.Tensor, loss: torch.Tensor) -> None:
        """Add one batch: logits (batch, classes), labels (batch,) of int64, its mean loss."""
        self.loss_sum.add_(loss.float() * len(labels))
        self.correct.add_((logits.argmax(dim=1) == labels).sum())

    def take(self, samples: int) -> tuple[float, float]:
        """Return mean loss and accuracy in percent over ``samples``, and start again at zero."""
        # One copy, so one wait for the device.
        loss, correct = torch.stack((self.loss_sum.double(), self.correct.double())).tolist()
        self.loss_sum.zero_()
        self.correct.zero_()
        return loss / samples, 100 * correct / samples


def compile_module(device: ComputeDevice, module: torch.nn.Module) -> torch.nn.Module:
    """Return ``module`` compiled by torch.compile under ``--engine compile``, else unchanged.

    What was compiled once is taken from Inductor's cache on disk (TORCHINDUCTOR_CACHE_DIR). Fill it
    on an idle GPU: Inductor chooses among kernels by timing them.
    """
    if device.engine != "compile":
        return module
    # Each shape gets code of its own. By default the second shape that a module meets (a test
    # batch, then a training batch) is compiled for any size, and that code ran as slow as an
    # uncompiled graph on an H100, or was refused for the order of its strides.
    return cast("torch.nn.Module", torch.compile(module, dynamic=False))


def step_pool(device: ComputeDevice) -> PoolHandle | None:
    """Return memory for the captured steps of one job to share; None where nothing is captured.

    Steps run one after the other on one stream and hand nothing on but through tensors allocated
    before their capture, so a training step, a smaller one and a test step need the memory of the
    largest, not of all. It belongs to the job and not to the process: PyTorch refuses a pool whose
    graphs have all been freed, and a capture that fails leaves the GPU's random numbers unusable.
    """
    if device.engine == "eager":
        return None
    return torch.cuda.graph_pool_handle()


def prepare_step(
    device: ComputeDevice,
    step: Callable[[], None],
    restore: Callable[[], None] = lambda: None,
    pool: PoolHandle | None = None,
) -> Callable[[], None]:
    """Return the callable that launches ``step`` once under the device's engine.

    ``step`` reads and writes fixed tensors only and never synchronizes; a capture runs it, and then
    ``restore`` puts back what it has changed. ``pool`` is shared with other steps of the job.
    """
    if device.engine == "eager":
        return step
    replay = _capture(step, pool)
    restore()
    device.synchronize()
    return replay


def capture_forward(device: ComputeDevice, forward: Callable[[], T]) -> Callable[[], T]:
    """Return a callable that runs ``forward`` under the engine and returns what it returns.

    ``forward`` reads fixed input tensors, and runs a few times here. Under a graph its output is
    one static tensor that each call overwrites.
    """
    guarded = torch.inference_mode()(forward)
    if device.engine == "eager":
        guarded()
        replay = guarded
    else:
        replay = _capture(guarded)
    device.synchronize()
    return replay


def _capture(work: Callable[[], T], pool: PoolHandle | None = None) -> Callable[[], T]:
    """Capture ``work`` as one CUDA graph; each call of the result replays it.

    The result returns what ``work`` returned at the capture: tensors that each replay overwrites.
    """
    # Lazy optimizer state, workspaces and kernel loading must be over before the capture; PyTorch
    # asks for a side stream for that.
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(WARM_UP_STEPS):
            work()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    # A graph of another job that the collector frees meanwhile would end this capture.
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool):
            output = work()
    finally:
        if collects:
            gc.enable()

    # The graph holds addresses only: whoever keeps the replay must keep what the work refers to.
    def replay(captured_work: object = work) -> T:
        graph.replay()
        return output

    return replay


class Pacer:
    """Launches steps without waiting for each, and still records when each one was done.

    Before more than ``PIPELINE_DEPTH`` steps are in flight, the oldest is waited for (sleeping, not
    spinning: other clients need the cores) and the moment it was seen complete is its end. So the
    GPU never runs dry and a stop takes effect within a few steps. Where the host launches more
    slowly than the GPU works, a step has ended long before anybody looks; then the GPU's own clock
    says when, so that the time of a launch is that of the step launched.
    """

    def __init__(self, device: ComputeDevice, recorder: Recorder | StepTimes) -> None:
        self._device = device
        self._recorder = recorder
        self._in_flight: deque[tuple[str, torch.cuda.Event]] = deque()
        # From the first step on: the end of the step before, and the event that it was seen by.
        self._has_begun = False
        self._previous_end_seconds: float
        self._previous_done: torch.cuda.Event

    def run(self, kind: str, step: Callable[[], object]) -> None:
        """Launch one step of ``kind``.

        Raises:
            StopRequested: The suite asked to stop; the steps in flight have been finished.
        """
        if self._recorder.stop_requested:
            self.drain()
            self._recorder.check_stop()
        if not self._has_begun:
            self._has_begun = True
            self._previous_end_seconds = time.monotonic()
            if self._device.is_cuda:
                self._previous_done = self._record()
        step()
        if not self._device.is_cuda:
            self._book(kind, time.monotonic())
            return
        self._in_flight.append((kind, self._record()))
        if len(self._in_flight) >= PIPELINE_DEPTH:
            self._finish_oldest()

    def drain(self) -> None:
        """Wait for the steps in flight; the time until the next ``run`` belongs to no step."""
        while self._in_flight:
            self._finish_oldest()
        self._has_begun = False

    @staticmethod
    def _record() -> torch.cuda.Event:
        event = torch.cuda.Event(blocking=True, enable_timing=True)
        event.record()
        return event

    def _finish_oldest(self) -> None:
        kind, done = self._in_flight.popleft()
        was_late = done.query()
        done.synchronize()
        end_seconds = time.monotonic()
        if was_late:
            took_seconds = self._previous_done.elapsed_time(done) / 1e3
            end_seconds = min(end_seconds, self._previous_end_seconds + took_seconds)
        self._previous_done = done
        self._book(kind, end_seconds)

    def _book(self, kind: str, end_seconds: float) -> None:
        self._recorder.unit(kind, self._previous_end_seconds, end_seconds)
        self._previous_end_seconds = end_seconds


class Batches:
    """A split in batches.

    A cursor on the device moves along the order of an epoch, so that taking a batch is device work
    only and can be part of a CUDA graph.

    Attributes:
        placement: ``resident`` (the whole split lies on the device) or ``streamed``.
        samples: How many images or texts there are.
        batch_size: How many a full batch has; no more than there are samples.
        cursor: int64 scalar on the device: where in the order the next batch begins.
    """

    placement = "resident"

    def __init__(
        self, device: ComputeDevice, labels: Sequence[int] | np.ndarray, batch_size: int
    ) -> None:
        where = device.torch_device
        self.samples = len(labels)
        self.batch_size = min(batch_size, self.samples)
        self._labels = torch.tensor(labels, dtype=torch.int64, device=where)
        self.cursor = torch.zeros((), dtype=torch.int64, device=where)

    def restart(self) -> None:
        """Return to the state before the first epoch."""
        self.cursor.zero_()

    def start_epoch(self, epoch: int = 0) -> None:
        """Go to the first batch of ``epoch`` (from 0)."""
        raise NotImplementedError

    def start_rehearsal(self) -> None:
        """Begin an epoch of which one full batch and the smaller rest are taken."""
        self.start_epoch()

    def take(self, count: int) -> tuple[torch.Tensor, ...]:
        """Return inputs and, last, labels of the next batch; device work only."""
        raise NotImplementedError

    def feed(self, count: int) -> None:
        """Bring the next ``count`` samples to where ``take`` finds them; before every step."""

    def close(self) -> None:
        """End the threads that decode, if there are any."""


class Pass:
    """One way through a split: its full batches, then what is left as a smaller one."""

    def __init__(
        self,
        device: ComputeDevice,
        kind: str,
        batches: Batches,
        step: Callable[[int], None],
        restore: Callable[[], None],
        pool: PoolHandle | None,
    ) -> None:
        """Prepare ``step``, which takes the size of its batch, for both sizes.

        ``kind`` names the unit of work; ``_partial`` is added for the smaller batch.
        """
        self.batches = batches
        self.full_batches, rest = divmod(batches.samples, batches.batch_size)
        self._kind, self._rest = kind, rest
        self.full_step = prepare_step(device, lambda: step(batches.batch_size), restore, pool)
        if rest:
            self._partial = prepare_step(device, lambda: step(rest), restore, pool)

    def run(
        self,
        pacer: Pacer,
        totals: EpochTotals,
        epoch: int = 0,
        advance: Callable[[], None] = lambda: None,
    ) -> tuple[float, float, float]:
        """Launch every batch of epoch ``epoch``'s order, ``advance`` after each.

        Returns:
            Mean loss, accuracy in percent and seconds.
        """
        start_seconds = time.monotonic()
        self.batches.start_epoch(epoch)
        self._launch(pacer, self.full_batches, advance)
        loss, accuracy = totals.take(self.batches.samples)
        return loss, accuracy, time.monotonic() - start_seconds

    def rehearse(self, pacer: Pacer, totals: EpochTotals) -> None:
        """Go once through everything that ``run`` goes through, with one full batch."""
        self.batches.start_rehearsal()
        self._launch(pacer, 1, lambda: None)
        totals.take(self.batches.samples)

    def _launch(self, pacer: Pacer, full_batches: int, advance: Callable[[], None]) -> None:
        for _ in range(full_batches):
            self.batches.feed(self.batches.batch_size)
            pacer.run(self._kind, self.full_step)
            advance()
        if self._rest:
            self.batches.feed(self._rest)
            pacer.run(f"{self._kind}_partial", self._partial)
            advance()
        pacer.drain()
