"""The launcher, with real processes: contract, failures, time limits, and nothing left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from waiting import is_running, wait_until

from benchmarking.measuring import event_log, launcher
from benchmarking.measuring.client import Client, client_base_environment
from benchmarking.measuring.launcher import FinishRule, Launcher, Timeouts
from benchmarking.measuring.stop_signal import StopSignal
from benchmarking.planning.plan import PlannedClient, PlannedCoRun
from benchmarking.records.run_folder import ClientPaths
from benchmarking.records.types import Units

CLIENT = Path(__file__).parent / "fakes" / "scripted_client.py"
SOON = Timeouts(timeout=10.0, stop=5.0, terminate=2.0, poll=0.01)
ONE_JOB = FinishRule(min_seconds=0.1)
ENDLESS = FinishRule(min_seconds=60)


def planned(count: int, *command: str) -> PlannedCoRun:
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
        before_go: Callable[[list[Client]], object] = lambda clients: None,
        **settings: dict,
    ) -> launcher.CoRunResult:
        rules = [{"match": f"*/{name[1:]}" if name != "all" else "*", **values}
                 for name, values in settings.items()]  # fmt: skip
        inherited = {**os.environ, "SCRIPTED_CLIENT": json.dumps(rules)}
        environment = client_base_environment(inherited)
        stop_signal = stop_signal or StopSignal()
        starter = Launcher(environment, timeouts=timeouts, stop_signal=stop_signal)
        what = co_run if isinstance(co_run, PlannedCoRun) else planned(co_run)
        return starter.run(what, paths_of, rule, before_go)

    return run_clients


def statuses(result: launcher.CoRunResult) -> list[str]:
    return [client.status for client in result.clients]


def window(result: launcher.CoRunResult) -> tuple[float, float]:
    return result.window_start_seconds, result.window_end_seconds


def window_seconds(result: launcher.CoRunResult) -> float:
    return result.window_end_seconds - result.window_start_seconds


def jobs_in_window(result: launcher.CoRunResult, number: int = 0) -> int:
    jobs = event_log.jobs_of(result.clients[number].events, *window(result))
    return sum(job.in_window for job in jobs)


# --- the normal course ------------------------------------------------------------------------


def test_everyone_loads_then_warms_up_alone_and_finishes_a_job_inside_the_window(
    run: Callable,
) -> None:
    seen: list[int] = []

    def look(clients: list[Client]) -> None:
        seen.extend(client.identity["pid"] for client in clients if is_running(client.pid))

    result = run(
        3, before_go=look, rule=FinishRule(min_seconds=0.5), c0={"load_seconds": 0.3},
        c2={"units": 40},
    )  # fmt: skip
    assert len(seen) == 3
    assert (result.outcome, statuses(result)) == ("ok", ["ok"] * 3)
    times = {
        name: [
            event_log.last_event(client.events, name)["time_seconds"] for client in result.clients
        ]
        for name in ("loaded", "ready")
    }
    assert max(times["loaded"]) < min(times["ready"])
    assert times["ready"] == sorted(times["ready"])
    assert max(times["ready"]) < result.window_start_seconds
    assert result.ready_seconds <= result.window_start_seconds
    assert window_seconds(result) >= 0.5
    assert 0 <= result.go_skew_ms < 1000
    # a short job repeats until the long one is done
    assert jobs_in_window(result, 2) >= 1
    assert min(jobs_in_window(result, 0), jobs_in_window(result, 1)) >= 4
    for client in result.clients:
        assert client.exit_code == 0
        assert client.window_host_cpu_fraction >= 0
        assert client.busiest_thread_cpu_fraction >= 0


def test_counting_opens_for_all_at_once_some_time_after_go_and_lasts_a_job_of_the_slowest(
    run: Callable,
) -> None:
    rule = FinishRule(min_seconds=0.1, settle_seconds=0.4)
    result = run(2, rule=rule, c1={"units": 40})
    went = min(
        start for client in result.clients for _, start, _ in event_log.unit_spans(client.events)
    )
    assert 0.3 < result.window_start_seconds - went < 0.6
    assert result.settle_seconds == 0.4
    longest = max(result.clients[1].job_seconds)
    # The longest of all jobs, of which a later one may be a moment longer than the one waited for.
    assert 0.9 * longest < window_seconds(result) < 1.5 * longest
    # Units in hand at the end come to theirs next to the same neighbors.
    for client in result.clients:
        _, start, duration = list(event_log.unit_spans(client.events))[-1]
        assert start + duration > result.window_end_seconds


@pytest.mark.parametrize(("unit_seconds", "jobs"), [(0.01, range(5, 50)), (0.1, range(1, 3))])
def test_a_window_holds_a_whole_job_however_long_it_is(
    run: Callable, unit_seconds: float, jobs: range
) -> None:
    rule = FinishRule(min_seconds=0.4, settle_seconds=0.1, needs_whole_job=True)
    result = run(1, rule=rule, all={"unit_seconds": unit_seconds})
    assert result.outcome == "ok"
    assert jobs_in_window(result) in jobs


def test_a_window_that_is_longer_than_the_time_limit_is_nobodys_delay(run: Callable) -> None:
    timeouts = dataclasses.replace(SOON, timeout=2.0)
    result = run(1, rule=FinishRule(min_seconds=2.5), timeouts=timeouts)
    assert (result.outcome, result.reason) == ("ok", None)


@pytest.mark.parametrize(
    ("rule", "unit_seconds", "seconds", "units"),
    [
        # without a whole job, but with enough units
        (FinishRule(min_seconds=99, window_seconds=0.4, min_units=10), 0.06, (0.4, 3), 10),
        # which it does not wait for for ever
        (FinishRule(min_seconds=99, window_seconds=0.2, longest_seconds=0.6), 0.5, (0.6, 0.9), 0),
    ],
)
def test_a_fixed_window_ends_with_enough_units_or_after_its_longest_time(
    run: Callable, rule: FinishRule, unit_seconds: float, seconds: tuple, units: int
) -> None:
    result = run(1, rule=rule, all={"units": 12, "unit_seconds": unit_seconds})
    assert result.outcome == "ok"
    assert seconds[0] <= window_seconds(result) < seconds[1]
    found, _ = event_log.units_in_window(result.clients[0].events, *window(result))
    assert found["step"].count >= units


# --- failures ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "status", "words"),
    [
        ({"fail": "crash"}, "failed", "exit code 7"),
        ({"fail": "oom"}, "oom", "scripted"),
        ({"fail": "error"}, "failed", "scripted"),
        ({"fail": "exit0"}, "failed", "never said"),
        ({"fail": "done"}, "failed", "exited prematurely"),
        ({"fail": "signal"}, "failed", "SIGSEGV"),
        ({"fail": "binary"}, "failed", "not an event: caf\ufffd"),
    ],
)
def test_who_fails_at_work_ends_the_window_with_its_reason_and_the_neighbor_keeps_its_status(
    run: Callable, settings: dict, status: str, words: str
) -> None:
    result = run(2, c0={"fail_at": 0.05, **settings}, rule=FinishRule(min_seconds=8.0))
    assert (result.outcome, statuses(result)) == ("failed", [status, "ok"])
    assert words in result.clients[0].reason
    assert f"client 0 (Scripted): {status}" in result.reason
    assert "scripted failure" in result.clients[0].stderr_tail[-1]
    assert window_seconds(result) < 5


def test_a_client_that_fails_before_counting_opens_ends_the_co_run(run: Callable) -> None:
    rule = FinishRule(min_seconds=5, settle_seconds=5)
    result = run(2, c1={"fail": "crash", "fail_at": 0.1}, rule=rule)
    assert result.outcome == "failed"
    assert 0 < window_seconds(result) < 4


def test_of_many_that_fail_the_reason_names_the_first_ones_and_counts_the_others(
    run: Callable,
) -> None:
    failing = {"fail": "oom", "fail_at": "load"}
    result = run(8, all={**failing, "load_seconds": 1.0}, c6={**failing, "load_seconds": 0})
    assert statuses(result) == ["oom"] * 8
    assert result.reason.startswith("client 6 (Scripted): oom: scripted; client ")
    assert result.reason.endswith("; 4 more")


@pytest.mark.parametrize("stage", ["load", "warm"])
def test_a_failure_before_go_leaves_no_window(run: Callable, stage: str) -> None:
    result = run(2, c0={"fail": "crash", "fail_at": stage})
    assert (result.outcome, statuses(result)) == ("failed", ["failed", "ok"])
    assert window(result) == (None, None)


@pytest.mark.parametrize(
    ("error", "code", "cause", "words"),
    [
        ("diverged", 34, "diverged", "diverged: scripted"),
        ("of its own", 65, "damaged_file", "damaged file: "),
        ("of its own", 1, None, "failed: scripted"),
    ],
)
def test_the_cause_is_the_clients_word_else_its_exit_codes(
    run: Callable, error: str, code: int, cause: str | None, words: str
) -> None:
    failing = {"fail": "error", "fail_at": "warm", "error": {"cause": error}, "exit_code": code}
    result = run(1, c0=failing)
    assert (result.clients[0].status, result.clients[0].cause) == ("failed", cause)
    assert words in result.reason


def test_a_command_that_does_not_exist_is_a_failed_client(run: Callable) -> None:
    result = run(planned(1, "/does/not/exist"))
    assert statuses(result) == ["failed"]
    assert "cannot start /does/not/exist" in result.reason


@pytest.mark.parametrize(
    ("number", "status", "words"),
    [
        (signal.SIGKILL, "killed", "ended by SIGKILL (the host may have run out of memory)"),
        (signal.SIGTERM, "killed", "ended by SIGTERM"),
        (40, "failed", "ended by signal 40"),
    ],
)
def test_a_client_that_a_signal_ended_says_which(
    run: Callable, number: int, status: str, words: str
) -> None:
    result = run(2, before_go=lambda clients: os.kill(clients[0].pid, number))
    assert (result.outcome, statuses(result)) == ("failed", [status, "ok"])
    assert result.clients[0].reason == words


@pytest.mark.parametrize(
    ("settings", "limits", "reason", "exit_code"),
    [
        ({"fail": "hang", "fail_at": 0.0}, {"timeout": 3.0},
         "did not finish within 3 s (benchmark_suite.py --timeout allows more)", 0),
        ({"load_seconds": 60}, {"timeout": 0.8, "stop": 0.1},
         "did not load within 0.8 s (benchmark_suite.py --timeout allows more)", -15),
        ({"ignore_stop": True}, {"stop": 0.3}, "did not stop when told to", -15),
        ({"ignore_stop": True, "ignore_term": True}, {"stop": 0.2, "terminate": 0.3},
         "did not stop when told to", -9),
    ],
)  # fmt: skip
def test_who_is_not_done_in_time_times_out_and_is_ended_ever_harder(
    run: Callable, settings: dict, limits: dict, reason: str, exit_code: int
) -> None:
    result = run(2, c1=settings, timeouts=dataclasses.replace(SOON, **limits))
    assert (result.outcome, statuses(result)) == ("timeout", ["ok", "timeout"])
    assert (result.clients[1].reason, result.clients[1].exit_code) == (reason, exit_code)


# --- signals and what is left behind ----------------------------------------------------------


def test_an_interruption_stops_everyone_by_standard_input_and_a_second_does_not_wait(
    run: Callable,
) -> None:
    def stop_at_work(*seconds: float, **settings: object) -> launcher.CoRunResult:
        stop_signal = StopSignal()

        def soon(clients: list[Client]) -> None:
            for delay in seconds:
                threading.Timer(delay, stop_signal.request).start()

        return run(2, rule=ENDLESS, stop_signal=stop_signal, before_go=soon, all=settings,
                   timeouts=Timeouts(timeout=60, stop=30, terminate=2, poll=0.01))  # fmt: skip

    polite = stop_at_work(0.3)
    assert (polite.outcome, statuses(polite)) == ("interrupted", ["ok", "ok"])
    assert [client.exit_code for client in polite.clients] == [0, 0]
    begin = time.monotonic()
    assert statuses(stop_at_work(0.3, 1.6, slow_stop=30)) == ["killed", "killed"]
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("spawn", ["with it", "in a group of its own"])
def test_helpers_that_a_client_leaves_are_swept(run: Callable, spawn: str) -> None:
    result = run(1, all={"spawn": spawn})
    helper = int(result.clients[0].stderr_tail[0].split()[1])
    assert result.outcome == "ok"
    wait_until(lambda: not is_running(helper), "the end of the helper", seconds=15)


def test_signals_are_only_noted_while_watching_and_an_echo_is_no_second_one() -> None:
    stop_signal = StopSignal()
    before = signal.getsignal(signal.SIGTERM)
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # by nohup
    with stop_signal.watching():
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop_signal.requested
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert stop_signal.requested
    assert stop_signal.count == 1
    assert signal.getsignal(signal.SIGTERM) is before
    signal.signal(signal.SIGHUP, ignored)


# --- environment, files and events ------------------------------------------------------------


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 knows no safe path")
@pytest.mark.parametrize(("workload", "finds"), [("scripted", False), ("command", True)])
def test_only_a_users_own_program_imports_what_lies_where_it_runs(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workload: str, finds: bool
) -> None:
    inherited = {"PATH": "/bin", "CUDA_MPS_PIPE_DIRECTORY": "/x", "CUDA_VISIBLE_DEVICES": "3",
                 "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "10", "OMP_PROC_BIND": "true"}  # fmt: skip
    assert client_base_environment(inherited) == {"PATH": "/bin", "PYTHONSAFEPATH": "1"}
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("planted.py").write_text("print('imported')")
    client = PlannedClient(0, workload, "Program", "p", (sys.executable, "-c", "import planted"))
    run(PlannedCoRun("program", "co_run", "time-slicing", 0, (client,)))
    assert Path("program/0.stdout.log").read_text() == ("imported\n" if finds else "")


def test_output_files_are_their_owners_and_no_link_is_followed(
    run: Callable, tmp_path: Path
) -> None:
    run(1)
    paths = list((tmp_path / "pair").iterdir())
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o600}
    assert len(paths) == 3
    for path in paths:
        path.unlink()
        path.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            run(1)
        assert not (tmp_path / "elsewhere").exists()
        path.unlink()


def test_an_event_log_that_is_taken_away_fails_the_client(run: Callable, tmp_path: Path) -> None:
    log = tmp_path / "pair" / "0.events.jsonl"
    result = run(1, before_go=lambda clients: log.unlink())
    assert "its event log cannot be read (No such file or directory)" in result.reason


NO_EVENTS = [
    b"\xff\xfe", b'{"event": "caf\xe9"}', b"", b"[]", b'{"event": []}', b'{"event": "loaded',
    b"[" * 100_000, b'{"time_seconds": 1}', b'{"event": "job"}',
    b'{"event": "job", "index": 0, "start_seconds": 1, "end_seconds": NaN}',
    b'{"event": "job", "index": 0, "start_seconds": 2, "end_seconds": 1}',
    b'{"event": "job", "index": -1, "start_seconds": 1, "end_seconds": 2}',
    b'{"event": "job", "index": 0, "start_seconds": 1, "end_seconds": 1e999}',
    *(b'{"event": "units", "kind": "s", "latency": false, "start_seconds": [1],'
      b' "duration_seconds": [%b]}' % seconds for seconds in (b"", b"-1", b"1e99")),
    b'{"event": "ready", "identity": "me"}',
    b'{"event": "error", "status": "tired"}', b'{"event": "done", "host_cpu_seconds": "many"}',
    b'{"event": "loaded", "time_seconds": "late"}', b'{"event": "processes"}',
]  # fmt: skip


@pytest.mark.parametrize("line", NO_EVENTS, ids=range(len(NO_EVENTS)))
def test_a_line_that_is_no_event_of_the_contract_is_an_error(line: bytes) -> None:
    event = event_log.parse_event(line)
    assert (event["event"], event["status"]) == ("error", "failed")
    assert event["message"].startswith("not an event: ")
    assert len(event["message"]) < 250


def test_what_is_unknown_in_an_event_does_no_harm_and_half_a_character_is_replaced() -> None:
    later = {"event": "of a later contract", "x": 1}
    assert event_log.parse_event(json.dumps(later).encode())["event"] == later["event"]
    too_large = event_log.parse_event(b'{"event": "x", "figures": {"loss": 1e999, "s": 1.5}}')
    assert too_large["figures"] == {"loss": None, "s": 1.5}
    job = {"event": "job", "index": 0, "start_seconds": 1, "end_seconds": 2.5,
           "figures": {"loss": float("nan")}}  # fmt: skip
    assert event_log.parse_event(json.dumps(job).encode())["figures"] == {"loss": None}
    said = json.dumps({"event": "error", "message": "caf\udce9.png \U0001f600 \xe9"}).encode()
    assert event_log.parse_event(said)["message"] == "caf?.png \U0001f600 \xe9"


def units(kind: str, latency: bool | str, starts: list[float], durations: list[float]) -> dict:
    return {"event": "units", "kind": kind, "latency": latency, "start_seconds": starts,
            "duration_seconds": durations}  # fmt: skip


def test_units_across_the_windows_edges_count_by_their_share() -> None:
    events = [
        units("step", False, [0.0, 0.5, 2.0, 2.9], [0.9, 1.0, 0.5, 0.4]),
        units("cell", True, [0.75, 1.5, 2.5], [0.5, 0.25, 1.0]),
        # Requests at an offered rate are no work: each counts where it ends.
        units("request", True, [0.5, 2.9], [0.75, 0.25]),
        units("first", "apart", [1.0], [0.125]),
    ]
    found, latency_ms = event_log.units_in_window(events, 1.0, 3.0)
    assert found == {
        "step": Units(count=pytest.approx(1.75), seconds=pytest.approx(1.1), latency=False),
        "cell": Units(count=2.0, seconds=1.0, latency=True),
        "request": Units(count=1, seconds=0.75, latency=True),
        "first": Units(count=1, seconds=0.125, latency=True),
    }
    assert latency_ms == {None: [500.0, 250.0, 750.0], "first": [125.0]}
    assert event_log.units_in_window([], 0.0, 1.0) == ({}, {})
    # a run of a command that was cut off counts by its share of a mean one
    unfinished = {"event": "unfinished", "kind": "command", "latency": False, "start_seconds": 8.0}
    events = [units("command", False, [0.0, 4.0], [4.0, 4.0]), unfinished]
    found, _ = event_log.units_in_window(events, 2.0, 9.0)
    assert found == {"command": Units(count=0.5 + 1 + 0.25, seconds=7.0, latency=False)}
    # of nothing known when those before took no time
    at_once = units("command", False, [0.0, 4.0], [0.0, 0.0])
    found, _ = event_log.units_in_window([at_once, unfinished], 2.0, 9.0)
    assert found == {"command": Units(count=1.0, seconds=0.0, latency=False)}


def test_a_line_that_is_still_being_written_waits_but_not_for_ever_and_a_tail_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "events.jsonl"
    follower = event_log.LineFollower(path)

    def lines_after(text: str) -> list[bytes]:
        with path.open("a") as stream:
            stream.write(text)
        return follower.poll()

    assert lines_after('{"event": "loaded"}\n{"event": "rea') == [b'{"event": "loaded"}']
    assert lines_after('dy"}\n') == [b'{"event": "ready"}']
    monkeypatch.setattr(event_log, "MOST_LINE_BYTES", 1000)
    assert lines_after("x" * 1001) == [b"x" * 1001]
    assert follower.poll() == []
    path.write_text("x" * 100000)
    assert event_log.tail_of(path) == ["x" * 1000]
    path.write_text("".join(f"line {i}\n" for i in range(100000)))
    assert event_log.tail_of(path, 3) == ["line 99997", "line 99998", "line 99999"]
    assert event_log.tail_of(tmp_path / "missing") == []
