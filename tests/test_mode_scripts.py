"""The scripts of gpu-configs/ on pretended machines: what users see, and what is left on the card.

Most tests are rows: steps that lead somewhere, a command, its exit code, what it says, and what is
in force afterwards.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mode_script_runner import (
    AS_NOBODY,
    MIG_OFF,
    MIG_ON,
    MPS_OFF,
    MPS_ON,
    NOBODY,
    RESET,
    SCRIPTS,
    SECOND,
    STATUS,
    TS,
    UNDO,
    UUID,
    ModeScripts,
    Row,
    as_delivered,
    check,
    client,
    daemon,
    damaged,
    ended,
    forgotten_ids,
    gpu,
    has,
    instance,
    machine,
    needs_real_root,
    needs_root,
    no_compute_instances,
    no_rules,
    process,
    refused,
    rows,
    rule,
    untouched,
    without_ps,
    without_random_names,
)  # fmt: skip
from waiting import wait_until

pytestmark = needs_root

SET_SLICE = "nvidia-smi compute-policy -i * --set-timeslice *"
SET_MODE = "nvidia-smi -i * -c *"
SWITCH, CREATE = "nvidia-smi -i * -mig *", "nvidia-smi mig -i * -cgi *"
DESTROY = "nvidia-smi mig -i * -dgi *"
START, QUIT = "nvidia-cuda-mps-control -d", "nvidia-cuda-mps-control < quit"
QUESTION = "nvidia-cuda-mps-control < get_default_active_thread_percentage"
CLIENTS = "nvidia-cuda-mps-control < get_client_list *"
QUERY, APPS = "nvidia-smi *--query-gpu=*", "nvidia-smi *--query-compute-apps=*"
PRIVILEGE = "Insufficient Permissions"
NO_DAEMON = "Cannot find MPS control daemon process"
BROKEN = "Failed to initialize NVML: Unknown Error"
INFOROM = "WARNING: infoROM is corrupted at gpu 0000:00:06.0"
OLD_SMI = ["compute_cap"]
MIG_IS_ON = gpu(mig_current="Enabled", mig_pending="Enabled")
ROOTS = {"uid": 0, "user": "root"}

# --- what all scripts have in common --------------------------------------------------------------


def test_every_script_of_the_folder_is_tested_here(scripts: ModeScripts) -> None:
    folder = scripts.project / "gpu-configs"
    assert {path.name for path in folder.glob("*.sh")} == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_usage_and_a_missing_driver_are_told_alike_by_every_script(
    scripts: ModeScripts, script: str
) -> None:
    scripts.machine.change(driver="not-loaded")
    told = scripts.run(script, "--help")
    assert told.returncode == 0
    assert told.stdout.startswith("Usage: ")
    for word in ("--dry-run", "--gpu INDEX_OR_UUID", "--help", "Exit codes"):
        assert word in told.stdout
    for arguments, words in ((["--nonsense"], "unknown option: --nonsense"),
                             (["--gpu"], "--gpu needs a value")):  # fmt: skip
        refused(scripts.run(script, *SCRIPTS[script], *arguments), 2, words)
    assert scripts.machine.calls() == []
    refused(scripts.run(script, *SCRIPTS[script]), 3, "couldn't communicate with the NVIDIA driver")
    scripts.machine.change(driver="ok")
    other = scripts.run(script, *SCRIPTS[script], "--gpu", "7")
    refused(other, 3, "there is no GPU '7'", UUID)
    assert scripts.machine.changing_calls() == []


@pytest.mark.parametrize(
    "inherited",
    [{"POSIXLY_CORRECT": "1"}, {"CDPATH": "..:/tmp"}, {"TMOUT": "1"}, {"GLOBIGNORE": "*"},
     {"SHELLOPTS": "noglob:noclobber:xtrace"}, {"BASHOPTS": "failglob:nocasematch"},
     {"BASH_ENV": "/nonexistent/x"}, {"COLUMNS": "20", "PS_PERSONALITY": "bsd"},
     {"BASH_FUNC_stat%%": "() { echo 0 600 directory; }"}, {"IFS": "/"}, {"LC_ALL": "tr_TR.UTF-8"},
     {"CUDA_MPS_PROTOCOL_VERSION": "3"}, {"CUDA_VISIBLE_DEVICES": "3"},
     {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "10", "CUDA_MPS_PIPE_DIRECTORY": "/nonexistent"}],
    ids=lambda inherited: "+".join(inherited),
)  # fmt: skip
def test_what_a_shell_inherits_changes_nothing(
    scripts: ModeScripts, inherited: dict[str, str]
) -> None:
    scripts.environment |= inherited
    enabled = scripts.must(MPS_ON, "--percentage", "50")
    assert "percentage:      50.0" in enabled.stdout
    (found,) = scripts.machine.state()["mps"].values()
    assert (found["visible_devices"], found["protocol"]) == (None, 2)
    scripts.must(MPS_OFF)
    as_delivered(scripts)


@pytest.mark.parametrize(
    ("before", "command"),
    [
        ([], [TS, "4", "--timeslice", "long"]),
        ([[TS, "4", "--timeslice", "long"]], [RESET]),
        ([], [MPS_ON, "--exclusive", "--percentage", "25"]),
        ([[MPS_ON]], [MPS_ON, "--exclusive", "--percentage", "25"]),
        ([[MPS_ON, "--exclusive"]], [MPS_OFF]),
        ([], [MIG_ON, "1g.5gb", "4"]),
        ([[MIG_ON, "1g.10gb", "2"]], [MIG_OFF]),
    ],
)
def test_a_dry_run_says_what_would_be_done_and_locked_settings_forbid_it(
    scripts: ModeScripts, before: list[list[str]], command: list[str]
) -> None:
    for earlier in before:
        scripts.must(*earlier)
    scripts.machine.forget_calls()
    files = scripts.all_files()
    dry = scripts.must(*command, "--dry-run")
    refused(
        scripts.run(*command, GPU_SETTINGS_LOCKED="1"),
        5,
        "GPU_SETTINGS_LOCKED=1 says that others share",
    )
    scripts.root_lock.parent.mkdir(parents=True)
    scripts.root_lock.touch()
    refused(scripts.run(*command), 5, f"{scripts.root_lock} says that others share")
    scripts.root_lock.unlink()
    assert scripts.machine.changing_calls() == []
    assert scripts.all_files() == files
    # The plan is the deed: what the real run logs is what the dry run has promised.
    promised = [
        line.removeprefix("would run: ")
        for line in without_random_names(dry.stdout).splitlines()
        if line.startswith("would run: ")
    ]
    real = without_random_names(scripts.must(*command).stderr)
    done = [line.removeprefix("run: ") for line in real.splitlines() if line.startswith("run: ")]
    # Ids of instances are only known when they are there; they are saved at the end.
    assert promised
    assert done[: len(promised)] == promised
    assert all(extra.startswith("save ") for extra in done[len(promised) :])


def test_without_nvidia_smi_the_exit_code_is_3(scripts: ModeScripts, tmp_path: Path) -> None:
    for program in ("bash", "env", "dirname", "id", "getent", "cat", "stat", "ps"):
        (tmp_path / program).symlink_to(shutil.which(program) or program)
    refused(
        scripts.run(STATUS, PATH=str(tmp_path), HOME=str(tmp_path)), 3, "nvidia-smi was not found"
    )


# --- arguments ------------------------------------------------------------------------------------

PERCENTAGE = "over 0 and up to 100"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        *(([TS, *given], "CLIENTS must be a number") for given in ([], ["0"], ["4x"], ["10000"])),
        ([TS, "four"], "CLIENTS must be a number from 1 to 9999, not 'four'"),
        ([TS, "4", "8"], "unexpected argument: 8"),
        ([MPS_ON, "4"], "unexpected argument: 4"),
        ([MPS_ON, "--percentage", ""], "--percentage needs a value"),
        ([MPS_ON, "--exclusive=1"], "--exclusive takes no value"),
        ([TS, "4", "--timeslice", "tiny"], "default, short, medium or long"),
        ([TS, "4", "--timeslice"], "needs a value"),
        *(([MPS_ON, "--percentage", given], PERCENTAGE)
          for given in ("0", "-1", "101", "abc", "1e1", "nan")),
        ([MIG_ON], "a profile and a count"),
        ([MIG_ON, "1g.10gb", "2", "3"], "unexpected argument: 3"),
        *(([MIG_ON, "1g.10gb", given], "COUNT must be a number") for given in ("0", "many")),
        ([MIG_ON, "1g.10gb", "-3"], "unknown option: -3"),
        ([MIG_ON, "4", "1g.10gb"], "'4' is no MIG profile"),
        ([MIG_ON, "1g.10gb,2g.20gb", "2"], "takes no count"),
        ([MIG_ON, "1g.10gb;reboot", "2"], "is no MIG profile"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_wrong_arguments_are_exit_code_2_with_a_sentence_before_anything_is_asked(
    scripts: ModeScripts, command: list[str], words: str
) -> None:
    refused(scripts.run(*command), 2, words)
    assert scripts.machine.calls() == []


# --- what each script says and does --------------------------------------------------------------


@rows(
    # the driver and its cards
    Row("no GPU", (STATUS,), 3, ("No devices were found",), kind="no-gpu"),
    Row("a library of another version", (STATUS,), 3, ("Driver/library version mismatch",),
        before=(machine(driver="Driver/library version mismatch"),)),
    *(Row(f"a damaged infoROM: {command[0]} goes on and passes the warning on", command, 0,
          (words, INFOROM), before=(rule("nvidia-smi *", append=INFOROM),))
      for command, words in (
        ((MPS_ON,), "MPS is in force"), ((MIG_ON, "1g.10gb", "2"), "MIG is in force"),
        ((TS, "4", "--timeslice", "short"), "Short"), ((STATUS,), "in use by:     nobody"))),
    Row("a row and a nonsense exit status", (STATUS,), 0, ("mode in force: time-slicing",),
        before=(rule(QUERY, append="", exit=255),)),
    *(Row(f"an nvidia-smi without compute_cap: {script}", (script, *arguments), 0,
          before=(machine(unknown_fields=OLD_SMI),)) for script, arguments in SCRIPTS.items()),
    Row("an unknown compute capability is said where MPS needs it", (MPS_ON,), 0,
        ("does not tell the compute capability",), before=(machine(unknown_fields=OLD_SMI),)),
    Row("an nvidia-smi that knows no MIG", (MIG_ON, "1g.10gb", "2"), 4, ("has no MIG",), untouched,
        (machine(unknown_fields=["mig.mode.current", "mig.mode.pending", *OLD_SMI]),)),
    Row("GPU 0 of two is lost: the other is taken, the lost one named", (TS, "2"), 0,
        ("GPU is lost", f"in force on GPU 1 (NVIDIA H100 80GB HBM3, {SECOND})"),
        before=(gpu(lost=True),), kind="h100x2", then=((RESET, "--gpu", "1"),)),
    Row("GPU 0 of two is lost and the question to all fails", (STATUS, "--gpu", "1"), 0,
        ("Unknown Error", "mode in force: time-slicing"), kind="h100x2",
        before=(gpu(lost=True), rule("nvidia-smi --query-gpu=*", exit=255, text="Unknown Error"))),
    Row("the lost GPU is asked for", (STATUS, "--gpu", "0"), 3, ("there is no GPU '0'", "is lost"),
        before=(gpu(lost=True),), kind="h100x2"),
    Row("each GPU has its status", (STATUS,), 0, (UUID, SECOND), untouched, kind="h100x2"),
    Row("the GPU that was asked for is set up", (TS, "4", "--timeslice", "long", "--gpu", SECOND),
        0, ("GPU 1",), has(timeslice="Default"), kind="h100x2",
        then=((RESET,), (RESET, "--gpu", "1")),
        last=lambda scripts: scripts.machine.state()["gpus"][1]["timeslice"] == "Default"),
    Row("a GPU without MIG", (MIG_ON, "1g.5gb", "4"), 4, ("has no MIG",), untouched, kind="geforce",
        then=((MIG_OFF,),)),
    Row("a small GeForce can be shared by MPS", (MPS_ON,), 0, ("RTX 4060",), kind="geforce"),
    Row("a GPU too old for MPS", (MPS_ON,), 4, ("MPS needs compute capability 3.5",), untouched,
        kind="k40"),
    Row("a GPU without slices", (TS, "4", "--timeslice", "short"), 4, ("no time slice setting",),
        untouched, kind="k40", then=((TS, "4"), (RESET,)), last=as_delivered),
    # what could not be asked is neither none nor off
    Row("who uses the GPU, for --exclusive", (MPS_ON, "--exclusive"), 1,
        ("could not be asked, and --exclusive would shut them out", BROKEN), untouched,
        (process(), rule(APPS, exit=255, text=BROKEN))),
    Row("who uses the GPU, for MPS alone, is a warning", (MPS_ON,), 0,
        ("warning: who uses GPU 0", "could not be asked"), before=(rule(APPS, exit=4),)),
    Row("who uses the GPU, for MIG", (MIG_ON, "1g.10gb", "2"), 1, ("could not be asked", BROKEN),
        untouched, (rule(APPS, exit=255, text=BROKEN),)),
    Row("whether an MPS server is there", (TS, "2"), 1, ("could not be asked",), untouched,
        (rule(APPS, exit=0, text="[Not Supported]"),)),
    Row("status says so and is no success", (STATUS,), 1,
        (f"in use by:     could not be asked: {BROKEN}",), untouched,
        (rule(APPS, exit=255, text=BROKEN),), silent_on=("nobody",)),
    Row("processes, in status", (STATUS,), 1, ("MPS daemons:   could not be asked",),
        untouched, (without_ps,), silent_on=("MPS daemon:    none",)),
    Row("processes, for MPS", (MPS_ON,), 1, ("whether MPS daemons run could not be asked",),
        untouched, (without_ps,)),
    Row("the slice, in status", (STATUS,), 1, ("time slice:    could not be asked",), untouched,
        (rule("nvidia-smi compute-policy -l", exit=255, text=BROKEN),)),
    Row("the slice, to set it", (TS, "2", "--timeslice", "long"), 1, ("slice could not be asked",),
        untouched, (rule("nvidia-smi compute-policy -l", exit=0, text=""),)),
    Row("the slice, to put it back: what is saved stays", (RESET,), 1,
        ("slice could not be asked",), untouched,
        ((TS, "2", "--timeslice", "long"), rule("nvidia-smi compute-policy -l", exit=9)),
        then=(no_rules, (RESET,)), last=as_delivered),
    Row("a table of processes, to destroy instances", (MIG_OFF,), 1, ("could not be asked", BROKEN),
        untouched, ((MIG_ON, "1g.10gb", "2"), rule("nvidia-smi", exit=255, text=BROKEN)),
        then=(no_rules, (MIG_OFF,)), last=as_delivered),
    Row("instances, to destroy them", (MIG_OFF,), 1, ("the GPU instances of", "could not be asked"),
        untouched, ((MIG_ON, "1g.10gb", "2"), rule("nvidia-smi mig -lgi", exit=255, text=BROKEN)),
        then=(no_rules, (MIG_OFF,)), last=as_delivered),
    Row("profiles", (MIG_ON, "1g.10gb", "2"), 1, ("the MIG profiles and", BROKEN), untouched,
        (rule("nvidia-smi mig -lgip", exit=255, text=BROKEN),)),
    Row("places of profiles", (MIG_ON, "1g.10gb", "2"), 1, ("the MIG profiles and",), untouched,
        (rule("nvidia-smi mig -lgipp", exit=4, text=PRIVILEGE),)),
    Row("devices, in status", (STATUS,), 1, ("could not be asked: nothing",), untouched,
        ((MIG_ON, "1g.10gb", "2"), rule("nvidia-smi -L", exit=255, text="nothing"))),
    Row("no instances is told with either exit status", (MIG_OFF,), 0, (), as_delivered,
        ((MIG_ON, "1g.10gb", "2"), no_compute_instances,
         rule("nvidia-smi mig -lgi", exit=6, text="No MIG-enabled devices found."))),
    Row("clients of the daemon: it is not ended under them", (MPS_OFF,), 1,
        ("the clients of the MPS daemon at", "could not be asked: Timed out"), has(daemons=1),
        ((MPS_ON,), client(), rule(CLIENTS, exit=1, text="Timed out")),
        then=(no_rules, ended(938), (MPS_OFF,)), last=as_delivered),
    Row("the daemon of the last time, for a new one", (MPS_ON,), 1, ("asked: Connection refused",),
        untouched, ((MPS_ON,), rule(QUESTION, exit=1, text="Connection refused"))),
    Row("the daemon of the last time, for time slicing", (TS, "2"), 1, ("could not be asked",),
        untouched, ((MPS_ON,), rule(QUESTION, exit=124))),
    Row("the daemon, to end it: what is saved stays", (MPS_OFF,), 1, ("could not be asked",),
        untouched, ((MPS_ON,), rule(QUESTION, exit=0, text="Unknown command")),
        then=(no_rules, (MPS_OFF,)), last=as_delivered),
    Row("the daemon, in status", (STATUS,), 1, ("mode in force: not known", "could not be asked"),
        untouched, ((MPS_ON,), machine(others=[]), rule(QUESTION, exit=124)),
        silent_on=("MPS daemon:    none",)),
    # what is in the way is named, with the remedy, and nothing is changed
    *(Row(f"in the way of {command[0]}: {words}", command, 6, (words,), untouched, before)
      for command, words, *before in (
        ((TS, "4"), "sudo ./gpu-configs/disable_mig.sh", MIG_IS_ON),
        ((TS, "4"), "compute mode is Exclusive_Process", gpu(compute_mode="Exclusive_Process")),
        ((TS, "4"), "compute mode is Prohibited", gpu(compute_mode="Prohibited")),
        ((TS, "4"), "./gpu-configs/disable_mps.sh", (MPS_ON,)),
        ((TS, "4"), "user alice): nvidia-cuda-mps-server", daemon(user="alice"), client()),
        ((MPS_ON,), "sudo ./gpu-configs/disable_mig.sh", MIG_IS_ON),
        ((MPS_ON,), "compute mode is Prohibited", gpu(compute_mode="Prohibited")),
        ((MPS_ON,), "another user's MPS control", daemon(user="alice")),
        ((MPS_ON,), r"of user CORP\jane doe;", daemon(user=r"CORP\jane doe")),
        ((MPS_ON,), "(MPS protocol 3, which answers in other", daemon(**ROOTS, protocol=3)),
        ((MPS_ON,), "echo quit | nvidia-cuda-mps-control", daemon(**ROOTS)),
        ((MPS_ON, "--exclusive"), "pid 4242 (user alice): python3, 512 MiB", process(user="alice")),
        ((MIG_ON, "1g.10gb", "4"), "pid 4242 (user alice): python3", process(user="alice")),
        ((MIG_ON, "1g.10gb", "4"), "./gpu-configs/disable_mps.sh", (MPS_ON,)),
        ((MIG_ON, "1g.10gb", "4"), "pending Enabled", gpu(mig_pending="Enabled")),
        ((MIG_ON, "3g.40gb", "2"), "11 1g.10gb 4:1", instance()),
        ((MIG_ON, "2g.20gb", "2"), "sudo ./gpu-configs/disable_mig.sh",
         (MIG_ON, "1g.10gb", "4")))),
    Row("in the way of MIG: a client that is not listed", (MIG_ON, "1g.10gb", "4"), 6,
        ("In use by another client",), as_delivered, (gpu(mig_switch="in_use"),)),
    # time slicing
    Row("clients are recorded, the card is left alone", (TS, "4"), 0,
        ("Time slicing is in force", "clients:       4"),
        lambda scripts: scripts.saved("time-slicing") == {"gpu_uuid": UUID, "clients": "4"}),
    Row("a slice is set", (TS, "4", "--timeslice=short"), 0, ("Short",), has(timeslice="Short"),
        (gpu(timeslice="Medium"),), then=((RESET,),), last=has(timeslice="Medium")),
    Row("twice: the slice from before the first time is put back", (TS, "8", "--timeslice", "long"),
        0, (), has(timeslice="Long"), ((TS, "4", "--timeslice", "short"),)),
    Row("without a length the slice stays, and is still known", (TS, "8"), 0, ("Short",),
        has(timeslice="Short"), ((TS, "4", "--timeslice", "short"),)),
    Row("the length of before is nothing to put back", (TS, "8", "--timeslice", "default"), 0, (),
        lambda scripts: scripts.saved("time-slice") is None, ((TS, "4", "--timeslice", "short"),)),
    Row("a slice that somebody else has set since is left", (RESET,), 0, ("left as it is",),
        has(timeslice="Long"), ((TS, "4", "--timeslice", "short"), gpu(timeslice="Long"))),
    Row("nothing to reset", (RESET,), 0, ("nothing to undo",), untouched),
    Row("locked settings leave it usable", (TS, "4"), 0, (),
        environment={"GPU_SETTINGS_LOCKED": "1"}),
    Row("another user's daemon alone is a warning", (TS, "4"), 0, ("another user's MPS",),
        before=(daemon(user="alice"),), last=has(daemons=1)),
    Row("a driver that refuses root in a container", (TS, "4", "--timeslice", "short"), 5,
        (PRIVILEGE,), as_delivered, environment={"FAKE_GPU_UID": "65534"}),
    Row("a change that did not take", (TS, "4", "--timeslice", "short"), 1,
        ("the time slice is Default, not Short", "Successfully set"), as_delivered,
        (rule(SET_SLICE, exit=0, text="Successfully set timeslice policy."),)),
    # MPS
    Row("a daemon is started and named", (MPS_ON,), 0, ("MPS is in force", "percentage:      100"),
        has(daemons=1, compute_mode="Default")),
    Row("twice keeps the one daemon", (MPS_ON,), 0, ("answers already",), untouched, ((MPS_ON,),)),
    Row("a percentage is set", (MPS_ON, "--percentage=12.5"), 0, ("percentage:      12.5",),
        before=((MPS_ON, "--percentage", "25"),)),
    Row("a percentage that the daemon ignores", (MPS_ON, "--percentage", "25"), 1,
        ("percentage of 100.0, not 25",), as_delivered,
        (rule("nvidia-cuda-mps-control < set_default*", exit=0, text="100.0"),)),
    Row("exclusive", (MPS_ON, "--exclusive"), 0, ("undo:            sudo ./gpu-configs/disable",),
        has(compute_mode="Exclusive_Process")),
    Row("exclusive later and twice", (MPS_ON, "--exclusive"), 0, (), untouched,
        ((MPS_ON,), (MPS_ON, "--exclusive"))),
    Row("exclusive before stays so", (MPS_ON, "--exclusive"), 0, (), has(daemons=1),
        (gpu(compute_mode="Exclusive_Process"),), ((MPS_OFF,),),
        has(daemons=0, compute_mode="Exclusive_Process")),
    Row("after a daemon that died the mode of before is known", (MPS_ON,), 0,
        ("no longer answers",), has(daemons=1), ((MPS_ON, "--exclusive"), machine(mps={}))),
    Row("a daemon that died is cleaned up", (MPS_OFF,), 0, ("MPS is off",), as_delivered,
        ((MPS_ON,), machine(mps={}))),
    Row("a compute mode that somebody has set since is left", (MPS_OFF,), 0, ("left as it is",),
        has(compute_mode="Prohibited"), ((MPS_ON, "--exclusive"), gpu(compute_mode="Prohibited"))),
    Row("a daemon that takes its time", (MPS_ON,), 0, (), has(daemons=1),
        (rule(QUESTION, exit=1, text=NO_DAEMON, times=3),)),
    Row("a daemon that never answers", (MPS_ON,), 1, ("did not answer", "Failed to start"),
        as_delivered, (rule(START, exit=1, text="Failed to start"),)),
    Row("a program that starts nothing", (MPS_ON,), 1, (), as_delivered,
        (rule(START, exit=0, text=""),)),
    Row("a compute mode that the driver refuses", (MPS_ON, "--exclusive"), 5, (PRIVILEGE,),
        as_delivered, (rule(SET_MODE, exit=4, text=f"Unable to set: {PRIVILEGE}"),)),
    Row("a failure while the daemon ran leaves it", (MPS_ON, "--percentage", "25", "--exclusive"),
        1, (), has(daemons=1, compute_mode="Default"),
        ((MPS_ON, "--percentage", "50"), rule(SET_MODE, exit=0, text="All done.")),
        (no_rules, (MPS_ON,)), lambda scripts: "50.0" in scripts.must(MPS_ON).stdout),
    Row("another user's daemon stays", (MPS_OFF,), 0, ("left alone: MPS control daemon, pid",),
        untouched, (daemon(user="alice"),)),
    Row("a daemon of one's own started by hand stays", (MPS_OFF,), 0, ("left alone",), untouched,
        (daemon(**ROOTS),)),
    Row("a process that only calls itself so", (MPS_ON,), 0, (), has(daemons=1),
        (machine(others=[{"pid": 2**22 + 5, "uid": 1000, "user": "mallory", "comm": "sleep",
                          "args": "nvidia-cuda-mps-control 1000"}]),)),
    Row("a process whose program is another", (MPS_ON,), 0, (), has(daemons=1),
        (machine(others=[{"pid": os.getpid(), "uid": 1000, "user": "mallory",
                          "comm": "nvidia-cuda-mps", "args": "nvidia-cuda-mps-control -d"}]),)),
    Row("processes without MPS are a warning else", (MPS_ON,), 0,
        ("pid 4242 (user alice): python3", "will contend with its clients"),
        before=(process(user="alice"),)),
    Row("clients are listed and the daemon stays", (MPS_OFF,), 6, ("pid 938 (user root)",),
        has(daemons=1), ((MPS_ON,), client()), (ended(938), (MPS_OFF,)), as_delivered,
        environment={"GPU_SHARING_WAIT_SECONDS": "0"}),
    Row("a daemon that does not quit stays known", (MPS_OFF,), 1, ("still answers 0 s after quit",),
        has(daemons=1), ((MPS_ON,), rule(QUIT, exit=0, text="")), (no_rules, (MPS_OFF,)),
        as_delivered, environment={"GPU_SHARING_WAIT_SECONDS": "0"}),
    Row("nothing to disable", (MPS_OFF,), 0, ("nothing to undo",), untouched),
    Row("a damaged state file is named", (MPS_OFF,), 1, (f"mps-{UUID}.state is damaged",),
        untouched, (damaged("mps"),)),
    Row("a damaged compute mode is named", (MPS_OFF,), 1, ("is damaged (previous=$(id))",),
        untouched, (damaged("compute-mode", f"gpu_uuid={UUID}\nprevious=$(id)\nset=Default\n"),)),
    Row("one daemon a GPU", (MPS_ON, "--gpu", "0"), 0, (), has(daemons=2),
        ((MPS_ON, "--gpu", "1"),), ((MPS_OFF, "--gpu", "1"), (MPS_OFF,)), as_delivered,
        kind="h100x2"),
    Row("a daemon is kept to its GPU where there are several", (MPS_ON, "--gpu", "1"), 0, (),
        lambda scripts: [d["visible_devices"] for d in scripts.machine.state()["mps"].values()]
        == [SECOND], then=((MPS_OFF, "--gpu", "1"),), last=as_delivered, kind="h100x2"),
    # MIG
    Row("instances are made and named", (MIG_ON, "1g.10gb", "4"), 0, ("MIG is in force", "MIG-"),
        has(profiles=["1g.10gb"] * 4)),
    Row("twice changes nothing", (MIG_ON, "1g.5gb", "4"), 0, ("MIG is in force",), untouched,
        ((MIG_ON, "1g.5gb", "4"),)),
    Row("a list makes one instance of each", (MIG_ON, "1g.10gb,2g.20gb,1g.10gb"), 0, (),
        has(profiles=["1g.10gb", "1g.10gb", "2g.20gb"]),
        then=((MIG_ON, "2g.20gb,1g.10gb,1g.10gb"), (MIG_OFF,)), last=as_delivered),
    *(Row(f"{kind}: {asked} is {taken}", (MIG_ON, asked, "1"), 0,
          (f"has no profile {asked}; taking {taken}.",) if asked != taken else (),
          has(profiles=[taken]), kind=kind)
      for kind, asked, taken in (
          ("h100", "1g.5gb", "1g.10gb"), ("h100", "3g.20gb", "3g.40gb"),
          ("h100", "1g.10gb+me", "1g.10gb+me"), ("h200", "1g.5gb", "1g.18gb"),
          ("a100-40", "1g.5gb", "1g.5gb"), ("a100-40", "7g.80gb", "7g.40gb"),
          ("b200", "1g.5gb", "1g.23gb"), ("a30", "1g.5gb", "1g.6gb"),
          ("rtx-pro-6000", "1g.5gb", "1g.24gb"),
          ("rtx-pro-6000", "1g.24gb+me.all", "1g.24gb+me.all"),
          ("rtx-pro-6000", "2g.48gb+gfx", "2g.48gb+gfx"))),
    Row("a card of four slices is full with four", (MIG_ON, "1g.24gb", "5"), 4, ("does not fit",),
        untouched, kind="rtx-pro-6000"),
    *(Row(f"no counterpart: {asked}", (MIG_ON, asked, "1"), 4,
          (f"no profile {asked}", "1g.10gb ", "1g.10gb+me ", "7g.80gb "), untouched)
      for asked in ("5g.40gb", "1g.5gb+me")),
    Row("unknown profiles are named once", (MIG_ON, "5g.40gb,1g.5gb,5g.40gb,6g.60gb,1g.5gb"), 4,
        ("no profile 5g.40gb,6g.60gb, nor one plain profile like it",), untouched),
    *(Row(f"does not fit: {' '.join(asked)}", (MIG_ON, *asked), 4, ("does not fit",), untouched)
      for asked in (["1g.10gb", "8"], ["2g.20gb", "4"], ["7g.80gb,1g.10gb"],
                    ["3g.40gb,3g.40gb,1g.10gb"], ["4g.40gb,2g.20gb,1g.10gb,1g.10gb"])),
    *(Row(f"just fits: {' '.join(asked)}", (MIG_ON, *asked), 0)
      for asked in (["3g.40gb", "2"], ["1g.10gb", "7"], ["4g.40gb,2g.20gb,1g.10gb"])),
    Row("a driver that refuses root in a container", (MIG_ON, "1g.10gb", "4"), 5, (PRIVILEGE,),
        as_delivered, environment={"FAKE_GPU_UID": "65534"}),
    Row("pending until a restart", (MIG_ON, "1g.10gb", "4"), 6, ("restart the machine",),
        has(mig_pending="Enabled", instances=[]), (gpu(mig_switch="reset_not_supported"),),
        ((MIG_OFF,),), as_delivered),
    Row("after the restart it goes on and knows that MIG was off", (MIG_ON, "1g.10gb", "4"), 0, (),
        has(profiles=["1g.10gb"] * 4),
        (gpu(mig_switch="reset_not_supported"), lambda scripts: scripts.run(MIG_ON, "1g.10gb", "4"),
         gpu(mig_current="Enabled", mig_switch="ok")), ((MIG_OFF,),), as_delivered),
    Row("a failure half-way destroys what was made", (MIG_ON, "1g.10gb", "4"), 1,
        ("only 2 of 4 instances were created", "Insufficient Resources"), as_delivered,
        (gpu(create_limit=2),)),
    Row("instances of others stay when creating fails", (MIG_ON, "1g.10gb", "4"), 1, (),
        has(gis=[11], mig_current="Enabled"), (instance(), gpu(create_limit=1))),
    Row("instances are added and only those undone", (MIG_ON, "2g.20gb", "2"), 0, (),
        has(profiles=["1g.10gb", "2g.20gb", "2g.20gb"]), (instance(),), ((MIG_OFF,),),
        has(gis=[11], mig_current="Enabled")),
    Row("MIG that was switched on by hand stays on", (MIG_OFF,), 0, ("it is left alone",),
        untouched, (instance(),)),
    Row("instances in use", (MIG_OFF,), 6, ("pid 4242 (user alice): python3 on GPU instance 8",),
        untouched, ((MIG_ON, "1g.10gb", "2"), process(user="alice", gi=8)),
        (ended(4242), (MIG_OFF,)), as_delivered),
    Row("an instance that the driver does not let go", (MIG_OFF,), 6, ("could not be destroyed",),
        None, ((MIG_ON, "1g.10gb", "2"),
               rule(DESTROY, exit=19, text="Unable to destroy: In use by another client")),
        (no_rules, (MIG_OFF,)), as_delivered),
    Row("killed between creating and saving", (MIG_OFF,), 0, (), as_delivered,
        ((MIG_ON, "1g.10gb", "2"), forgotten_ids)),
    Row("instances that did not outlive a reset are made anew", (MIG_ON, "1g.10gb", "2"), 0, (),
        has(profiles=["1g.10gb"] * 2), ((MIG_ON, "1g.10gb", "2"), no_compute_instances)),
    Row("nothing to disable", (MIG_OFF,), 0, ("nothing to undo",), untouched),
    # status
    Row("an untouched GPU", (STATUS,), 0,
        ("mode in force: time-slicing (what CUDA does by itself)", "compute mode:  Default",
         "time slice:    Default", "MIG mode:      Disabled", "MPS daemon:    none",
         "in use by:     nobody", "saved:         nothing"), untouched),
    Row("processes and their owners", (STATUS,), 0, ("pid 4242 (user alice): python3, 512 MiB",),
        untouched, (process(user="alice"),)),
    Row("another user's daemon", (STATUS,), 0,
        ("MPS daemon:    another, pid", "of user alice", "mps, by a daemon that enable_mps.sh did"),
        untouched, (daemon(user="alice"),)),
    Row("a mode without sharing", (STATUS,), 0, ("exclusive (compute mode Exclusive_Process: no",),
        untouched, (gpu(compute_mode="Exclusive_Process"),)),
    *(Row(f"what undoes {' '.join(setup)}", (STATUS,), 0,
          (f"mode in force: {mode}", f"{saved}-{UUID}.state", f"undo: {undo}"), untouched,
          (setup,))
      for setup, mode, saved, undo in (
        ((TS, "4"), "time-slicing", "time-slicing", "./gpu-configs/reset_time_slicing.sh --gpu 0"),
        ((TS, "4", "--timeslice", "long"), "time-slicing", "time-slice",
         "sudo ./gpu-configs/reset_time_slicing.sh"),
        ((MPS_ON,), "mps", "mps", "./gpu-configs/disable_mps.sh"),
        ((MPS_ON, "--exclusive"), "mps", "compute-mode", "sudo ./gpu-configs/disable_mps.sh"),
        ((MIG_ON, "1g.10gb", "4"), "mig", "mig", "sudo ./gpu-configs/disable_mig.sh"))),
    Row("restore, as a dry run", (STATUS, "--restore", "--dry-run"), 0,
        (f"disable_mps.sh --gpu {UUID}",), untouched, ((MPS_ON,),)),
    Row("restore", (STATUS, "--restore"), 0, ("MPS is off",), as_delivered,
        ((MPS_ON, "--exclusive"), (STATUS,))),
    Row("restore, after a kill while state was being written", (STATUS, "--restore"), 0,
        ("mig-", "state.new"), as_delivered, (damaged("mig", suffix=".new"),)),
    Row("a restore that fails keeps what is saved", (STATUS, "--restore"), 1, (), has(daemons=1),
        ((MPS_ON,), rule(QUIT, exit=0, text="")), (no_rules, (STATUS, "--restore")), as_delivered),
)  # fmt: skip
def test_a_script_says_and_does_what_its_row_tells(row: Row) -> None:
    check(row)


def test_a_state_folder_too_long_for_a_socket_leaves_the_sockets_elsewhere(
    scripts: ModeScripts,
) -> None:
    scripts.environment["GPU_SHARING_STATE_DIR"] = str(scripts.folder / ("x" * 90))
    scripts.must(MPS_ON)
    (pipe,) = scripts.machine.state()["mps"]
    assert len(f"{pipe}/control_privileged") < 108
    assert Path(pipe).parent.stat().st_mode & 0o777 == 0o700
    scripts.must(MPS_OFF)
    assert not Path(pipe).parent.exists()


# --- whose state it is, and what sudo's caller can set --------------------------------------------


def test_state_is_for_its_owner_alone_whatever_the_umask(scripts: ModeScripts) -> None:
    for umask in ("000", "077"):
        subprocess.run(
            ["bash", "-c", f"umask {umask} && exec ./gpu-configs/{MPS_ON}"], cwd=scripts.project,
            env=scripts.environment, capture_output=True, check=True, timeout=60,
        )  # fmt: skip
        paths = [scripts.state_directory, scripts.state_directory / f"mps-{UUID}.state"]
        assert [path.stat().st_mode & 0o777 for path in paths] == [0o700, 0o600]
        (found,) = scripts.machine.state()["mps"].values()
        assert Path(found["log_directory"]).stat().st_mode & 0o777 == 0o700
        scripts.must(MPS_OFF)
        as_delivered(scripts)


class Sudo:
    """`nobody` types `sudo ./gpu-configs/...`, with a state folder of their own."""

    def __init__(self, scripts: ModeScripts) -> None:
        self.scripts = scripts
        self.folder = scripts.folder / "of-nobody"
        self.folder.mkdir()
        os.chown(self.folder, NOBODY.pw_uid, NOBODY.pw_gid)
        self.variables = {"GPU_SHARING_STATE_DIR": str(self.folder / "state")}

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.scripts.run(*command, prefix=["sudo"], **{**self.variables, **environment})

    def without(self, *command: str) -> subprocess.CompletedProcess[str]:
        return self.scripts.run(*command, prefix=AS_NOBODY, **self.variables)


@pytest.fixture
def sudo(scripts: ModeScripts) -> Sudo:
    return Sudo(scripts)


def as_link(path: Path) -> None:
    """Somebody else's text, by a link."""
    path.rename(path.parent.parent / "text")
    path.symlink_to(path.parent.parent / "text")


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@needs_real_root
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (as_link, "is a symbolic link, which these scripts never make; look at it and remove it"),
        (as_folder, "is a directory, which these scripts never make"),
        (lambda path: path.chmod(0o620), "others may write"),
        (lambda path: path.parent.chmod(0o1777), "chmod go-w"),
        (lambda path: path.parent.chmod(0o000), "cannot look at"),
        (lambda path: os.chown(path, 1, -1), "belongs to user daemon"),
        (lambda path: os.chown(path.parent, 1, -1), "GPU_SHARING_STATE_DIR"),
    ],
)
def test_state_that_somebody_else_may_have_written_is_refused_and_nothing_is_done(
    sudo: Sudo, spoil: Callable[[Path], None], words: str
) -> None:
    assert sudo.without(MPS_ON).returncode == 0
    spoil(sudo.folder / "state" / f"mps-{UUID}.state")
    sudo.scripts.machine.forget_calls()
    for script in (MPS_OFF, MPS_ON):
        result = sudo.without(script)
        refused(result, 5, words)
        assert result.stderr.count("\n") == 1
    assert sudo.scripts.machine.changing_calls() == []
    assert len(sudo.scripts.machine.state()["mps"]) == 1


