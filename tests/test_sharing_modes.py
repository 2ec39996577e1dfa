"""Sharing modes: what is refused and with which advice, and what proves a client's mode."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mode_script_runner import NOBODY
from suite_bench import CONTROL_PROGRAM

from benchmarking.hardware.nvidia_tools import ask_mps_control, time_slice
from benchmarking.modes import mode_scripts
from benchmarking.modes import mps as mps_mode
from benchmarking.modes.choice import make_mode
from benchmarking.modes.mig import MigMode
from benchmarking.modes.mode_scripts import (
    is_set_up,
    lock_reason,
    read_state,
)
from benchmarking.modes.mps import MpsMode, PartitionedMpsMode
from benchmarking.modes.sharing_mode import (
    ModeNotInForceError,
    ProcessLists,
    SharingMode,
    is_own_pid_namespace,
)
from benchmarking.modes.whole_gpu import WholeGpuMode

UUID = "GPU-00000000-1111-2222-3333-444444444444"
OTHER_UUID = "GPU-99999999-1111-2222-3333-444444444444"
EMPTY = Path("/empty")
# Somebody's process that lives here, and pids that no process here has (over pid_max).
LIVING = 1
FOREIGN, ALSO_FOREIGN = 2**22 + 1, 2**22 + 2
H100 = {
    "index": 0, "uuid": UUID, "name": "NVIDIA H100", "compute_mode": "Default",
    "mig_mode": {"current": "Disabled", "pending": "Disabled"}, "mig_devices": [],
}  # fmt: skip
INSTANCES = [
    {"uuid": f"MIG-aaaaaaaa-0000-0000-0000-00000000000{i}", "multiprocessor_count": 16}
    for i in range(2)
]
H100_MIG = {
    **H100, "mig_mode": {"current": "Enabled", "pending": "Enabled"}, "mig_devices": INSTANCES,
}  # fmt: skip


def identity(pid: int = 11, **changes: Any) -> dict[str, Any]:
    return {"pid": pid, "device": "cuda", "gpu_uuid": UUID, "multiprocessor_count": 132, **changes}


def lists(compute: set[int] | None, mps: set[int] | None) -> ProcessLists:
    return ProcessLists(*(None if pids is None else frozenset(pids) for pids in (compute, mps)))


def whole_gpu(facts: dict | None = None, *, own_namespace: bool = False) -> WholeGpuMode:
    return WholeGpuMode(
        "time-slicing", lambda: facts or H100, EMPTY, 4, own_pid_namespace=own_namespace
    )


def mig(facts: dict | None = None, clients: int = 2) -> MigMode:
    return MigMode("mig", lambda: facts or H100_MIG, EMPTY, clients)


def mps(*candidates: str, facts: dict | None = None) -> MpsMode:
    mode = MpsMode("mps", lambda: facts or H100, EMPTY, own_pid_namespace=False)
    mode.candidates = list(candidates)
    return mode


NAMES = [f"{UUID}/{name}" for name in ("Dx4AAAAAAAAA", "Dx8AAAAAAAAA")]


def partitioned(pipe: str, clients: int = 2) -> PartitionedMpsMode:
    mode = PartitionedMpsMode("mps", lambda: H100, EMPTY, clients, own_pid_namespace=False)
    mode.recorded = {"pipe_directory": pipe, "partitions": ",".join(NAMES)}
    return mode


def partition_table(*rows: str) -> str:
    head = "GPU            Partition  free   used   free  used  clients"
    units = "                          chunk  chunk  SM    SM"
    return "\n".join([head, units, "GPU-00000000  -  0  16  0  128  -", *rows])


def cpu_demo() -> SharingMode:
    return make_mode("cpu-demo", lambda: None, clients=1, no_mps_folder=EMPTY, environment={})


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Put a control program on PATH; returns a way to start a daemon with clients ("11 12")."""
    program = tmp_path / "bin" / "nvidia-cuda-mps-control"
    program.parent.mkdir()
    program.write_text(CONTROL_PROGRAM)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")

    def start(clients: str, name: str = "pipe", partitions: str = "Unknown command") -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "partitions").write_text(partitions)
        (folder / "running").write_text(clients.replace(" ", "\n") + "\n" * bool(clients))
        return str(folder)

    return start


