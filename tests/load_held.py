"""Holds a load on the inference server for long, next to a chaos client, and sees what it costs.

    python3 tests/load_held.py --requests 20000 --stub                       # no model, the CPU
    python3 tests/load_held.py --requests 200000 --workers 8 --device cuda   # a GPU

1. The server starts, with the smallest model unless another is named.
2. A closed loop of clients warms it up, round after round, until its memory stays as it is, and
   measures its capacity; the chaos client (server_clients.py) is there already, because what it
   costs is no part of the capacity for others.
3. A Poisson stream of 80 % of that (the load test's own generator) next to the chaos client. In a
   lead-in the generator opens its connections: a failure there counts, but its tail and its memory
   are not those of the load that is held.
4. SIGTERM while a closed loop of clients sends all it can, next to the chaos client too.

Bounds: `judged`. Ends with 1 where one is not kept, naming it; the server's log is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import numpy as np  # noqa: E402
from hostile_requests import LIMITS  # noqa: E402
from server_clients import ChaosProcess, ClosedLoop  # noqa: E402
from server_figures import Figures, Watch, figures_at_rest  # noqa: E402
from server_process import SCRIPT, STUB, ServerProcess, jpeg, running  # noqa: E402
from waiting import wait_until  # noqa: E402

from benchmarking.hardware import nvml  # noqa: E402
from workloads.common import cli  # noqa: E402
from workloads.inference import load_generator, load_requests  # noqa: E402

LOAD_SHARE = 0.8
CLIENTS_PER_WORKER = 16
MAX_CONNECTIONS = 256  # as the load test's own default; more are opened only while all are busy
DRAIN_SECONDS, DRAIN_CLIENTS = 30.0, 16
LOADED_SECONDS_BEFORE_SIGTERM = 1.0
MIN_ROUNDS, MAX_ROUNDS, STEADY_PERCENT = 2, 8, 0.5
EXIT_BROKEN, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
QUARTERS = 4
MEMORY_PERCENT = 2.0
P99_RATIO = 2.0  # bursts of a Poisson stream alone move the p99 of a quarter by a half


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = cli.flags(parser, "the load")
    flag("--requests", 20000, "under the steady load")
    flag("--seed", 1, "of the pictures, the arrivals and the chaos", type=cli.non_negative_int)
    flag("--workers", 2, "the server's own flag")
    flag("--chaos-rate", 10.0, "hostile requests a second")
    flag("--round-seconds", 5.0, "length of a round of the warm-up")
    flag("--lead-in-seconds", 5.0, "of the same load, before the judged requests")
    flag("--stub", False, "serve a stub instead of a model")
    flag("--device", "auto", "of the model", choices=("auto", "cpu", "cuda"))
    flag("--model", "resnet18", "the model")
    flag("--json", None, "write the figures there too", type=Path, metavar="FILE")
    options = parser.parse_args()
    # Not at the end: by then the load has been held for nothing.
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no such folder; create it first")
    return options


def _card_of(server: ServerProcess) -> nvml.Gpu | None:
    """Return the card that the server has named in its event log; None where it has none."""
    # It is told a moment after the word that a test waits for.
    path = server.results.parent / "events.jsonl"
    wait_until(lambda: '"event": "ready"' in path.read_text(), "the server's identity")
    (ready,) = [line for line in path.read_text().splitlines() if '"event": "ready"' in line]
    uuid = json.loads(ready)["identity"]["gpu_uuid"]
    return None if uuid is None else nvml.open_gpu(uuid)


class Soak:
    """One server, one load."""

    def __init__(self, options: argparse.Namespace, server: ServerProcess) -> None:
        self.options, self.server, self.pid = options, server, server.process.pid
        self.gpu = _card_of(server)
        self.chaos = ChaosProcess(server.port, options.chaos_rate, options.seed)
        self.clients = CLIENTS_PER_WORKER * options.workers

    def _run(
        self, clients: int, duration_seconds: float, rate: float | None = None,
        offsets: list[float] | None = None,
    ) -> tuple[np.ndarray, list[Figures]]:  # fmt: skip
        """Run the load test's generator: a closed loop, or sends at ``offsets`` in seconds."""
        images = load_requests.encode_images(16, self.options.seed)
        plan = load_generator.LoadPlan(
            url=f"{self.server.url}/predict", headers={"Content-Type": "image/jpeg"},
            bodies=images, clients=clients, duration_seconds=duration_seconds,
            connections=clients if rate is None else max(clients, MAX_CONNECTIONS),
            offsets=offsets,
        )  # fmt: skip
        processes = load_generator.default_processes(clients, rate)
        generator = load_generator.LoadGenerator(plan, processes)
        try:
            generator.wait_until_prepared()
            watch = Watch(self.pid, self.gpu_memory_mib)
            generator.begin()
            while generator.running:
                generator.collect(0.5)
            samples = watch.stop()
        finally:
            generator.close()
        assert self.server.process.poll() is None, "the server ended by itself under the load"
        return load_generator.Measured.together(generator.reports).requests, samples

    def gpu_memory_mib(self) -> float | None:
        return None if self.gpu is None else self.gpu.read_state()["memory_used_mib"]

    def capacity(self) -> tuple[float, int]:
        """Warm up until memory is steady; return the last requests a second, and the rounds."""
        seconds = self.options.round_seconds
        rounds: list[tuple[float, float]] = []
        with self.chaos.running():
            # The server keeps what it has made for each picture that was there at one time.
            self._run(max(self.clients, MAX_CONNECTIONS), seconds)
            while len(rounds) < MAX_ROUNDS:
                requests, samples = self._run(self.clients, seconds)
                resident_mib = statistics.median(sample.resident_mib for sample in samples)
                rounds.append(((requests["failure"] == "").sum() / seconds, resident_mib))
                before, now = rounds[-2:][0][1], rounds[-1][1]
                is_steady = abs(now - before) < before * STEADY_PERCENT / 100
                if len(rounds) >= MIN_ROUNDS and is_steady:
                    break
        return statistics.mean(rate for rate, _ in rounds[-2:]), len(rounds)

    def offer(self, rate: float, lead_in: int) -> tuple[np.ndarray, list[Figures]]:
        """Send the lead-in and then all requests, ``rate`` a second, next to the chaos client."""
        count = self.options.requests + lead_in
        # Ten standard deviations longer than the mean: never too few.
        enough_seconds = (count + 10 * count**0.5 + 10) / rate
        draw = load_requests.arrival_offsets
        offsets = draw(rate, "poisson", enough_seconds, self.options.seed)[:count]
        with self.chaos.running():
            return self._run(self.clients, float(offsets[-1]) + 0.001, rate, offsets.tolist())

    def terminate_under_load(self) -> dict:
        """Send SIGTERM to a server whose clients send all they can; return what became of them."""
        with self.chaos.running() as chaos:
            clients = ClosedLoop(self.server.url, jpeg(), DRAIN_CLIENTS)
            time.sleep(LOADED_SECONDS_BEFORE_SIGTERM)
            clients.expect_end()
            chaos.send("the end is near")
            chaos.recv()
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
            "exit_code": code,
            "unanswered": results[0]["unanswered_requests"] if results else None,
        }