@needs_real_root
@pytest.mark.parametrize(
    "command",
    [(MPS_ON, "--exclusive"), (MIG_ON, "1g.5gb", "4"), (TS, "4", "--timeslice", "short")],
    ids=" ".join,
)
def test_a_user_is_refused_with_the_sudo_line(scripts: ModeScripts, command: tuple) -> None:
    refused(scripts.run(*command, prefix=AS_NOBODY), 5, f"sudo ./gpu-configs/{' '.join(command)}")
    assert scripts.machine.changing_calls() == []


def test_a_state_folder_that_cannot_be_made_is_named(scripts: ModeScripts) -> None:
    (scripts.folder / "file").write_text("")
    inside_a_file = str(scripts.folder / "file" / "x")
    refused(scripts.run(TS, "4", GPU_SHARING_STATE_DIR=inside_a_file), 5, "GPU_SHARING_STATE_DIR")


def test_without_the_variable_state_goes_to_the_users_and_to_roots_own_folder(
    scripts: ModeScripts,
) -> None:
    home = scripts.folder / "home"
    scripts.environment |= {"GPU_SHARING_STATE_DIR": "", "HOME": str(home)}
    scripts.must(TS, "4", "--timeslice", "long")
    (record,) = (home / ".local" / "state" / "gpu-sharing-bench").iterdir()
    (setting,) = scripts.root_state.iterdir()
    assert record.name == f"time-slicing-{UUID}.state"
    assert setting.name == f"time-slice-{UUID}.state"
    assert setting.stat().st_mode & 0o777 == 0o644
    scripts.must(RESET)
    assert list(scripts.root_state.iterdir()) == []
    as_delivered(scripts)