# --- preconditions ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "advice"),
    [
        (whole_gpu({**H100, "mig_mode": {"current": "Enabled"}}), "gpu-configs/disable_mig.sh"),
        (whole_gpu({**H100, "compute_mode": "Exclusive_Process"}), "gpu-configs/disable_mps.sh"),
        (whole_gpu({**H100, "compute_mode": "Prohibited"}), "gpu-configs/setup_time_slicing.sh 4"),
        (mps("/no/such/folder"), "gpu-configs/enable_mps.sh"),
        (mps("/no/such/folder", facts=H100_MIG), "gpu-configs/disable_mig.sh"),
        (mig(H100), "setup_mig.sh 1g.5gb 2"),
        (mig(clients=4), "2 MIG instances for 4 clients"),
        (whole_gpu({"uuid": None}), "the driver answers for the GPU: no (look for Xid"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_mode_that_is_not_in_force_is_refused_with_what_mends_it(
    control: Callable, mode: SharingMode, advice: str
) -> None:
    with pytest.raises(ModeNotInForceError, match=re.escape(advice)):
        mode.require()


def test_a_card_without_mig_gets_no_advice_to_switch_it_on() -> None:
    without = {**H100, "mig_mode": None}
    assert all(item.ok for item in whole_gpu(without).require())
    with pytest.raises(ModeNotInForceError, match="not supported") as refusal:
        mig(without).require()
    assert "setup_mig" not in str(refusal.value)


def test_a_mig_mode_that_was_not_told_is_neither_off_nor_missing() -> None:
    untold = {**H100, "mig_mode": {"current": None, "pending": None}}
    (found,) = [item for item in whole_gpu(untold).require() if item.check.startswith("MIG mode")]
    assert (found.found, found.ok) == ("unknown", None)
    with pytest.raises(ModeNotInForceError, match="MIG mode is Enabled: unknown"):
        mig(untold).require()


def test_a_daemon_with_static_partitions_takes_only_clients_that_have_one(
    control: Callable,
) -> None:
    rows = ["GPU-00000000  Dx4AAAAA  -  8  -  64  No", "GPU-00000000  Dx8AAAAA  -  8  -  64  No"]
    mode = partitioned(control("", partitions=partition_table(*rows)))
    assert all(item.ok for item in mode.require())
    assert [mode.client_environment(i)["CUDA_MPS_SM_PARTITION"] for i in (0, 1)] == NAMES
    pipe = str(mode.pipe_directory())
    with pytest.raises(ModeNotInForceError, match="started for clients with one"):
        mps(pipe).require()
    recorded = mps(pipe)
    recorded.recorded = {"pipe_directory": pipe, "partitions": ""}
    (Path(pipe) / "partitions").write_text("nothing yet")
    with pytest.raises(ModeNotInForceError, match="started for clients with one"):
        recorded.require()


@pytest.mark.parametrize(
    ("partitions", "said"),
    [("Unknown command", "0 static partitions for 4 clients; run ./gpu-configs/disable_mps.sh && "
      "./gpu-configs/enable_mps.sh --static-partitions 4"),
     (partition_table("GPU-00000000  Dx4AAAAA  -  8  -  64  No"), "1 static partitions for 4"),
     (None, "an MPS control daemon answers: none")],
    ids=["a plain daemon", "one of two is left", "no daemon"],
)  # fmt: skip
def test_fewer_static_partitions_than_clients_are_refused_with_both_numbers(
    control: Callable, partitions: str | None, said: str
) -> None:
    mode = partitioned("/nonexistent" if partitions is None else
                       control("", partitions=partitions), clients=4)  # fmt: skip
    with pytest.raises(ModeNotInForceError, match=re.escape(said)) as raised:
        mode.require()
    assert str(raised.value).endswith("enable_mps.sh --static-partitions 4")


def test_mps_takes_the_first_directory_that_answers_and_asks_it_once(
    control: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, stale = control(""), tmp_path / "stale"
    stale.mkdir()
    (stale / "control").write_text("")  # a socket file proves no daemon
    mode = mps("/no/such/folder", str(stale), running)
    asked, ask = [], mps_mode.ask_mps_control
    monkeypatch.setattr(
        mps_mode, "ask_mps_control", lambda *words: asked.append(words) or ask(*words)
    )
    assert all(item.ok for item in mode.require())
    assert asked.count((running, "get_server_list")) == 1
    assert mode.client_environment(0) == {
        "CUDA_VISIBLE_DEVICES": UUID, "CUDA_MPS_PIPE_DIRECTORY": running}  # fmt: skip


# --- proof ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "compute", "mps_pids", "own_namespace", "verdict"),
    [
        (identity(), {11, 12}, set(), False, "verified"),
        (identity(), {11}, None, False, "verified"),
        (identity(), {LIVING}, set(), False, "invalid"),
        (identity(), {11}, {11}, False, "invalid"),
        (identity(), set(), {11}, False, "invalid"),
        (identity(), None, None, False, "unverified"),
        (identity(), set(), set(), False, "unverified"),
        (identity(), {FOREIGN}, set(), False, "unverified"),
        (identity(), {2**32 - 1}, set(), False, "unverified"),
        # which GPU it saw
        (identity(gpu_uuid=OTHER_UUID), {11}, set(), False, "invalid"),
        (identity(gpu_uuid=None), {11}, set(), False, "unverified"),
        (identity(device="cpu"), {11}, set(), False, "invalid"),
        # pids of another namespace, and one where a neighbor was matched
        (identity(), {LIVING}, set(), True, "unverified"),
        (identity(), {12}, set(), True, "invalid"),
        # a command, which says nothing of itself
        ({"processes": [11, 13]}, {13}, set(), False, "verified"),
        ({"processes": [11, 13]}, {12}, set(), False, "unverified"),
        ({"processes": [11, 13]}, {13}, {13}, False, "invalid"),
    ],
)
def test_a_time_sliced_client_is_a_plain_compute_process(
    seen: dict, compute: set | None, mps_pids: set | None, own_namespace: bool, verdict: str
) -> None:
    mode = whole_gpu(own_namespace=own_namespace)
    proof = mode.prove(0, seen, frozenset({11, 12}), lists(compute, mps_pids))
    assert proof.verdict == verdict
    assert (proof.reason == "") is (verdict == "verified")


@pytest.mark.parametrize(
    ("daemon", "nvml", "verdict"),
    [("11 12", {11}, "verified"), ("11", set(), "verified"), ("", {11}, "verified"),
     (f"{LIVING}", {LIVING}, "invalid"), (f"{LIVING}", None, "invalid"), ("", set(), "invalid"),
     (f"{FOREIGN}", set(), "invalid"), ("12", {12}, "invalid"),
     # as many as there are clients, which cannot be matched
     (f"{FOREIGN} {ALSO_FOREIGN}", {FOREIGN, ALSO_FOREIGN}, "unverified")],
)  # fmt: skip
def test_an_mps_client_is_known_to_nvml_or_to_the_daemon(
    control: Callable, daemon: str, nvml: set | None, verdict: str
) -> None:
    mode = mps(control(daemon))
    mode.observe()
    compute = {11} if verdict != "unverified" else nvml
    proof = mode.prove(0, identity(), frozenset({11, 12}), lists(compute, nvml))
    assert proof.verdict == verdict
    if nvml == {12}:
        assert "pid 11 is not among [12]" in proof.reason
    if verdict == "unverified":
        assert "cannot be matched" in proof.reason
        assert proof.evidence[-1].found == "2"


@pytest.mark.parametrize(
    ("row", "changes", "verdict"),
    [("GPU-00000000  Dx4AAAAA  -  8  -  64  Yes", {}, "verified"),
     ("GPU-00000000  Dx4AAAAA  -  8  -  64  No", {}, "invalid"),
     ("GPU-00000000  Dx4AAAAA  -  8  -  64  Yes", {"multiprocessor_count": 132}, "invalid"),
     ("GPU-00000000  Dx4AAAAA  -  8  -  64  Yes", {"multiprocessor_count": None}, "unverified"),
     ("GPU-00000000  Dx4AAAAA  -  8  -  -   Yes", {}, "unverified"),
     ("GPU-00000000  Dx4AAAAA  -  8  -  64  ?", {}, "unverified"),
     ("GPU-99999999  Dx4AAAAA  -  8  -  64  Yes", {}, "unverified"),
     ("GPU-00000000  Dx8AAAAA  -  8  -  64  Yes", {}, "unverified"),
     ("GPU-00000000  Dx  -  8  -  64  Yes\nGPU-00000000  Dx  -  8  -  64  Yes", {}, "unverified"),
     ("GPU-00000000  Dx4AAAAA  -  8  -  64  Yes", {"pid": LIVING}, "invalid")],
    ids=["its own", "not in use", "more multiprocessors", "a client that does not say",
         "a row that does not say", "neither yes nor no", "another card's", "another partition's",
         "two that it can be", "no client of the daemon"],
)  # fmt: skip
def test_a_client_on_a_static_partition_uses_it_and_sees_its_multiprocessors(
    control: Callable, row: str, changes: dict, verdict: str
) -> None:
    mode = partitioned(control("11 12", partitions=partition_table(row)))
    mode.observe()
    seen = identity(**{"multiprocessor_count": 64, **changes})
    assert mode.prove(0, seen, frozenset({11, 12}), lists({11}, {11})).verdict == verdict


def test_a_command_on_a_static_partition_stays_unverified(control: Callable) -> None:
    row = "GPU-00000000  Dx4AAAAA  -  8  -  64  No"  # it may begin to use the GPU later
    mode = partitioned(control("11", partitions=partition_table(row)))
    mode.observe()
    proof = mode.prove(0, {"processes": [11]}, frozenset({11}), lists({11}, {11}))
    assert proof.verdict == "unverified"


@pytest.mark.parametrize(
    ("nvml", "verdict"), [({13}, "verified"), ({12}, "invalid"), (None, "unverified")]
)
def test_a_command_under_mps_is_invalid_only_where_the_list_knows_others(
    control: Callable, nvml: set | None, verdict: str
) -> None:
    mode = mps(control("12"))
    mode.observe()
    command = {"processes": [11, 13]}
    proof = mode.prove(0, command, frozenset({11, 12, 13}), lists({12, 13}, nvml))
    assert proof.verdict == verdict


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [({"gpu_uuid": INSTANCES[0]["uuid"]}, "verified"),
     ({"gpu_uuid": INSTANCES[0]["uuid"].replace("MIG-", "GPU-")}, "verified"),
     ({"gpu_uuid": INSTANCES[1]["uuid"]}, "invalid"),
     ({"gpu_uuid": INSTANCES[0]["uuid"], "multiprocessor_count": 132}, "invalid"),
     ({"gpu_uuid": UUID}, "unverified"), ({"gpu_uuid": None}, "unverified")],
)  # fmt: skip
def test_a_mig_client_sees_its_own_instance(changes: dict, verdict: str) -> None:
    seen = identity(**{"multiprocessor_count": 16, **changes})
    assert mig().prove(0, seen, frozenset({11}), lists(None, None)).verdict == verdict


def test_a_mig_instance_that_vanished_is_invalid_and_the_cpu_demonstration_proves_nothing() -> None:
    mode = mig({**H100_MIG, "mig_devices": INSTANCES[:1]})
    assert mode.prove(1, identity(), frozenset({11}), lists(None, None)).verdict == "invalid"
    small = {**H100_MIG, "mig_devices": [{**INSTANCES[0], "profile": "1g.10gb"}]}
    layout = ("2g.20gb", "1g.10gb")  # whose first instance is gone
    assert MigMode("mig", lambda: small, EMPTY, 2, layout=layout).instances() == []
    proof = cpu_demo().prove(0, identity(device="cpu"), frozenset({11}), lists(None, None))
    assert proof.verdict == "not_applicable"
    assert cpu_demo().require()


@pytest.mark.parametrize(
    ("inode", "second", "is_own"),
    [(4026531836, "kthreadd", False), (4026532000, "kthreadd", True),
     (4026531836, "bash", True), (4026531836, None, True)],
)  # fmt: skip
def test_a_pid_namespace_is_the_first_one_only_with_its_kernel_threads(
    tmp_path: Path, inode: int, second: str | None, is_own: bool
) -> None:
    (tmp_path / "self/ns").mkdir(parents=True)
    (tmp_path / "self/ns/pid").symlink_to(f"pid:[{inode}]")
    if second is not None:
        (tmp_path / "2").mkdir()
        (tmp_path / "2/comm").write_text(f"{second}\n")
    assert is_own_pid_namespace(tmp_path) is is_own


# --- process lists ----------------------------------------------------------------------------


def test_process_lists_unite_the_samples_of_the_span() -> None:
    samples = [
        {"time_seconds": 1.0, "compute_pids": [{"pid": 1, "used_memory_mib": 5}], "mps_pids": []},
        {"time_seconds": 2.0},
        {"time_seconds": 3.0, "compute_pids": [{"pid": 2, "used_memory_mib": None}],
         "mps_pids": [{"pid": 3, "used_memory_mib": 5}]},
        {"time_seconds": 9.0, "compute_pids": [{"pid": 9, "used_memory_mib": 5}], "mps_pids": []},
        {"time_seconds": 20.0, "compute_pids": None, "mps_pids": None},
    ]  # fmt: skip
    assert ProcessLists.from_samples(samples, 0.5, 5.0) == lists({1, 2}, {3})
    # what NVML does not give is unknown and not empty
    assert ProcessLists.from_samples(samples, 19, 21) == lists(None, None)


# --- state of the mode scripts ----------------------------------------------------------------


def write_state(folder: Path, mode: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{mode}-{UUID}.state").write_text(text)


def test_state_is_read_from_the_folder_of_the_environment_and_else_from_where_sudo_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = os.fsdecode("/a=b\u2028\x85".encode() + b"\xe9")  # which a folder may be called
    (tmp_path / f"mps-{UUID}.state").write_bytes(
        os.fsencode(f"pipe_directory={folder}\nuser=me\nnonsense\n")
    )
    environment = {"GPU_SHARING_STATE_DIR": str(tmp_path)}
    assert read_state("mps", UUID, environment) == {"pipe_directory": folder, "user": "me"}
    assert read_state("mig", UUID, environment) == {}
    # sudo does not pass XDG_STATE_HOME on
    monkeypatch.setenv("HOME", str(tmp_path))
    write_state(tmp_path / ".local/state/gpu-sharing-bench", "mps", "pipe_directory=/p\n")
    state = read_state("mps", UUID, {"XDG_STATE_HOME": str(tmp_path / "other")})
    assert state == {"pipe_directory": "/p"}


def test_the_pipe_directory_is_the_recorded_the_inherited_or_this_users_default_one(
    tmp_path: Path, control: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    default, recorded, inherited = (control("", n) for n in ("default", "recorded", "inherited"))
    monkeypatch.setattr(mps_mode, "DEFAULT_PIPE_DIRECTORY", Path(default))
    environment = {"GPU_SHARING_STATE_DIR": str(tmp_path)}

    def pipe_directory() -> str:
        mode = make_mode(
            "mps", lambda: H100, clients=4, no_mps_folder=EMPTY, environment=environment
        )
        return mode.client_environment(0)["CUDA_MPS_PIPE_DIRECTORY"]

    assert pipe_directory() == ""
    (Path(default) / "control").touch()
    assert pipe_directory() == default
    with monkeypatch.context() as another_user:
        another_user.setattr(mps_mode.os, "geteuid", lambda: os.stat(default).st_uid + 1)
        assert pipe_directory() == ""
    environment["CUDA_MPS_PIPE_DIRECTORY"] = inherited
    assert pipe_directory() == inherited
    write_state(tmp_path, "mps", f"pipe_directory={recorded}\n")
    assert pipe_directory() == recorded


TABLE = """| GPU compute policies:               |
|   0   Timeslice       Default       |
|  10   Timeslice       Long          |"""


@pytest.mark.parametrize(
    ("index", "said", "status", "found"),
    [(0, TABLE, 0, "Default"), (10, TABLE, 14, "Long"), (1, TABLE, 0, None), (0, "", 3, None)],
)
def test_the_time_slice_is_the_drivers_word_whatever_its_exit_status_and_else_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    index: int, said: str, status: int, found: str | None,
) -> None:  # fmt: skip
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<END\n{said}\nEND\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert time_slice({"index": index}) == found


def test_settings_are_locked_by_the_variable_or_by_roots_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mode_scripts, "LOCK_OF_ROOT", tmp_path / "lock")
    assert lock_reason({}) is None
    assert lock_reason({"GPU_SETTINGS_LOCKED": "1"}) == "GPU_SETTINGS_LOCKED=1"
    (tmp_path / "lock").touch()
    assert lock_reason({}) == str(tmp_path / "lock")


def test_settings_of_the_card_count_as_set_up_only_in_roots_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mode_scripts, "STATE_OF_ROOT", tmp_path / "root")
    write_state(tmp_path / "user", "mig", "previous_mig_mode=Disabled\n")
    as_user = {"GPU_SHARING_STATE_DIR": str(tmp_path / "user")}
    if os.geteuid() == 0:
        as_user["SUDO_UID"] = str(NOBODY.pw_uid)
    assert not is_set_up("mig", UUID, as_user)
    if os.geteuid() == 0:
        write_state(tmp_path / "root", "mig", "previous_mig_mode=Disabled\n")
        write_state(tmp_path / "root", "time-slice", "set=Short\n")
        assert is_set_up("mig", UUID, as_user)
        assert is_set_up("time-slicing", UUID, as_user)


def test_no_program_means_no_daemon_and_one_that_answers_in_other_words_is_named_and_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert ask_mps_control("/x", "ps") is None
    program = tmp_path / "nvidia-cuda-mps-control"
    program.write_text(
        '#!/bin/sh\necho "Unknown command (protocol ${CUDA_MPS_PROTOCOL_VERSION-2})"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_MPS_PROTOCOL_VERSION", "3")
    assert ask_mps_control("/pipe", "get_server_list") == "Unknown command (protocol 2)\n"
    assert mps("/pipe").pipe_directory() is None
    with pytest.raises(ModeNotInForceError, match=r"/pipe: a daemon that answers in other words"):
        mps("/pipe").require()


def test_a_list_of_clients_that_could_not_be_asked_for_is_unknown_and_not_empty(
    control: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = control("11 12")
    assert mps_mode.mps_clients(directory) == {11, 12}
    ask = mps_mode.ask_mps_control
    monkeypatch.setattr(
        mps_mode, "ask_mps_control", lambda pipe, asked: None if asked == "ps" else ask(pipe, asked)
    )
    assert mps_mode.mps_clients(directory) is None
