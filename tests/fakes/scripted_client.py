"""A client that speaks the suite's client contract, needs no torch, and does as it is told.

Settings are JSON in the environment variable SCRIPTED_CLIENT: a list of
`{"match": GLOB, ...settings}`; those whose glob matches `<script name>:<co-run>/<client>` count,
later ones win. The script may be copied under any name to stand in for a workload. Its identity
holds the `--client-index` that it was given.

    unit_seconds    length of a unit (0.01)
    units           units a job (5)
    latency         whether units are response times (false)
    load_seconds    length of loading (0)
    fail            "oom", "error", "crash", "exit0", "done", "hang", "signal", "garbage", "binary"
    error           further fields of the error event of "oom" and "error"
    exit_code       exit code after "error" (1)
    fail_at         "load", "warm" or seconds after go (0)
    ignore_stop     go on when told to stop (false)
    ignore_term     ignore SIGTERM too (false)
    slow_stop       seconds between stop and done (0)
    spawn           start a helper that outlives the client, "with it" or "in a group of its own"
    identity        fields that replace those of the identity
    figures         figures of each job
    figures_once    figures of each job unless `--cell-repeats` was given
    hidden          the driver does not list this client (false)
    without_mps     the client does not reach the MPS daemon that it was given (false)
    resolve_exit    exit code of `--resolve` (0)
    resolve_arguments  flags that `--resolve` answers with (`--resolved yes`)
    resolve_notes   notes that `--resolve` answers with
    git_commit      the project's commit, as `--resolve` tells it

With NVML_STUB_STATE in the environment (see `nvml_stub.py`) a ready client adds its pid to the
scripted card's processes, and to the MPS clients too where CUDA_MPS_PIPE_DIRECTORY holds a file
`running`, which stands for a daemon's list of clients.
"""

from __future__ import annotations

import atexit
import fcntl
import fnmatch
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def value_of(flag: str, default: str | None = None) -> str | None:
    """Value behind the last occurrence of a flag."""
    if flag not in sys.argv:
        return default
    return sys.argv[len(sys.argv) - sys.argv[::-1].index(flag)]


def settings(events: Path | None) -> dict:
    """Settings that are meant for this client."""
    place = f"{events.parent.name}/{events.name.split('.')[0]}" if events else "-/-"
    name = f"{Path(sys.argv[0]).stem}:{place}"
    merged: dict = {}
    for rule in json.loads(os.environ.get("SCRIPTED_CLIENT", "[]")):
        if fnmatch.fnmatch(name, rule["match"]):
            merged.update(rule)
    return merged