@needs_real_root
def test_under_sudo_the_daemon_is_the_callers_and_the_compute_mode_is_in_roots_state(
    sudo: Sudo,
) -> None:
    # The guide's two lines: sudo enables, then everything runs as the plain user.
    result = sudo.run(MPS_ON, "--exclusive")
    assert result.returncode == 0, result.stderr
    (found,) = sudo.scripts.machine.state()["mps"].values()
    assert (found["uid"], found["user"]) == (NOBODY.pw_uid, "nobody")
    for path in [sudo.folder / "state", *(sudo.folder / "state").rglob("*")]:
        assert path.stat().st_uid == NOBODY.pw_uid, path
    (setting,) = sudo.scripts.root_state.iterdir()
    assert (setting.name, setting.stat().st_uid) == (f"compute-mode-{UUID}.state", 0)
    # the plain user sees it, and is told to use sudo for the compute mode
    status = sudo.without(STATUS)
    assert "mode in force: mps" in status.stdout
    assert "undo: sudo ./gpu-configs/disable_mps.sh" in status.stdout
    refused(sudo.without(MPS_OFF), 5, "sudo ./gpu-configs/disable_mps.sh")
    assert len(sudo.scripts.machine.state()["mps"]) == 1
    result = sudo.run(MPS_OFF)
    assert result.returncode == 0, result.stderr
    assert [*sudo.scripts.root_state.iterdir(), *(sudo.folder / "state").iterdir()] == []
    as_delivered(sudo.scripts)
    # without --exclusive no root is needed to end what sudo started
    assert sudo.run(MPS_ON).returncode == 0
    assert sudo.without(MPS_OFF).returncode == 0
    as_delivered(sudo.scripts)


