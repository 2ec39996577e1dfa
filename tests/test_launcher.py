"""The launcher, with real processes: contract, failures, time limits, and nothing left behind."""

from __future__ import annotations

import dataclasses
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

from benchmarking.measuring import event_log, launcher
from benchmarking.measuring.client import Client, client_base_environment
from benchmarking.measuring.launcher import FinishRule, Launcher, Timeouts
from benchmarking.measuring.stop_signal import StopSignal
from benchmarking.planning.plan import PlannedClient, PlannedCoRun, baselines_of
from benchmarking.records.run_folder import ClientPaths
from benchmarking.records.types import Units

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
        before_go: Callable[[list[Client]], None] = lambda clients: None,
        command: tuple[str, ...] | None = None,
        **settings: dict,
    ) -> launcher.CoRunResult:
        rules = [{"match": f"*/{name[1:]}" if name != "all" else "*", **values}
                 for name, values in settings.items()]  # fmt: skip
        inherited = {**os.environ, "SCRIPTED_CLIENT": json.dumps(rules)}
        environment = client_base_environment(inherited)
        stop_signal = stop_signal or StopSignal()
        starter = Launcher(environment, timeouts=timeouts, stop_signal=stop_signal)
        what = co_run if isinstance(co_run, PlannedCoRun) else planned(co_run, command)
        return starter.run(what, paths_of, rule, before_go)

    return run_clients


def statuses(result: launcher.CoRunResult) -> list[str]:
    return [client.status for client in result.clients]


# --- the normal course ------------------------------------------------------------------------


def test_everyone_is_ready_before_go_and_finishes_a_job_inside_the_window(run: Callable) -> None:
    seen: list[int] = []

    def look(clients: list[Client]) -> None:
        seen.extend(client.identity["pid"] for client in clients if is_running(client.pid))

    result = run(2, before_go=look, rule=FinishRule(min_seconds=0.5))
    assert len(seen) == 2
    assert result.outcome == "ok"
    assert statuses(result) == ["ok", "ok"]
    assert result.ready_seconds <= result.window_start_seconds < result.window_end_seconds
    assert result.window_end_seconds - result.window_start_seconds >= 0.5
    assert 0 <= result.go_skew_ms < 1000
    for client in result.clients:
        jobs = event_log.jobs_of(
            client.events, result.window_start_seconds, result.window_end_seconds
        )
        assert jobs[0].in_window
        assert client.exit_code == 0
        assert client.window_host_cpu_fraction >= 0
        assert client.busiest_thread_cpu_fraction >= 0


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
    assert sum(job.in_window for job in long) >= 1
    assert sum(job.in_window for job in short) >= 4


def test_counting_opens_for_all_at_once_some_time_after_go(run: Callable) -> None:
    result = run(2, rule=FinishRule(min_seconds=0.3, settle_seconds=0.4))
    went = min(
        start for client in result.clients for _, start, _ in event_log.unit_spans(client.events)
    )
    assert 0.3 < result.window_start_seconds - went < 0.6
    assert result.settle_seconds == 0.4
    # Units in hand at the end come to theirs next to the same neighbors.
    for client in result.clients:
        _, start, duration = list(event_log.unit_spans(client.events))[-1]
        assert start + duration > result.window_end_seconds


def test_a_client_that_fails_before_counting_opens_ends_the_co_run(run: Callable) -> None:
    rule = FinishRule(min_seconds=5, settle_seconds=5)
    result = run(2, c1={"fail": "crash", "fail_at": 0.1}, rule=rule)
    assert result.outcome == "failed"
    assert 0 < result.window_end_seconds - result.window_start_seconds < 4


