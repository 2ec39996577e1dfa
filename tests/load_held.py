"""Holds a load on the inference server for long, beside a chaos client, and looks at what it costs.

    python3 tests/load_held.py --requests 20000 --stub                       # no model, the CPU
    python3 tests/load_held.py --requests 200000 --workers 8 --device cuda   # a GPU

1. The server starts, with the smallest model unless another is named.
2. A closed loop of clients warms it up, round after round, until its memory stays as it is, and
   measures its capacity; the chaos client (chaos_client.py) is there already, because what it
   costs is no part of the capacity for others.
3. A Poisson stream of 80 % of that (the load test's own generator) beside the chaos client. In a
   lead-in the generator opens its connections, and the server a thread for each: a failure there
   counts, but its tail and its memory are not those of the load that is held.
4. SIGTERM while a closed loop of clients sends all it can, beside the chaos client too.

Bounds: held_load_bounds.py. Ends with 1 where one is not kept, naming it; the server's log is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

TESTS = Path(__file__).resolve().parent
PROJECT_ROOT = TESTS.parent
sys.path[:0] = [str(PROJECT_ROOT), str(TESTS)]


from workloads.common.cli import non_negative_int, positive_float, positive_int  # noqa: E402

if TYPE_CHECKING:
    from server_figures import Figures
    from server_process import ServerProcess

    from benchmarking.hardware.nvml import Gpu
    from workloads.inference.load_generator import Measured

LOAD_SHARE = 0.8
CLIENTS_PER_WORKER = 16
# As the load test's own default; more are opened only while all are busy.
MAX_CONNECTIONS = 256
TIMEOUT_SECONDS = 30.0
DRAIN_SECONDS = 30.0
DRAIN_CLIENTS = 16
LOADED_SECONDS_BEFORE_SIGTERM = 1.0
MIN_ROUNDS, MAX_ROUNDS = 2, 8
STEADY_PERCENT = 0.5
EXIT_BROKEN, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag, kind, default, text in (
        ("--requests", positive_int, 20000, "under the steady load"),
        ("--seed", non_negative_int, 1, "of the pictures, the arrivals and the chaos"),
        ("--workers", positive_int, 2, "the server's own flag"),
        ("--chaos-rate", positive_float, 10.0, "hostile requests a second"),
        ("--round-seconds", positive_float, 5.0, "length of a round of the warm-up"),
        ("--lead-in-seconds", positive_float, 5.0, "of the same load, before the judged requests"),
    ):
        help_text = f"{text} (default: {default:g})"
        parser.add_argument(flag, type=kind, default=default, metavar="N", help=help_text)
    parser.add_argument("--stub", action="store_true", help="serve a stub instead of a model")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--model", default="resnet18", help="default: resnet18")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    # Not at the end: by then the load has been held for nothing.
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no such folder; create it first")
    return options


class ServerEndedError(AssertionError):
    """The server ended by itself under the load."""


class Chaos:
    """Chaos clients as processes, one after another, and their reports in sum."""

    def __init__(self, port: int, rate: float, seed: int) -> None:
        self.attacks = 0
        self.slow_senders = 0
        self._process: subprocess.Popen[str] | None = None
        self.answers: dict[str, Counter[str]] = {}
        self.faults: list[str] = []
        self._command = [
            sys.executable, str(TESTS / "chaos_client.py"), "--port", str(port),
            "--rate", str(rate), "--seed", str(seed),
        ]  # fmt: skip

    @contextmanager
    def running(self) -> Iterator[None]:
        """One of them, as long as the block lasts; it ends in peace after it."""
        # Ctrl-C is ours: the end of its standard input is what ends it.
        self._process = process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield
            report = json.loads(process.communicate(timeout=2 * TIMEOUT_SECONDS)[0])
        finally:
            process.kill()
            process.wait()
        self.attacks += report["attacks"]
        self.slow_senders += report["slow_senders"]
        self.faults += report["faults"]
        for kind, answers in report["answers"].items():
            self.answers.setdefault(kind, Counter()).update(answers)

    def expect_end(self) -> None:
        """Tell the one that runs that the server is about to be told to stop."""
        from chaos_client import ENDING

        self._process.stdin.write(ENDING + "\n")
        self._process.stdin.flush()


class Soak:
    """One server, one load."""

    def __init__(self, options: argparse.Namespace, server: ServerProcess, gpu: Gpu | None) -> None:
        self.options, self.server, self.gpu = options, server, gpu
        self.chaos = Chaos(server.port, options.chaos_rate, options.seed)
        self.clients = CLIENTS_PER_WORKER * options.workers
        self.rounds: list[tuple[float, float]] = []

    def _run(
        self, clients: int, duration_seconds: float, rate: float | None = None,
        offsets: list[float] | None = None,
    ) -> tuple[Measured, list[Figures]]:  # fmt: skip
        """Run the load test's generator: a closed loop, or sends at ``offsets`` in seconds."""
        from server_figures import Watch

        from workloads.inference import load_generator

        images = load_generator.encode_images(16, self.options.seed)
        plan = load_generator.LoadPlan(
            url=f"{self.server.url}/predict", headers={"Content-Type": "image/jpeg"},
            bodies=images, clients=clients, duration_seconds=duration_seconds,
            connections=clients if rate is None else max(clients, MAX_CONNECTIONS),
            timeout_seconds=TIMEOUT_SECONDS, offsets=offsets,
        )  # fmt: skip
        processes = load_generator.default_processes(clients, rate)
        generator = load_generator.LoadGenerator(plan, processes)
        try:
            generator.wait_until_prepared()
            watch = Watch(self.server.process.pid, self._gpu_memory_mib)
            generator.begin()
            while generator.running:
                generator.collect(0.5)
            samples = watch.stop()
        finally:
            generator.close()
        if watch.failure or self.server.process.poll() is not None:
            raise ServerEndedError("the server ended by itself under the load; its log says why")
        return load_generator.Measured.together(generator.reports), samples

    def _gpu_memory_mib(self) -> float | None:
        return self.gpu.read_state()["memory_used_mib"] if self.gpu is not None else None

    def capacity(self) -> float:
        """Warm up until memory is steady; return the requests a second of the last rounds."""
        seconds = self.options.round_seconds
        with self.chaos.running():
            # The server keeps what it has made for each picture that was there at one time.
            self._run(max(self.clients, MAX_CONNECTIONS), seconds)
            while len(self.rounds) < MAX_ROUNDS and not self._steady():
                measured, samples = self._run(self.clients, seconds)
                answered = (measured.requests["failure"] == "").sum()
                resident = [sample.resident_mib for sample in samples]
                self.rounds.append((answered / seconds, statistics.median(resident)))
        return statistics.mean(rate for rate, _ in self.rounds[-2:])

    def _steady(self) -> bool:
        if len(self.rounds) < MIN_ROUNDS:
            return False
        (_, before), (_, now) = self.rounds[-2:]
        return abs(now - before) < before * STEADY_PERCENT / 100

    def offer(self, rate: float) -> tuple[Measured, list[Figures]]:
        """Send the lead-in and then all requests, ``rate`` a second, beside the chaos client."""
        from workloads.inference.load_generator import arrival_offsets

        count = self.options.requests + self.lead_in_requests(rate)
        # Ten standard deviations longer than the mean: never too few.
        enough_seconds = (count + 10 * count**0.5 + 10) / rate
        offsets = arrival_offsets(rate, "poisson", enough_seconds, self.options.seed)[:count]
        with self.chaos.running():
            return self._run(self.clients, float(offsets[-1]) + 0.001, rate, offsets.tolist())

    def lead_in_requests(self, rate: float) -> int:
        return math.ceil(rate * self.options.lead_in_seconds)

    def terminate_under_load(self) -> dict:
        """Send SIGTERM to a server whose clients send all they can; return what became of them."""
        from closed_loop import ClosedLoop
        from server_process import jpeg

        with self.chaos.running():
            clients = ClosedLoop(self.server.url, jpeg(), DRAIN_CLIENTS)
            time.sleep(LOADED_SECONDS_BEFORE_SIGTERM)
            clients.expect_end()
            self.chaos.expect_end()
            begin = time.monotonic()
            self.server.process.terminate()
            code = self.server.process.wait(2 * DRAIN_SECONDS)
            seconds = time.monotonic() - begin
            clients.join()
        results = [json.loads(path.read_text())["figures"]
                   for path in self.server.results.glob("inference_server_*.json")]  # fmt: skip
        return {
            "drain_answers": dict(Counter(clients.answered)),
            "drain_lost": clients.lost,
            "drain_seconds": seconds,
            "drain_limit_seconds": DRAIN_SECONDS,
            "exit_code": code,
            "unanswered": results[0]["unanswered_requests"] if results else None,
        }