@needs_real_root
def test_state_that_sudos_caller_has_written_makes_root_undo_nothing(sudo: Sudo) -> None:
    instance()(sudo.scripts)
    sudo.scripts.machine.change_gpu(compute_mode="Exclusive_Process", timeslice="Long")
    state = sudo.folder / "state"
    state.mkdir(mode=0o700)
    planted = {
        "mig": "previous_mig_mode=Disabled\nprofile=1g.10gb\ncount=1\ngpu_instances=11\n"
               "instances_before=\n",
        "compute-mode": "previous=Prohibited\nset=Exclusive_Process\n",
        "time-slice": "previous=Short\nset=Long\n",
        "time-slicing": "clients=4\ntimeslice=Long\nprevious_timeslice=Short\n",
        "mps": "user=nobody\nuid=65534\npipe_directory=/nonexistent/pipe\n"
               "previous_compute_mode=Prohibited\ncompute_mode=Exclusive_Process\n",
    }  # fmt: skip
    for kind, text in planted.items():
        (state / f"{kind}-{UUID}.state").write_text(f"gpu_uuid={UUID}\n{text}")
    for path in [state, *state.iterdir()]:
        os.chown(path, NOBODY.pw_uid, NOBODY.pw_gid)
    for script in (MIG_OFF, MPS_OFF, RESET):
        assert sudo.run(script).returncode == 0
    assert sudo.scripts.machine.changing_calls() == []
    has(gis=[11], compute_mode="Exclusive_Process", timeslice="Long")(sudo.scripts)