def change_card(card: Path, change: Callable[[dict], object]) -> None:
    """Change the scripted card; clients take turns."""
    with card.with_name("lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = json.loads(card.read_text())
        change(state)
        temporary = card.with_name("new")
        temporary.write_text(json.dumps(state))
        temporary.replace(card)


class Script:
    """The client's life."""

    def __init__(self, events: Path | None) -> None:
        """Read the settings."""
        self.events = events
        self.settings = settings(events)
        self.buffer = b""
        self.stopped = False
        self.go_seconds: float | None = None

    def emit(self, event: str, **fields: object) -> None:
        """Append one event."""
        with self.events.open("a") as stream:
            stream.write(json.dumps({"event": event, "time_seconds": time.monotonic(), **fields}))
            stream.write("\n")

    def listen(self, seconds: float) -> str | None:
        """Next command within that time, else None; end-of-file is a stop."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            left = deadline - time.monotonic()
            if left < 0 or not select.select([0], [], [], left)[0]:
                return None
            chunk = os.read(0, 4096)
            if not chunk:
                return "stop"
            self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line.decode()

    def await_command(self, wanted: str) -> None:
        """Wait for a command; a stop ends the client."""
        while True:
            command = self.listen(3600)
            if command == wanted:
                return
            if command == "stop" and not self.settings.get("ignore_stop"):
                self.finish(0)

    def fail_now(self, stage: str | None = None) -> None:
        """Fail if this is the moment to."""
        kind, moment = self.settings.get("fail"), self.settings.get("fail_at", 0)
        if isinstance(moment, str):
            is_due = moment == stage
        else:
            is_due = self.go_seconds is not None and time.monotonic() >= self.go_seconds + moment
        if kind is None or not is_due:
            return
        print(f"scripted failure: {kind}", file=sys.stderr, flush=True)
        if kind in ("oom", "error"):
            status = "oom" if kind == "oom" else "failed"
            fields = {"status": status, "message": "scripted", **self.settings.get("error", {})}
            self.emit("error", **fields)
            sys.exit(12 if kind == "oom" else self.settings.get("exit_code", 1))
        if kind in ("garbage", "binary"):
            with self.events.open("ab") as stream:
                stream.write(b"this is no event\n" if kind == "garbage" else b"caf\xe9\n")
        elif kind == "signal":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif kind == "hang":
            while self.listen(3600) != "stop":
                pass
            self.finish(0)
        elif kind == "done":
            self.finish(0)
        else:
            sys.exit({"crash": 7, "exit0": 0}[kind])

    def finish(self, jobs: int) -> None:
        """Say goodbye."""
        time.sleep(self.settings.get("slow_stop", 0))
        self.emit("done", jobs=jobs, host_cpu_seconds=0.5, peak_memory_mib=100.0)
        sys.exit(0)

    def appear_on_card(self) -> None:
        """Enter the lists in which a driver would show this process."""
        card = os.environ.get("NVML_STUB_STATE")
        if card is None or self.settings.get("hidden"):
            return
        kinds = ["pids"]
        pipe = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/nowhere"))
        is_served = (pipe / "running").exists() or (pipe / "control").exists()
        if is_served and not self.settings.get("without_mps"):
            kinds.append("mps_pids")
            with (pipe / "running").open("a") as stream:
                stream.write(f"{os.getpid()}\n")
        own = str(os.getpid())

        def enter(state: dict) -> None:
            for kind in kinds:
                state.setdefault(kind, {})[own] = 100

        def leave(state: dict) -> None:
            for kind in kinds:
                state.get(kind, {}).pop(own, None)

        change_card(Path(card), enter)
        atexit.register(change_card, Path(card), leave)

    def identity(self) -> dict:
        """Who this client says it is."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        device = value_of("--device", "auto")
        on_gpu = device == "cuda" or (device == "auto" and visible is not None)
        return {
            "pid": os.getpid(),
            "device": "cuda" if on_gpu else "cpu",
            "gpu_name": "Scripted GPU" if on_gpu else None,
            "gpu_uuid": visible if on_gpu else None,
            "multiprocessor_count": 132 if on_gpu else None,
            "memory_total_mib": 81559 if on_gpu else None,
            "sharing_environment": {
                name: value for name, value in os.environ.items()
                if name.startswith("CUDA_MPS_") or name == "CUDA_VISIBLE_DEVICES"
            },
            "engine": value_of("--engine", "graph" if on_gpu else "eager"),
            "precision": value_of("--precision", "bf16" if on_gpu else "fp32"),
            "batch_size": int(value_of("--batch-size", "1")),
            "client_index": int(value_of("--client-index", "-1")),
            "versions": {"torch": "scripted", "cuda": "13.0" if on_gpu else None},
            **self.settings.get("identity", {}),
        }  # fmt: skip

    def job(self, index: int) -> None:
        """One job; leaves at a unit's end when told to stop."""
        start = time.monotonic()
        starts: list[float] = []
        durations: list[float] = []
        for _ in range(self.settings.get("units", 5)):
            self.fail_now()
            begin = time.monotonic()
            if self.listen(self.settings.get("unit_seconds", 0.01)) == "stop":
                self.stopped = not self.settings.get("ignore_stop")
            starts.append(begin)
            durations.append(time.monotonic() - begin)
            if self.stopped:
                break
        self.emit("units", kind="step", latency=self.settings.get("latency", False),
                  start_seconds=starts, duration_seconds=durations)  # fmt: skip
        if self.stopped:
            self.finish(index)
        figures = dict(self.settings.get("figures", {}))
        if value_of("--cell-repeats") is None:
            figures.update(self.settings.get("figures_once", {}))
        self.emit("job", index=index, start_seconds=start, end_seconds=time.monotonic(),
                  figures=figures)  # fmt: skip

    def live(self) -> None:
        """Load, warm up, work."""
        if self.settings.get("ignore_term"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.settings.get("spawn"):
            # As a shell's job control does it.
            own_group = os.setpgrp if self.settings["spawn"] == "in a group of its own" else None
            helper = subprocess.Popen(
                ["sleep", "600"], stdin=subprocess.DEVNULL, preexec_fn=own_group
            )
            print(f"helper {helper.pid}", file=sys.stderr, flush=True)
        time.sleep(self.settings.get("load_seconds", 0))
        self.fail_now("load")
        self.emit("loaded", startup_seconds=0.25)
        self.await_command("warm")
        self.fail_now("warm")
        self.appear_on_card()
        self.emit("ready", identity=self.identity())
        self.await_command("go")
        self.go_seconds = time.monotonic()
        index = 0
        while True:
            self.job(index)
            index += 1


def resolve() -> None:
    """Answer `--resolve`."""
    configured = settings(None)
    code = configured.get("resolve_exit", 0)
    if code:
        print("cannot resolve: scripted", file=sys.stderr)
        sys.exit(code)
    print("a line for people", file=sys.stderr)
    print(json.dumps({
        "arguments": configured.get("resolve_arguments", ["--resolved", "yes"]),
        "environment": {"versions": {"torch": "scripted"}, "host_cores": 2, "os": "test",
                        "git_commit": configured.get("git_commit"), "git_dirty": None},
        "notes": configured.get("resolve_notes", []),
    }))  # fmt: skip


if __name__ == "__main__":
    if "--resolve" in sys.argv:
        resolve()
    else:
        Script(Path(value_of("--events"))).live()