@pytest.mark.parametrize(("unit_seconds", "jobs"), [(0.01, range(5, 50)), (0.1, range(1, 3))])
def test_a_window_holds_a_whole_job_however_long_it_is(
    run: Callable, unit_seconds: float, jobs: range
) -> None:
    rule = FinishRule(min_seconds=0.4, settle_seconds=0.1, needs_whole_job=True)
    result = run(1, rule=rule, all={"unit_seconds": unit_seconds})
    assert result.outcome == "ok"
    window = result.window_start_seconds, result.window_end_seconds
    assert (
        sum(job.in_window for job in event_log.jobs_of(result.clients[0].events, *window)) in jobs
    )


def test_without_a_length_a_window_is_as_long_as_a_job_of_the_slowest(run: Callable) -> None:
    rule = FinishRule(min_seconds=0.1, settle_seconds=0.3)
    result = run(2, rule=rule, c1={"units": 40})
    longest = max(result.clients[1].job_seconds)
    assert longest <= result.window_end_seconds - result.window_start_seconds < 1.5 * longest


def test_a_fixed_window_ends_without_a_whole_job_but_with_enough_units(run: Callable) -> None:
    rule = FinishRule(min_seconds=99, window_seconds=0.4, min_units=10)
    result = run(1, rule=rule, all={"units": 12, "unit_seconds": 0.06})
    assert result.outcome == "ok"
    units, _ = event_log.units_in_window(
        result.clients[0].events, result.window_start_seconds, result.window_end_seconds
    )
    assert units["step"].count >= 10
    assert result.window_end_seconds - result.window_start_seconds < 3


def test_a_fixed_window_does_not_wait_for_units_for_ever(run: Callable) -> None:
    rule = FinishRule(min_seconds=99, window_seconds=0.2, longest_seconds=0.6)
    result = run(1, rule=rule, all={"unit_seconds": 0.5})
    assert result.outcome == "ok"
    assert 0.6 <= result.window_end_seconds - result.window_start_seconds < 0.9


def test_copies_of_a_job_have_an_index_each_the_same_in_two_modes_and_share_one_baseline(
    run: Callable,
) -> None:
    copies = planned(3).clients
    for mode in ("time-slicing", "mps"):
        co_runs = [PlannedCoRun(f"mine-3-r{i}", "co_run", mode, i, copies) for i in range(2)]
        baseline = baselines_of(copies, "baseline", "exclusive")
        seen = {
            co_run.co_run: [c.identity["client_index"] for c in run(co_run).clients]
            for co_run in (*baseline, *co_runs)
        }
        assert seen == {
            "baseline-scripted": [0], "mine-3-r0": [0, 1, 2], "mine-3-r1": [0, 1, 2],
        }  # fmt: skip


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
     ("exit0", "failed", "never said"), ("done", "failed", "exited prematurely"),
     ("signal", "failed", "SIGSEGV"), ("binary", "failed", "not an event: caf\ufffd"),
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


@pytest.mark.parametrize(
    ("number", "status", "words"),
    [(signal.SIGKILL, "killed", "ended by SIGKILL"), (40, "failed", "ended by signal 40")],
)
def test_a_client_that_a_signal_ended_says_which(
    run: Callable, number: int, status: str, words: str
) -> None:
    result = run(2, before_go=lambda clients: os.kill(clients[0].pid, number))
    assert statuses(result) == [status, "ok"]
    assert result.clients[0].reason == words
    assert result.outcome == "failed"


# --- time limits ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "limits", "reason", "exit_code"),
    [
        ({"fail": "hang", "fail_at": 0.0}, {"timeout": 3.0}, "timed out", 0),
        ({"load_seconds": 60}, {"timeout": 0.8, "stop": 0.1}, "did not stop when told to", -15),
        ({"ignore_stop": True}, {"stop": 0.3}, "did not stop when told to", -15),
        ({"ignore_stop": True, "ignore_term": True}, {"stop": 0.2, "terminate": 0.3},
         "did not stop when told to", -9),
    ],
)  # fmt: skip
def test_who_is_not_done_in_time_times_out_and_is_ended_ever_harder(
    run: Callable, settings: dict, limits: dict, reason: str, exit_code: int
) -> None:
    result = run(2, c1=settings, timeouts=dataclasses.replace(SOON, **limits))
    assert result.outcome == "timeout"
    assert statuses(result) == ["ok", "timeout"]
    assert (result.clients[1].reason, result.clients[1].exit_code) == (reason, exit_code)