@needs_real_root
@pytest.mark.parametrize("caller", ["nobody", "root"])
def test_a_lock_in_the_callers_environment_holds_under_sudo_too(sudo: Sudo, caller: str) -> None:
    refused(
        sudo.run(MPS_ON, "--exclusive", FAKE_SUDO_USER=caller, GPU_SETTINGS_LOCKED="1"),
        5,
        "GPU_SETTINGS_LOCKED=1",
    )
    assert sudo.scripts.machine.changing_calls() == []


@needs_real_root
def test_root_runs_no_program_from_a_folder_of_sudos_caller(sudo: Sudo) -> None:
    planted = sudo.folder / "bin"
    planted.mkdir()
    for name in ("nvidia-smi", "setpriv", "stat"):
        (planted / name).write_text(f"#!/bin/sh\ntouch {sudo.scripts.folder}/broken\n")
        (planted / name).chmod(0o755)
    os.chown(planted, NOBODY.pw_uid, -1)
    path = f"{sudo.scripts.environment['PATH']}"
    result = sudo.run(MIG_ON, "1g.10gb", "2", PATH=f"{path.split(':')[0]}:{planted}:{path}")
    assert result.returncode == 0, result.stderr
    assert sudo.run(MIG_OFF).returncode == 0
    assert not (sudo.scripts.folder / "broken").exists()
    as_delivered(sudo.scripts)