def hold(soak: Soak) -> dict:
    """Go through the phases; return the figures, unknown ones as None."""
    capacity, rounds = soak.capacity()
    before = figures_at_rest(soak.pid)
    print(f"capacity {capacity:.1f} requests/s next to the chaos client, memory steady at "
          f"{before.resident_mib:.0f} MiB after {rounds} rounds", flush=True)  # fmt: skip
    rate, chaos = LOAD_SHARE * capacity, soak.chaos
    lead_in = math.ceil(rate * soak.options.lead_in_seconds)
    hostile, slow = chaos.answers.total(), chaos.slow_senders
    requests, samples = soak.offer(rate, lead_in)
    hostile, slow = chaos.answers.total() - hostile, chaos.slow_senders - slow
    after = figures_at_rest(soak.pid, before)
    led_in, held = np.split(requests, [lead_in])
    first_seconds = samples[0].seconds + soak.options.lead_in_seconds
    loaded = [one for one in samples if one.seconds >= first_seconds]
    card = [(one.seconds, one.gpu_memory_mib) for one in loaded if one.gpu_memory_mib is not None]
    return {
        "capacity_per_second": capacity,
        "offered_per_second": rate,
        "lead_in_requests": len(led_in),
        "lead_in_p99_ms": p99_ms(led_in),
        "requests": len(held),
        "load_seconds": float(held["end"][-1] - held["intended"][0]),
        "failures": dict(Counter(failure for failure in requests["failure"] if failure)),
        "hostile_requests": hostile,
        "slow_senders": slow,
        "resident_mib": quarter_medians([(one.seconds, one.resident_mib) for one in loaded]),
        "gpu_memory_mib": None if soak.gpu is None else quarter_medians(card),
        "p99_ms": [p99_ms(part) for part in np.array_split(held, QUARTERS)],
        "threads": (before.threads, after.threads),
        "open_files": (before.open_files, after.open_files),
        **soak.terminate_under_load(),
        "chaos_faults": chaos.faults,
        "chaos_requests": chaos.answers.total(),
        "chaos_answers": {str(status): times for status, times in chaos.answers.items()},
    }