def _card_of(events: Path) -> Gpu | None:
    """Return the card that the server has named in its event log; None where it works on the CPU.

    Raises `AssertionError` where that card cannot be asked.
    """
    from waiting import wait_until

    from benchmarking.hardware.nvml import GpuNotFoundError, GpuUnusableError, open_gpu

    # It is told a moment after the word that this program waits for.
    wait_until(lambda: '"event": "ready"' in events.read_text(), "the server's identity")
    (ready,) = [line for line in events.read_text().splitlines() if '"event": "ready"' in line]
    uuid = json.loads(ready)["identity"]["gpu_uuid"]
    if uuid is None:
        return None
    try:
        return open_gpu(uuid)
    except (GpuNotFoundError, GpuUnusableError) as error:
        raise AssertionError(str(error)) from error


def hold(soak: Soak) -> tuple[dict, dict]:
    """Go through the phases; return the figures, and which bound was kept."""
    import numpy as np
    from held_load_bounds import HeldLoad, judged, p99_ms, quarter_medians, quarter_p99_ms
    from server_figures import figures_at_rest

    pid = soak.server.process.pid
    capacity = soak.capacity()
    before = figures_at_rest(pid)
    print(f"capacity {capacity:.1f} requests/s beside the chaos client, memory steady at "
          f"{soak.rounds[-1][1]:.0f} MiB after {len(soak.rounds)} rounds", flush=True)  # fmt: skip
    rate = LOAD_SHARE * capacity
    hostile, slow = soak.chaos.attacks, soak.chaos.slow_senders
    measured, samples = soak.offer(rate)
    hostile, slow = soak.chaos.attacks - hostile, soak.chaos.slow_senders - slow
    after = figures_at_rest(pid, before)
    failures = Counter(failure for failure in measured.requests["failure"] if failure)
    lead_in, table = np.split(measured.requests, [soak.lead_in_requests(rate)])
    held = [sample for sample in samples
            if sample.seconds >= samples[0].seconds + soak.options.lead_in_seconds]  # fmt: skip
    known = [sample for sample in held if sample.gpu_memory_mib is not None]
    run = HeldLoad(
        requests=len(table), failures=failures, chaos_faults=soak.chaos.faults,
        resident_mib=quarter_medians([(one.seconds, one.resident_mib) for one in held]),
        gpu_memory_mib=None if soak.gpu is None else quarter_medians(
            [(one.seconds, one.gpu_memory_mib) for one in known]
        ),
        p99_ms=quarter_p99_ms(table["end"] - table["intended"], table["failure"] == ""),
        threads=(before.threads, after.threads), open_files=(before.open_files, after.open_files),
        hostile_requests=hostile, slow_senders=slow, **soak.terminate_under_load(),
    )  # fmt: skip
    more = {
        "capacity_per_second": capacity, "offered_per_second": rate,
        "lead_in_requests": len(lead_in),
        "lead_in_p99_ms": p99_ms(lead_in["end"] - lead_in["intended"], lead_in["failure"] == ""),
        "load_seconds": float(table["end"][-1] - table["intended"][0]),
        "chaos_requests": soak.chaos.attacks, "chaos_answers": soak.chaos.answers,
    }  # fmt: skip
    return asdict(run) | more, judged(run)


