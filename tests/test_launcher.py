"""The launcher, with real processes: contract, failures, time limits, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from waiting import is_running, wait_until

from benchmarking.records.run_folder import ClientPaths
from benchmarking.suite import event_log, launcher
from benchmarking.suite.launcher import FinishRule, Launcher, StopSignal, Timeouts
from benchmarking.suite.plan import PlannedClient, PlannedCoRun, build_plan, counted_co_runs

CLIENT = Path(__file__).parent / "fakes" / "scripted_client.py"
SOON = Timeouts(timeout=10.0, stop=5.0, terminate=2.0, poll=0.01)
ONE_JOB = FinishRule(min_seconds=0.1)


def planned(count: int, command: tuple[str, ...] | None = None) -> PlannedCoRun:
    command = command or (sys.executable, str(CLIENT))
    clients = tuple(
        PlannedClient(i, "scripted", "Scripted", "scripted", command) for i in range(count)
    )
    return PlannedCoRun("pair", "co_run", "time-slicing", 0, clients)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., launcher.CoRunResult]:
    """Run scripted clients; keyword arguments are settings by client number ("c0") or for all."""

    def paths_of(co_run: str, client: int) -> ClientPaths:
        folder = tmp_path / co_run
        folder.mkdir(exist_ok=True)
        kinds = ("events.jsonl", "stdout.log", "stderr.log")
        return ClientPaths(*(folder / f"{client}.{kind}" for kind in kinds))

    def run_clients(
        co_run: int | PlannedCoRun = 2,
        *,
        rule: FinishRule = ONE_JOB,
        timeouts: Timeouts = SOON,
        stop_signal: StopSignal | None = None,
        before_go: Callable[[list[launcher.Client]], None] = lambda clients: None,
        command: tuple[str, ...] | None = None,
        **settings: dict,
    ) -> launcher.CoRunResult:
        rules = [{"match": f"*/{name[1:]}" if name != "all" else "*", **values}
                 for name, values in settings.items()]  # fmt: skip
        environment = {**os.environ, "SCRIPTED_CLIENT": json.dumps(rules)}
        starter = Launcher(environment, timeouts=timeouts, stop_signal=stop_signal)
        what = co_run if isinstance(co_run, PlannedCoRun) else planned(co_run, command)
        return starter.run(what, paths_of, rule, before_go)

    return run_clients


def statuses(result: launcher.CoRunResult) -> list[str]:
    return [client.status for client in result.clients]


# --- the normal course ------------------------------------------------------------------------


def test_everyone_finishes_a_job_inside_the_window(run: Callable) -> None:
    result = run(2)
    assert result.outcome == "ok"
    assert statuses(result) == ["ok", "ok"]
    assert result.ready_seconds <= result.window_start_seconds < result.window_end_seconds
    for client in result.clients:
        jobs = event_log.jobs_of(
            client.events, result.window_start_seconds, result.window_end_seconds
        )
        assert jobs[0]["in_window"]
        assert client.exit_code == 0


def test_nobody_warms_up_before_everyone_has_loaded_nor_beside_another(run: Callable) -> None:
    result = run(3, c0={"load_seconds": 0.3})
    loaded = [event_log.last_event(c.events, "loaded")["time_seconds"] for c in result.clients]
    ready = [event_log.last_event(c.events, "ready")["time_seconds"] for c in result.clients]
    assert max(loaded) < min(ready)
    assert ready == sorted(ready)
    assert max(ready) < result.window_start_seconds


def test_a_short_job_repeats_until_the_long_one_is_done(run: Callable) -> None:
    result = run(2, c1={"units": 40})
    window = result.window_start_seconds, result.window_end_seconds
    short, long = (event_log.jobs_of(client.events, *window) for client in result.clients)
    assert sum(job["in_window"] for job in long) >= 1
    assert sum(job["in_window"] for job in short) >= 4


def test_the_least_window_is_kept(run: Callable) -> None:
    result = run(1, rule=FinishRule(min_seconds=0.5))
    assert result.window_end_seconds - result.window_start_seconds >= 0.5


def test_a_baseline_takes_five_jobs_when_they_are_short(run: Callable) -> None:
    result = run(1, rule=FinishRule(min_seconds=0.0, min_jobs=5, long_job_seconds=5.0))
    assert sum(event["event"] == "job" for event in result.clients[0].events) >= 5


def test_a_baseline_takes_one_job_when_it_is_long(run: Callable) -> None:
    rule = FinishRule(min_seconds=0.0, min_jobs=50, long_job_seconds=0.2)
    result = run(1, rule=rule, all={"unit_seconds": 0.1})
    assert result.outcome == "ok"
    assert sum(event["event"] == "job" for event in result.clients[0].events) == 1


def test_a_fixed_window_ends_without_a_whole_job_but_with_enough_units(run: Callable) -> None:
    rule = FinishRule(min_seconds=99, window_seconds=0.4, min_units=10)
    result = run(1, rule=rule, all={"units": 12, "unit_seconds": 0.06})
    assert result.outcome == "ok"
    units, _ = event_log.units_in_window(
        result.clients[0].events, result.window_start_seconds, result.window_end_seconds
    )
    assert units["step"]["count"] >= 10
    assert result.window_end_seconds - result.window_start_seconds < 3


def test_copies_of_a_job_have_an_index_each_the_same_in_two_modes_and_share_one_baseline(
    run: Callable,
) -> None:
    copies = planned(3).clients
    for mode in ("time-slicing", "mps"):
        co_runs = counted_co_runs(mode, lambda n: copies[:n], name="mine", counts=(3,), repeats=2)
        layout = build_plan(mode, copies, co_runs)
        seen = {
            co_run.co_run: [c.identity["client_index"] for c in run(co_run).clients]
            for co_run in (*layout.baseline, *layout.co_runs)
        }
        assert seen == {
            "baseline-scripted": [0], "mine-3-r0": [0, 1, 2], "mine-3-r1": [0, 1, 2],
        }  # fmt: skip


def test_before_go_sees_everyone_ready_and_alive(run: Callable) -> None:
    seen: list[int] = []

    def look(clients: list[launcher.Client]) -> None:
        seen.extend(client.identity["pid"] for client in clients if is_running(client.pid))

    run(2, before_go=look)
    assert len(seen) == 2


def test_the_window_records_processor_time_and_skew(run: Callable) -> None:
    result = run(2)
    assert 0 <= result.go_skew_ms < 1000
    assert all(client.window_host_cpu_seconds >= 0 for client in result.clients)


# --- failures ---------------------------------------------------------------------------------


def test_an_out_of_memory_client_ends_the_window_and_the_neighbor_keeps_its_status(
    run: Callable,
) -> None:
    result = run(2, c1={"fail": "oom", "fail_at": 0.2}, rule=FinishRule(min_seconds=8.0))
    assert result.outcome == "failed"
    assert statuses(result) == ["ok", "oom"]
    assert result.window_end_seconds - result.window_start_seconds < 5
    assert "client 1 (Scripted): oom" in result.reason
    assert result.clients[1].exit_code == 12


@pytest.mark.parametrize(
    ("kind", "status", "words"),
    [("crash", "failed", "exit code 7"), ("error", "failed", "scripted"),
     ("exit0", "failed", "never said"), ("signal", "failed", "SIGSEGV"),
     ("garbage", "failed", "not an event")],
)  # fmt: skip
def test_every_way_of_failing_is_told_with_its_reason(
    run: Callable, kind: str, status: str, words: str
) -> None:
    result = run(2, c0={"fail": kind, "fail_at": 0.05}, rule=FinishRule(min_seconds=8.0))
    assert statuses(result) == [status, "ok"]
    assert words in result.clients[0].reason
    assert "scripted failure" in result.clients[0].stderr_tail[-1]


@pytest.mark.parametrize(
    ("settings", "cause", "words"),
    [
        ({"error": {"cause": "diverged"}, "exit_code": 34}, "diverged", "diverged: scripted"),
        ({"error": {"cause": "of its own"}, "exit_code": 65}, "damaged_file", "damaged file: "),
        ({"error": {"cause": "of its own"}}, None, "failed: scripted"),
    ],
)
def test_the_cause_is_the_clients_word_else_its_exit_codes(
    run: Callable, settings: dict, cause: str | None, words: str
) -> None:
    result = run(1, c0={"fail": "error", "fail_at": "warm", **settings})
    assert (result.clients[0].status, result.clients[0].cause) == ("failed", cause)
    assert words in result.reason


@pytest.mark.parametrize("stage", ["load", "warm"])
def test_a_failure_before_go_leaves_no_window(run: Callable, stage: str) -> None:
    result = run(2, c0={"fail": "crash", "fail_at": stage})
    assert result.outcome == "failed"
    assert result.window_start_seconds is None
    assert result.window_end_seconds is None
    assert statuses(result) == ["failed", "ok"]


def test_a_command_that_does_not_exist_is_a_failed_client(run: Callable) -> None:
    result = run(1, command=("/does/not/exist",))
    assert statuses(result) == ["failed"]
    assert "cannot start /does/not/exist" in result.reason


def test_a_client_killed_from_outside_is_killed(run: Callable) -> None:
    def kill_first(clients: list[launcher.Client]) -> None:
        os.kill(clients[0].pid, signal.SIGKILL)

    result = run(2, before_go=kill_first)
    assert statuses(result) == ["killed", "ok"]
    assert result.outcome == "failed"


# --- time limits ------------------------------------------------------------------------------


def test_a_stuck_client_becomes_a_timeout_row(run: Callable) -> None:
    timeouts = Timeouts(timeout=3.0, stop=5.0, terminate=2.0, poll=0.01)
    result = run(2, c1={"fail": "hang", "fail_at": 0.0}, timeouts=timeouts)
    assert result.outcome == "timeout"
    assert statuses(result) == ["ok", "timeout"]


def test_a_client_that_never_loads_times_out(run: Callable) -> None:
    timeouts = Timeouts(timeout=0.8, stop=0.1, terminate=2.0, poll=0.01)
    result = run(2, c0={"load_seconds": 60}, timeouts=timeouts)
    assert result.outcome == "timeout"
    assert result.clients[0].status == "timeout"
    assert "did not stop" in result.clients[0].reason


def test_a_client_that_ignores_stop_is_terminated(run: Callable) -> None:
    timeouts = Timeouts(timeout=10, stop=0.3, terminate=3.0, poll=0.01)
    result = run(2, c1={"ignore_stop": True}, timeouts=timeouts)
    assert statuses(result) == ["ok", "timeout"]
    assert result.clients[1].exit_code == -signal.SIGTERM
    assert result.outcome == "timeout"


def test_a_client_that_ignores_everything_is_killed_last(run: Callable) -> None:
    timeouts = Timeouts(timeout=10, stop=0.2, terminate=0.3, poll=0.01)
    result = run(1, c0={"ignore_stop": True, "ignore_term": True}, timeouts=timeouts)
    assert result.clients[0].exit_code == -signal.SIGKILL
    assert statuses(result) == ["timeout"]


# --- stop_signal and what is left behind -----------------------------------------------------


def test_an_interruption_stops_everyone_by_the_leash(run: Callable) -> None:
    stop_signal = StopSignal()
    threading.Timer(0.6, stop_signal.request).start()
    result = run(2, rule=FinishRule(min_seconds=60), stop_signal=stop_signal)
    assert result.outcome == "interrupted"
    assert statuses(result) == ["ok", "ok"]
    assert [client.exit_code for client in result.clients] == [0, 0]


def test_asking_twice_does_not_wait_for_a_slow_stop(run: Callable) -> None:
    stop_signal = StopSignal()
    for seconds in (0.5, 1.8):
        threading.Timer(seconds, stop_signal.request).start()
    begin = time.monotonic()
    result = run(
        1, rule=FinishRule(min_seconds=60), stop_signal=stop_signal, all={"slow_stop": 30},
        timeouts=Timeouts(timeout=60, stop=30, terminate=2, poll=0.01),
    )  # fmt: skip
    assert time.monotonic() - begin < 10
    assert statuses(result) == ["killed"]


def test_an_exception_before_go_still_stops_everyone(run: Callable) -> None:
    pids: list[int] = []

    def refuse(clients: list[launcher.Client]) -> None:
        pids.extend(client.pid for client in clients)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        run(2, before_go=refuse)
    assert len(pids) == 2
    assert not any(is_running(pid) for pid in pids)


def test_helpers_that_a_client_leaves_are_swept(run: Callable) -> None:
    result = run(1, all={"spawn": True})
    helper = int(result.clients[0].stderr_tail[0].split()[1])
    assert result.outcome == "ok"
    wait_until(lambda: not is_running(helper), "the end of the helper", seconds=15)


def test_clients_end_when_the_launcher_is_killed(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    program = textwrap.dedent(f"""
        import os, sys
        from pathlib import Path
        sys.path[:0] = [{str(root)!r}, {str(root / "tests")!r}]
        from benchmarking.suite.launcher import FinishRule, Launcher
        from benchmarking.records.run_folder import ClientPaths
        from test_launcher import planned
        def paths_of(co_run, client):
            folder = Path({str(tmp_path)!r})
            return ClientPaths(*(folder / f"{{client}}.{{kind}}" for kind in "eos"))
        def die(clients):
            print(*(client.pid for client in clients), flush=True)
            os.kill(os.getpid(), 9)
        Launcher(dict(os.environ)).run(planned(2), paths_of, FinishRule(0.0), die)
    """)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    wait_until(lambda: not any(map(is_running, pids)), "the end of every client", seconds=15)


def test_signals_are_only_noted_while_watching_and_an_echo_is_no_second_one() -> None:
    stop_signal = StopSignal()
    before = signal.getsignal(signal.SIGTERM)
    with stop_signal.watching():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert stop_signal.requested
    assert stop_signal.count == 1
    assert signal.getsignal(signal.SIGTERM) is before


# --- environment and events -------------------------------------------------------------------


def test_inherited_sharing_variables_do_not_reach_a_client() -> None:
    inherited = {"PATH": "/bin", "CUDA_MPS_PIPE_DIRECTORY": "/x", "CUDA_VISIBLE_DEVICES": "3",
                 "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "10"}  # fmt: skip
    assert launcher.client_base_environment(inherited) == {"PATH": "/bin"}


def test_units_that_cross_the_windows_edges_do_not_count() -> None:
    events = [
        {"event": "units", "kind": "step", "latency": False,
         "start_seconds": [0.5, 1.0, 2.0, 2.9], "duration_seconds": [1.0, 1.0, 0.5, 0.2]},
        {"event": "units", "kind": "request", "latency": True,
         "start_seconds": [1.5], "duration_seconds": [0.25]},
    ]  # fmt: skip
    units, latency_ms = event_log.units_in_window(events, 1.0, 3.0)
    assert units["step"] == {"count": 2, "seconds": 1.5, "latency": False}
    assert latency_ms == [250.0]


def test_without_latency_units_there_are_no_latencies() -> None:
    assert event_log.units_in_window([], 0.0, 1.0) == ({}, None)


def test_a_line_that_is_still_being_written_waits(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    follower = event_log.LineFollower(path)
    assert follower.poll() == []
    path.write_text('{"event": "loaded"}\n{"event": "rea')
    assert follower.poll() == [b'{"event": "loaded"}']
    with path.open("a") as stream:
        stream.write('dy"}\n')
    assert follower.poll() == [b'{"event": "ready"}']


def test_the_tail_of_stderr_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "stderr"
    path.write_text("".join(f"line {i}\n" for i in range(100000)))
    assert launcher.tail_of(path, 3) == ["line 99997", "line 99998", "line 99999"]
    assert launcher.tail_of(tmp_path / "missing") == []