def quarter_medians(samples: Sequence[tuple[float, float]]) -> list[float | None]:
    """Return the median value in each quarter of the time that samples (seconds, value) span."""
    if not len(samples):
        return [None] * QUARTERS
    seconds, values = np.transpose(samples)
    edges = np.linspace(seconds[0], seconds[-1], QUARTERS + 1)[1:-1]
    quarter = np.searchsorted(edges, seconds, side="right")
    parts = [values[quarter == index] for index in range(QUARTERS)]
    return [float(np.median(part)) if len(part) else None for part in parts]


def p99_ms(requests: np.ndarray) -> float | None:
    """Return the p99 of what was answered, in milliseconds; None where nothing was."""
    latency = (requests["end"] - requests["intended"])[requests["failure"] == ""]
    return float(np.percentile(latency, 99)) * 1e3 if len(latency) else None


def judged(run: dict) -> dict[str, bool]:
    """Return each bound by name and whether the run kept to it; what is unknown is not kept."""

    def is_steady(memory_mib: list[float | None]) -> bool:
        first, *_, last = memory_mib
        return None not in (first, last) and 100 * (last - first) < MEMORY_PERCENT * first

    p99 = run["p99_ms"]
    memory = {"memory": run["resident_mib"], "GPU memory": run["gpu_memory_mib"]}
    return {
        "no good request failed": run["requests"] > 0 and not run["failures"],
        "hostile requests were sent": run["hostile_requests"] > 0,
        "slow senders were there": run["slow_senders"] > 0,
        "every hostile request was answered rightly": not run["chaos_faults"],
        **{f"{name} grew by less than {MEMORY_PERCENT:g} %": is_steady(values)
           for name, values in memory.items() if values is not None},
        f"p99 stable within a factor of {P99_RATIO:g}":
            None not in p99 and max(p99) <= P99_RATIO * min(p99),
        "no more threads": run["threads"][1] <= run["threads"][0],
        "no more open files": run["open_files"][1] <= run["open_files"][0],
        "SIGTERM under load: every accepted request answered":
            set(run["drain_answers"]) == {200} and not run["drain_lost"] and run["unanswered"] == 0,
        "SIGTERM: ended in time with code 0":
            run["exit_code"] == 0 and run["drain_seconds"] <= DRAIN_SECONDS,
    }  # fmt: skip


def run(options: argparse.Namespace, folder: Path) -> int:
    """Hold the load and say what was kept; a server that cannot be started is a sentence."""
    flags = ("--model", options.model, "--device", options.device, "--workers",
             str(options.workers), "--drain-seconds", str(DRAIN_SECONDS),
             "--events", str(folder / "events.jsonl"))  # fmt: skip
    is_started = False
    try:
        with running(folder, *LIMITS, *flags, script=STUB if options.stub else SCRIPT) as server:
            is_started = True
            figures = hold(Soak(options, server))
    except AssertionError as error:
        reason = str(error).strip().splitlines()[-1]
        what = "not kept" if is_started else "the server did not start"
        print(f"{what}: {reason}", file=sys.stderr)
        return EXIT_BROKEN if is_started else EXIT_USAGE
    bounds = judged(figures)
    text = json.dumps(figures | {"bounds": bounds}, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")
    if not all(bounds.values()):
        print("not kept: " + "; ".join(name for name, kept in bounds.items() if not kept))
        return EXIT_BROKEN
    print(f"{figures['requests']} requests next to {figures['chaos_requests']} hostile ones, seed "
          f"{options.seed}: none failed, none lost, nothing piled up")  # fmt: skip
    return 0


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