def conclude(options: argparse.Namespace, figures: dict, bounds: dict[str, bool]) -> int:
    """Print all, write the file that was asked for, and return the exit code."""
    text = json.dumps(figures | {"bounds": bounds}, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")
    broken = [name for name, kept in bounds.items() if not kept]
    if broken:
        print("not kept: " + "; ".join(broken))
        return EXIT_BROKEN
    print(f"{figures['requests']} requests beside {figures['chaos_requests']} hostile ones, seed "
          f"{options.seed}: none failed, none lost, nothing piled up")  # fmt: skip
    return 0


def run(options: argparse.Namespace, folder: Path) -> int:
    """Hold the load; a server that cannot be started or ends by itself is a sentence."""
    from hostile_requests import LIMITS
    from server_process import SCRIPT, STUB, running

    flags = ("--model", options.model, "--device", options.device, "--workers",
             str(options.workers), "--drain-seconds", str(DRAIN_SECONDS),
             "--events", str(folder / "events.jsonl"))  # fmt: skip
    with ExitStack() as stack:
        try:
            script = STUB if options.stub else SCRIPT
            server = stack.enter_context(running(folder, *LIMITS, *flags, script=script))
            soak = Soak(options, server, _card_of(folder / "events.jsonl"))
        except AssertionError as error:
            reason = str(error).strip().splitlines()[-1]
            print(f"the server did not start: {reason}", file=sys.stderr)
            return EXIT_USAGE
        try:
            return conclude(options, *hold(soak))
        except ServerEndedError as error:
            print(f"not kept: {error}")
            return EXIT_BROKEN


def main() -> int:
    """Return 0 where every bound was kept."""
    options = parse_arguments()
    # Whoever ends this ends the server too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="load-held-"))
    try:
        code = run(options, folder)
    except KeyboardInterrupt:
        print("interrupted: the server is ended", file=sys.stderr)
        code = EXIT_INTERRUPTED
    if code == EXIT_BROKEN:
        print(f"kept: {folder}")
    else:
        shutil.rmtree(folder)
    return code


if __name__ == "__main__":
    sys.exit(main())
