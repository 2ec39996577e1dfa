"""The execution engines: one step launched eagerly, as a CUDA graph, or compiled into a graph.

An eager step of a small model on a fast GPU is bound by Python, and then every sharing mode
looks alike (measured on an H100: four eager ResNet50 trainings reach 22.8k img/s under time
slicing and 21.7k under MPS, the same trainings with a captured step 32.0k and 62.4k). So a whole
training step is one graph replay: data selection, augmentation, forward, backward, optimizer.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from workloads.common.device import ComputeDevice

if TYPE_CHECKING:
    import torch

    from workloads.common.client import Recorder

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
        import torch

        self._torch = torch
        self._optimizer = optimizer
        model_tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        self._live = [*model_tensors, *extra_tensors]
        self._saved = [tensor.detach().clone() for tensor in self._live]
        self._cpu_rng = torch.get_rng_state()
        self._cuda_rng = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        """Put the saved state back, in place."""
        torch = self._torch
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


def compile_module(device: ComputeDevice, module: torch.nn.Module) -> torch.nn.Module:
    """Return ``module`` compiled by torch.compile under ``--engine compile``, else unchanged.

    What was compiled once is taken from Inductor's cache on disk (TORCHINDUCTOR_CACHE_DIR). Fill it
    on an idle GPU: Inductor chooses among kernels by timing them.
    """
    if device.engine != "compile":
        return module
    import torch

    # Each shape gets code of its own. By default the second shape that a module meets (a test
    # batch, then a training batch) is compiled for any size, and that code ran as slow as an
    # uncompiled graph on an H100, or was refused for the order of its strides.
    return torch.compile(module, dynamic=False)


def prepare_step(
    device: ComputeDevice, step: Callable[[], None], restore: Callable[[], None]
) -> Callable[[], None]:
    """Return the callable that launches ``step`` once under the device's engine.

    Args:
        device: The opened device; its engine decides.
        step: Reads and writes fixed tensors only and never synchronizes; runs a few times here.
        restore: Puts the state that ``step`` changes back to where it was.
    """
    if device.engine == "eager":
        step()
        device.synchronize()
        restore()
        return step
    replay = _capture(step, _step_pool())
    restore()
    device.synchronize()
    return replay


def capture_forward(
    device: ComputeDevice, forward: Callable[[], T], stream: torch.cuda.Stream | None = None
) -> Callable[[], T]:
    """Return a callable that runs ``forward`` under the engine and returns what it returns.

    Under a graph its output is one static tensor that each call overwrites.

    Args:
        device: The opened device; its engine decides.
        forward: Reads fixed input tensors; runs a few times here.
        stream: What the caller replays it on, where that is not the default stream. Graphs of one
            stream take turns, so they share their memory; those of two may run at the same time.
    """
    import torch

    guarded = torch.inference_mode()(forward)
    if device.engine == "eager":
        guarded()
        device.synchronize()
        return guarded
    replay = _capture(guarded, _stream_pool(stream) if stream else None, stream)
    device.synchronize()
    return replay


@functools.cache
def _step_pool() -> tuple[int, int]:
    """Return the memory that all captured steps of this process share.

    Steps run one after the other on one stream and hand nothing on but through tensors allocated
    before their capture, so a training step, a smaller one and a test step need the memory of the
    largest, not of all.
    """
    import torch

    return torch.cuda.graph_pool_handle()


@functools.cache
def _stream_pool(stream: torch.cuda.Stream) -> tuple[int, int]:
    """Return the memory that all graphs of one stream share."""
    import torch

    return torch.cuda.graph_pool_handle()


def _capture(
    work: Callable[[], T],
    pool: tuple[int, int] | None = None,
    stream: torch.cuda.Stream | None = None,
) -> Callable[[], T]:
    """Capture ``work`` as one CUDA graph; each call of the result replays it.

    The result returns what ``work`` returned at the capture: tensors that each replay overwrites.
    ``pool`` is the graph's memory, its own where there is none. ``stream`` is captured on: cuBLAS
    has one workspace a stream, and graphs that run at the same time must not share it.
    """
    import torch

    # Lazy optimizer state, workspaces and kernel loading must be over before the capture; PyTorch
    # asks for a side stream for that.
    side_stream = stream or torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(WARM_UP_STEPS):
            work()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        output = work()

    def replay() -> T:
        graph.replay()
        return output

    # The graph holds addresses only: whoever keeps the replay must keep what the work refers to.
    replay.captured_work = work
    return replay


class Pacer:
    """Launches steps without waiting for each, and still records when each one was done.

    At most ``depth`` steps are in flight: before another is launched, the oldest is waited for
    (sleeping, not spinning: other clients need the cores) and the moment it was seen complete is
    its end. So the GPU never runs dry and a stop takes effect within ``depth`` steps.
    """

    def __init__(
        self, device: ComputeDevice, recorder: Recorder, depth: int = PIPELINE_DEPTH
    ) -> None:
        """Record the steps of ``device`` with ``recorder``."""
        self._device = device
        self._recorder = recorder
        self._depth = depth
        self._in_flight: deque[tuple[str, torch.cuda.Event]] = deque()
        self._previous_end_seconds: float | None = None

    def run(self, kind: str, step: Callable[[], None]) -> None:
        """Launch one step of ``kind``.

        Raises:
            StopRequested: The suite asked to stop; the steps in flight have been finished.
        """
        if self._recorder.stop_requested:
            self.drain()
            self._recorder.check_stop()
        if self._previous_end_seconds is None:
            self._previous_end_seconds = time.monotonic()
        step()
        if not self._device.is_cuda:
            self._finish(kind)
            return
        import torch

        done = torch.cuda.Event(blocking=True)
        done.record()
        self._in_flight.append((kind, done))
        if len(self._in_flight) >= self._depth:
            self._finish_oldest()

    def drain(self) -> None:
        """Wait for the steps in flight; the time until the next ``run`` belongs to no step."""
        while self._in_flight:
            self._finish_oldest()
        self._previous_end_seconds = None

    def _finish_oldest(self) -> None:
        kind, done = self._in_flight.popleft()
        done.synchronize()
        self._finish(kind)

    def _finish(self, kind: str) -> None:
        end_seconds = time.monotonic()
        self._recorder.unit(kind, self._previous_end_seconds, end_seconds)
        self._previous_end_seconds = end_seconds