# --- stop_signal and what is left behind -----------------------------------------------------


def test_an_interruption_stops_everyone_by_standard_input(run: Callable) -> None:
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

    def refuse(clients: list[Client]) -> None:
        pids.extend(client.pid for client in clients)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        run(2, before_go=refuse)
    assert len(pids) == 2
    assert not any(is_running(pid) for pid in pids)


@pytest.mark.parametrize("spawn", ["with it", "in a group of its own"])
def test_helpers_that_a_client_leaves_are_swept(run: Callable, spawn: str) -> None:
    result = run(1, all={"spawn": spawn})
    helper = int(result.clients[0].stderr_tail[0].split()[1])
    assert result.outcome == "ok"
    wait_until(lambda: not is_running(helper), "the end of the helper", seconds=15)


def test_clients_end_when_the_launcher_is_killed(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    program = textwrap.dedent(f"""
        import os, sys
        from pathlib import Path
        sys.path[:0] = [{str(root)!r}, {str(root / "tests")!r}]
        from benchmarking.measuring.launcher import FinishRule, Launcher
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


# --- environment, files and events ------------------------------------------------------------


def test_inherited_sharing_variables_do_not_reach_a_client() -> None:
    inherited = {"PATH": "/bin", "CUDA_MPS_PIPE_DIRECTORY": "/x", "CUDA_VISIBLE_DEVICES": "3",
                 "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "10"}  # fmt: skip
    assert client_base_environment(inherited) == {"PATH": "/bin", "PYTHONSAFEPATH": "1"}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 knows no safe path")
@pytest.mark.parametrize(("workload", "finds"), [("scripted", False), ("command", True)])
def test_only_a_users_own_program_imports_what_lies_where_it_runs(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workload: str, finds: bool
) -> None:
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
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "pair").iterdir()} == {0o600}
    for kind in ("events.jsonl", "stdout.log", "stderr.log"):
        path = tmp_path / "pair" / f"0.{kind}"
        path.unlink()
        path.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            run(1)
        assert not (tmp_path / "elsewhere").exists()
        path.unlink()


def test_an_event_log_that_is_taken_away_fails_the_client(run: Callable, tmp_path: Path) -> None:
    def take_away(clients: list[Client]) -> None:
        (tmp_path / "pair" / "0.events.jsonl").unlink()

    result = run(1, before_go=take_away)
    assert "its event log cannot be read (No such file or directory)" in result.reason


NO_EVENTS = [
    b"\xff\xfe", b"caf\xe9", b'{"event": "caf\xe9"}', b"", b"5", b"[]", b"null", b'{"event": []}',
    b'{"event": 5}', b'{"event": "loaded', b"[" * 100_000, b'{"time_seconds": 1}',
    b'{"event": "job"}', b'{"event": "job", "index": 0, "start_seconds": 1, "end_seconds": NaN}',
    b'{"event": "units", "kind": "s", "latency": false, "start_seconds": 1}',
    b'{"event": "units", "kind": "s", "latency": false, "start_seconds": [1],'
    b' "duration_seconds": []}', b'{"event": "ready", "identity": "me"}',
    b'{"event": "error", "status": "tired"}', b'{"event": "done", "host_cpu_seconds": "many"}',
    b'{"event": "loaded", "time_seconds": "late"}', b'{"event": "processes"}',
]  # fmt: skip


@pytest.mark.parametrize("line", NO_EVENTS, ids=range(len(NO_EVENTS)))
def test_a_line_that_is_no_event_of_the_contract_is_an_error(line: bytes) -> None:
    event = event_log.parse_event(line)
    assert (event["event"], event["status"]) == ("error", "failed")
    assert event["message"].startswith("not an event: ")
    assert len(event["message"]) < 250


@pytest.mark.parametrize(
    "line", [b'{"event": "of a later contract", "x": 1}', b'{"event": "job", "index": 0, '
             b'"start_seconds": 1, "end_seconds": 2.5, "figures": {"loss": NaN}}']
)  # fmt: skip
def test_what_is_unknown_in_an_event_does_no_harm(line: bytes) -> None:
    event = event_log.parse_event(line)
    assert event["event"] in ("of a later contract", "job")
    assert event.get("figures") in (None, {"loss": None})


def test_half_a_character_is_replaced_and_a_whole_one_kept() -> None:
    said = json.dumps({"event": "error", "message": "caf\udce9.png \U0001f600 \xe9"}).encode()
    assert event_log.parse_event(said)["message"] == "caf?.png \U0001f600 \xe9"


def test_units_across_the_windows_edges_count_by_their_share() -> None:
    events = [
        {"event": "units", "kind": "step", "latency": False,
         "start_seconds": [0.0, 0.5, 2.0, 2.9], "duration_seconds": [0.9, 1.0, 0.5, 0.4]},
        {"event": "units", "kind": "cell", "latency": True,
         "start_seconds": [0.75, 1.5, 2.5], "duration_seconds": [0.5, 0.25, 1.0]},
        {"event": "units", "kind": "first", "latency": "apart",
         "start_seconds": [1.0], "duration_seconds": [0.125]},
        # Requests at an offered rate are no work: each counts where it ends.
        {"event": "units", "kind": "request", "latency": True,
         "start_seconds": [0.5, 2.9], "duration_seconds": [0.75, 0.25]},
    ]  # fmt: skip
    units, latency_ms = event_log.units_in_window(events, 1.0, 3.0)
    assert units == {
        "step": Units(count=pytest.approx(1.75), seconds=pytest.approx(1.1), latency=False),
        "cell": Units(count=2.0, seconds=1.0, latency=True),
        "first": Units(count=1, seconds=0.125, latency=True),
        "request": Units(count=1, seconds=0.75, latency=True),
    }
    assert latency_ms == {None: [500.0, 250.0, 750.0], "first": [125.0]}
    assert event_log.units_in_window([], 0.0, 1.0) == ({}, {})


def test_a_run_of_a_command_that_was_cut_off_counts_by_its_share_of_a_mean_one() -> None:
    events = [
        {"event": "units", "kind": "command", "latency": False,
         "start_seconds": [0.0, 4.0], "duration_seconds": [4.0, 4.0]},
        {"event": "unfinished", "kind": "command", "latency": False, "start_seconds": 8.0},
    ]  # fmt: skip
    units, _ = event_log.units_in_window(events, 2.0, 9.0)
    assert units == {"command": Units(count=0.5 + 1 + 0.25, seconds=7.0, latency=False)}


def test_a_line_that_is_still_being_written_waits_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "events.jsonl"
    follower = event_log.LineFollower(path)
    path.write_text('{"event": "loaded"}\n{"event": "rea')
    assert follower.poll() == [b'{"event": "loaded"}']
    with path.open("a") as stream:
        stream.write('dy"}\n')
    assert follower.poll() == [b'{"event": "ready"}']
    monkeypatch.setattr(event_log, "MOST_LINE_BYTES", 1000)
    with path.open("a") as stream:
        stream.write("x" * 1001)
    assert follower.poll() == [b"x" * 1001]
    assert follower.poll() == []


def test_the_tail_of_stderr_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "stderr"
    path.write_text("".join(f"line {i}\n" for i in range(100000)))
    assert event_log.tail_of(path, 3) == ["line 99997", "line 99998", "line 99999"]
    assert event_log.tail_of(tmp_path / "missing") == []