@needs_real_root
def test_root_does_not_follow_a_users_link_and_names_what_it_cannot_write(sudo: Sudo) -> None:
    target = sudo.scripts.folder / "roots-own"
    target.mkdir(mode=0o700)
    (sudo.folder / "state").symlink_to(target)
    linked = sudo.run(MPS_ON)
    homeless = sudo.run(MPS_ON, GPU_SHARING_STATE_DIR="")
    assert (linked.returncode, homeless.returncode) == (5, 5)
    assert list(target.iterdir()) == []
    assert "cannot write /nonexistent/.local/state/gpu-sharing-bench" in homeless.stderr
    assert "GPU_SHARING_STATE_DIR" in homeless.stderr
    assert sudo.scripts.machine.state()["mps"] == {}


# --- signals --------------------------------------------------------------------------------------

SET_UPS = [
    ((TS, "4", "--timeslice", "long"), SET_SLICE),
    ((MPS_ON, "--exclusive"), START),
    ((MPS_ON, "--exclusive"), SET_MODE),
    ((MIG_ON, "1g.10gb", "4"), SWITCH),
    ((MIG_ON, "1g.10gb", "4"), CREATE),
]


@pytest.mark.parametrize(
    ("before", "command", "during"),
    [*(((), *set_up) for set_up in SET_UPS), (SET_UPS[0][0], (RESET,), SET_SLICE),
     (SET_UPS[1][0], (MPS_OFF,), SET_MODE), (SET_UPS[3][0], (MIG_OFF,), DESTROY)],
)  # fmt: skip
@pytest.mark.parametrize(
    ("number", "group", "status"), [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143)]
)
def test_a_signal_in_the_middle_puts_everything_back_and_an_undo_is_finished_by_the_next(
    scripts: ModeScripts, before: tuple[str, ...], command: tuple[str, ...], during: str,
    number: signal.Signals, group: bool, status: int,
) -> None:  # fmt: skip
    if before:
        scripts.must(*before)
    code, stderr = scripts.interrupt(*command, during=during, number=number, group=group)
    assert code == status, stderr
    assert ("Putting back" in stderr) == (not before)
    if before:
        scripts.must(*command)
    as_delivered(scripts)


@pytest.mark.parametrize("seed", range(int(os.environ.get("MODE_SCRIPT_KILLS", "50"))))
def test_a_kill_at_a_random_moment_leaves_the_card_as_it_was(
    scripts: ModeScripts, seed: int
) -> None:
    chosen = random.Random(seed)
    setup, _ = chosen.choice(SET_UPS)
    number = chosen.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    command = setup
    if chosen.random() < 0.3:
        scripts.must(*setup)
        command = (UNDO[setup[0]],)
    process = subprocess.Popen(
        scripts.command(*command), cwd=scripts.project, env=scripts.environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    time.sleep(chosen.uniform(0, 1.5))
    if chosen.random() < 0.5:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.wait(timeout=60)
    wait_until(lambda: not has_members(process.pid), "what the script had started ends")
    scripts.must(STATUS, "--restore")
    as_delivered(scripts)


def has_members(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
