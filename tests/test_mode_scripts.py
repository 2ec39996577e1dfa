"""The scripts of gpu-configs/ on pretended machines: what users see, and what is left on the card.

Most tests are rows: steps that lead somewhere, a command, its exit code, what it says, and what is
in force afterwards.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import mode_script_runner as m
import pytest
from waiting import wait_until

pytestmark = m.needs_root

TS, RESET, MPS_ON, MPS_OFF, MIG_ON, MIG_OFF, STATUS = m.SCRIPTS
UUID, SECOND = m.UUID, m.SECOND
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
UNKNOWN = "[Unknown Error]"
# Behind a table's head, as a Jetson Thor (driver 580) prints it; the others by analogy.
PROFILES = "+------+\n| GPU instance profiles: |\n|======|\n"
NO_PROFILES, NO_INSTANCES, NO_POLICIES = (
    f"Failed to display {what}: Unknown Error"
    for what in ("GPU instance profiles", "GPU instances", "compute policies")
)
INFOROM = "WARNING: infoROM is corrupted at gpu 0000:00:06.0"
OLD_SMI = ["compute_cap"]
MIG_IS_ON = m.gpu(mig_current="Enabled", mig_pending="Enabled")
ROOTS = {"uid": 0, "user": "root"}
NO_WAIT = {"GPU_SHARING_WAIT_SECONDS": "0"}
NO_APPS = m.rule(APPS, exit=255, text=BROKEN)
SLICES = "nvidia-smi compute-policy -l"
TWO, FOUR = (MIG_ON, "1g.10gb", "2"), (MIG_ON, "1g.10gb", "4")


def daemons(scripts: m.ModeScripts, field: str) -> list:
    return [daemon[field] for daemon in scripts.machine.state()["mps"].values()]


# --- what all scripts have in common --------------------------------------------------------------


@pytest.mark.parametrize("script", m.SCRIPTS)
def test_help_usage_and_a_missing_driver_are_told_alike_by_every_script(
    scripts: m.ModeScripts, script: str
) -> None:
    folder = scripts.project / "gpu-configs"
    assert {path.name for path in folder.glob("*.sh")} == set(m.SCRIPTS)
    scripts.machine.change(driver="not-loaded")
    told = scripts.run(script, "--help")
    assert told.returncode == 0
    assert told.stdout.startswith("Usage: ")
    for word in ("--dry-run", "--gpu INDEX_OR_UUID", "--help", "Exit codes"):
        assert word in told.stdout
    assert scripts.machine.calls() == []
    m.refused(scripts.run(script, *m.SCRIPTS[script]), 3, "couldn't communicate with the NVIDIA")
    scripts.machine.change(driver="ok")
    other = scripts.run(script, *m.SCRIPTS[script], "--gpu", "7")
    m.refused(other, 3, "there is no GPU '7'", UUID)
    assert scripts.machine.changing_calls() == []


@pytest.mark.parametrize(
    "inherited",
    [{"POSIXLY_CORRECT": "1"}, {"SHELLOPTS": "noglob:noclobber:xtrace"},
     {"BASHOPTS": "failglob:nocasematch", "GLOBIGNORE": "*", "IFS": "/"},
     {"BASH_FUNC_stat%%": "() { echo 0 600 directory; }", "BASH_ENV": "/nonexistent/x"},
     {"CDPATH": "..:/tmp", "TMOUT": "1", "LC_ALL": "tr_TR.UTF-8", "COLUMNS": "20",
      "PS_PERSONALITY": "bsd"},
     {"CUDA_MPS_PROTOCOL_VERSION": "3", "CUDA_VISIBLE_DEVICES": "3",
      "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "10", "CUDA_MPS_PIPE_DIRECTORY": "/nonexistent"}],
    ids=lambda inherited: "+".join(inherited),
)  # fmt: skip
def test_what_a_shell_inherits_changes_nothing(
    scripts: m.ModeScripts, inherited: dict[str, str]
) -> None:
    scripts.environment |= inherited
    enabled = scripts.must(MPS_ON, "--percentage", "50")
    assert "percentage:      50.0" in enabled.stdout
    (found,) = scripts.machine.state()["mps"].values()
    assert (found["visible_devices"], found["protocol"]) == (None, 2)
    scripts.must(MPS_OFF)
    m.as_delivered(scripts)


@pytest.mark.parametrize(
    ("before", "command"),
    [
        ([], [TS, "4", "--timeslice", "long"]),
        ([[TS, "4", "--timeslice", "long"]], [RESET]),
        ([], [MPS_ON, "--exclusive", "--percentage", "25"]),
        ([[MPS_ON, "--exclusive"]], [MPS_OFF]),
        ([], [MIG_ON, "1g.5gb", "4"]),
        ([[MIG_ON, "1g.10gb", "2"]], [MIG_OFF]),
    ],
)
def test_a_dry_run_says_what_would_be_done_and_locked_settings_forbid_it(
    scripts: m.ModeScripts, before: list[list[str]], command: list[str]
) -> None:
    for earlier in before:
        scripts.must(*earlier)
    scripts.machine.forget_calls()
    files = scripts.all_files()
    dry = scripts.must(*command, "--dry-run")
    m.refused(scripts.run(*command, GPU_SETTINGS_LOCKED="1"), 5, "GPU_SETTINGS_LOCKED=1 says")
    scripts.root_lock.parent.mkdir(parents=True)
    scripts.root_lock.touch()
    m.refused(scripts.run(*command), 5, f"{scripts.root_lock} says that others share")
    scripts.root_lock.unlink()
    assert scripts.machine.changing_calls() == []
    assert scripts.all_files() == files
    # The plan is the deed: what the real run logs is what the dry run has promised.
    promised = [
        line.removeprefix("would run: ")
        for line in m.without_random_names(dry.stdout).splitlines()
        if line.startswith("would run: ")
    ]
    real = m.without_random_names(scripts.must(*command).stderr)
    done = [line.removeprefix("run: ") for line in real.splitlines() if line.startswith("run: ")]
    # Ids of instances are only known when they are there; they are saved at the end.
    assert promised
    assert done[: len(promised)] == promised
    assert all(extra.startswith("save ") for extra in done[len(promised) :])


def test_without_nvidia_smi_the_exit_code_is_3(scripts: m.ModeScripts, tmp_path: Path) -> None:
    for program in ("bash", "env", "dirname", "id", "getent", "cat", "stat", "ps"):
        (tmp_path / program).symlink_to(shutil.which(program) or program)
    result = scripts.run(STATUS, PATH=str(tmp_path), HOME=str(tmp_path))
    m.refused(result, 3, "nvidia-smi was not found")


PARTITIONS = (MPS_ON, "--static-partitions", "3")
HAS_PARTITIONS = m.machine(mps_version=13010)
NEEDS_13010 = "static SM partitions need nvidia-cuda-mps-control 13010 (CUDA 13.1)"


def partitions_are_saved(scripts: m.ModeScripts, chunks: list[int]) -> bool:
    (daemon,) = scripts.machine.state()["mps"].values()
    made = [one["id"] for one in daemon["partitions"]]
    assert [one["chunks"] for one in daemon["partitions"]] == chunks
    return (scripts.saved("mps") or {})["partitions"] == ",".join(made)


# --- what each script says and does --------------------------------------------------------------


@m.rows(
    # the driver and its cards
    m.Row("no GPU", (STATUS,), 3, ("No devices were found",), kind="no-gpu"),
    m.Row("a library of another version", (STATUS,), 3, ("Driver/library version mismatch",),
        before=(m.machine(driver="Driver/library version mismatch"),)),
    *(m.Row(f"a damaged infoROM: {command[0]} goes on and passes the warning on", command, 0,
          (words, INFOROM), before=(m.rule("nvidia-smi *", append=INFOROM),))
      for command, words in ((TWO, "MIG is in force"), ((STATUS,), "in use by:     nobody"),
                             ((TS, "4", "--timeslice", "short"), "Short"))),
    m.Row("a row and a nonsense exit status", (STATUS,), 0, ("mode in force: time-slicing",),
        before=(m.rule(QUERY, append="", exit=255),)),
    m.Row("an unknown compute capability is said where MPS needs it", (MPS_ON,), 0,
        ("does not tell the compute capability",), before=(m.machine(unknown_fields=OLD_SMI),)),
    m.Row("nvidia-smi without MIG", TWO, 4, ("has no MIG",), m.untouched,
        (m.machine(unknown_fields=["mig.mode.current", "mig.mode.pending", *OLD_SMI]),)),
    m.Row("GPU 0 of two is lost: the other is taken, the lost one named", (TS, "2"), 0,
        ("GPU is lost", f"in force on GPU 1 (NVIDIA H100 80GB HBM3, {SECOND})"),
        before=(m.gpu(lost=True),), kind="h100x2", undo=((RESET, "--gpu", "1"),)),
    m.Row("GPU 0 of two is lost and the question to all fails", (STATUS, "--gpu", "1"), 0,
        ("Unknown Error", "mode in force: time-slicing"), kind="h100x2",
        before=(m.gpu(lost=True), m.rule("nvidia-smi --query*", exit=255, text="Unknown Error"))),
    m.Row("GPU 0 of two is lost: MIG is switched off on the other", (MIG_OFF, "--gpu", "1"), 0,
        (f"MIG mode is Disabled on GPU 1 (NVIDIA H100 80GB HBM3, {SECOND})",), kind="h100x2",
        before=(m.gpu(lost=True), (*TWO, "--gpu", "1")), undo=((MIG_OFF, "--gpu", "1"),)),
    m.Row("the lost GPU asked for", (STATUS, "--gpu", "0"), 3, ("there is no GPU '0'", "is lost"),
        before=(m.gpu(lost=True),), kind="h100x2"),
    m.Row("each GPU has its status", (STATUS,), 0, (UUID, SECOND), m.untouched, kind="h100x2"),
    m.Row("the GPU that was asked for is set up", (TS, "4", "--timeslice", "long", "--gpu", SECOND),
        0, ("GPU 1",), m.has(timeslice="Default"), kind="h100x2",
        undo=((RESET,), (RESET, "--gpu", "1")),
        last=lambda scripts: scripts.machine.state()["gpus"][1]["timeslice"] == "Default"),
    m.Row("a GPU without MIG", (MIG_ON, "1g.5gb", "4"), 4, ("has no MIG",), m.untouched,
        undo=((MIG_OFF,),), kind="geforce"),
    m.Row("a GPU too old for MPS", (MPS_ON,), 4, ("MPS needs compute capability 3.5",), m.untouched,
        kind="k40"),
    m.Row("a GPU too old for limits of MPS clients", (MPS_ON, "--percentage", "50"), 4,
        ("it needs compute capability 7.0",), m.untouched, (m.gpu(compute_capability="6.1"),),
        kind="t4"),
    m.Row("a GPU without compute modes is shared as it is", (TS, "2"), 0, ("[N/A], MPS off",),
        before=(m.gpu(compute_mode="[N/A]"),), last=lambda scripts: scripts.left_behind() == []),
    m.Row("a GPU without compute modes: exclusive", (MPS_ON, "--exclusive"), 4,
        ("has no compute mode setting",), m.has(daemons=0), (m.gpu(compute_mode="[N/A]"),)),
    *(m.Row(f"no list of profiles: {asked}", (MIG_ON, *asked), 2, ("is no MIG profile",),
          m.untouched)
      for asked in ([""], ["1g.10gb\n2g.20gb"], ["1g.10gb,,1g.10gb"])),
    m.Row("a GPU without slices", (TS, "4", "--timeslice", "short"), 4, ("no time slice setting",),
        m.untouched, kind="k40", undo=((TS, "4"), (RESET,))),
    # what could not be asked is neither none nor off
    *(m.Row(f"not told to {' '.join(command)}: {words}", command, 1, (words,), m.untouched, before)
      for command, words, *before in (
        ((MPS_ON, "--exclusive"), f"would shut them out: {BROKEN}", m.process(), NO_APPS),
        (TWO, f"{UUID}) could not be asked: {BROKEN}", NO_APPS),
        ((TS, "2"), "whether an MPS server", m.rule(APPS, exit=0, text="[Not Supported]")),
        ((MPS_ON,), "whether MPS daemons run could not be asked", m.without("ps")),
        ((TS, "2", "--timeslice", "long"), "awk was not found", m.without("awk")),
        (TWO, "awk was not found", m.without("awk")),
        ((STATUS,), "time slice:    could not be asked", m.rule(SLICES, exit=255, text=BROKEN)),
        ((TS, "2", "--timeslice", "long"), "slice could not be", m.rule(SLICES, exit=0, text="")),
        (TWO, BROKEN, m.rule("nvidia-smi mig -lgip", exit=255, text=BROKEN)),
        (TWO, "the MIG profiles and", m.rule("nvidia-smi mig -lgipp", exit=4, text=PRIVILEGE)),
        (TWO, f"asked: {NO_PROFILES}", m.rule("nvidia-smi mig -lgip", exit=255, text=NO_PROFILES)),
        (TWO, f"asked: {NO_PROFILES}", m.gpu(mig_current="Enabled", mig_pending="Enabled"),
         m.rule("nvidia-smi mig -lgip", exit=255, text=f"{PROFILES}{NO_PROFILES}")),
        ((STATUS,), f"could not be asked: {NO_POLICIES}",
         m.rule(SLICES, exit=255, text=f"| GPU compute policies: |\n{NO_POLICIES}")),
        ((STATUS,), "be asked: nothing", TWO, m.rule("nvidia-smi -L", exit=255, text="nothing")),
        ((TS, "2"), "could not be asked", (MPS_ON,), m.rule(QUESTION, exit=124)),
        ((TS, "2"), f"mode could not be asked: {UNKNOWN}", m.gpu(compute_mode=UNKNOWN)),
        ((STATUS,), "not known, since the compute mode", m.gpu(compute_mode=UNKNOWN)),
        ((MPS_ON,), f"compute mode could not be asked: {UNKNOWN}", m.gpu(compute_mode=UNKNOWN)),
        ((STATUS,), "not known, since the MIG mode", m.gpu(mig_current=UNKNOWN)),
        *((command, f"MIG mode could not be asked: {UNKNOWN}", m.gpu(mig_current=UNKNOWN))
          for command in (TWO, (TS, "2"), (MPS_ON,))))),
    m.Row("not told what it would put back", (MPS_ON, "--exclusive"), 1, (UNKNOWN,),
        m.has(daemons=0, compute_mode=UNKNOWN), (m.gpu(compute_mode=UNKNOWN),)),
    # nor is anything undone on that ground, and what is saved stays
    *(m.Row(f"not told to {command}: {words}", (command,), 1, (words,), m.untouched, before,
          ((command,),))
      for command, words, *before in (
        (RESET, "slice could not be asked", (TS, "2", "--timeslice", "long"),
         m.rule(SLICES, exit=9)),
        (MIG_OFF, BROKEN, TWO, m.rule(f"nvidia-smi -i {UUID}", exit=255, text=BROKEN)),
        (MIG_OFF, "GPU instances of", TWO, m.rule("nvidia-smi mig -lgi", exit=255, text=BROKEN)),
        (MIG_OFF, f"asked: {NO_INSTANCES}", TWO,
         m.rule("nvidia-smi mig -lgi", exit=255, text=f"| GPU instances: |\n{NO_INSTANCES}")),
        (MPS_OFF, "could not be asked: Timed out", (MPS_ON,), m.client,
         m.rule(CLIENTS, exit=1, text="Timed out")),
        (MPS_OFF, "could not be asked", (MPS_ON,),
         m.rule(QUESTION, exit=0, text="Unknown command")))),
    m.Row("not told whether MIG is on: no instance is forgotten", (MIG_OFF,), 1, (UNKNOWN,),
        m.untouched, (m.gpu(mig_current="Enabled", mig_pending="Enabled"), TWO,
         m.rule(QUERY, text=f"0, {UUID}, Default, {UNKNOWN}, {UNKNOWN}, 9.0, NVIDIA H100")),
        ((MIG_OFF,),), last=lambda scripts: scripts.machine.state()["gpus"][0]["instances"] == []),
    m.Row("who uses the GPU, for MPS alone, is a warning", (MPS_ON,), 0,
        ("warning: who uses GPU 0", "could not be asked"), before=(m.rule(APPS, exit=4),)),
    *(m.Row(f"status says so and is no success: {words}", (STATUS,), 1, (words,), m.untouched,
          before, silent_on=(silent,))
      for words, silent, *before in (
        (f"in use by:     could not be asked: {BROKEN}", "nobody", NO_APPS),
        ("MPS daemons:   could not be asked", "MPS daemon:    none", m.without("ps")),
        ("mode in force: not known", "MPS daemon:    none", (MPS_ON,), m.machine(others=[]),
         m.rule(QUESTION, exit=124)),
        ("is damaged", "nothing here to undo", m.damaged("mps")),
        ("asked: /", "error: ", m.damaged("mps")),
        ("undo: ./gpu-configs/reset_time_slicing.sh", "time-slicing (", (TS, "2"),
         m.damaged("mps")))),
    m.Row("no instances is told with either exit status", (MIG_OFF,), 0, (), m.as_delivered,
        (TWO, m.gpu(instances=[]),
         m.rule("nvidia-smi mig -lgi", exit=6, text="No MIG-enabled devices found."))),
    # what is in the way is named, with the remedy, and nothing is changed
    *(m.Row(f"in the way of {command[0]}: {words}", command, 6, (words,), m.untouched, before)
      for command, words, *before in (
        ((TS, "4"), "sudo ./gpu-configs/disable_mig.sh", MIG_IS_ON),
        ((TS, "4"), "compute mode is Exclusive_Process", m.gpu(compute_mode="Exclusive_Process")),
        ((TS, "4"), "./gpu-configs/disable_mps.sh", (MPS_ON,)),
        ((TS, "4"), "user alice): nvidia-cuda-mps-server", m.daemon(user="alice"), m.client),
        ((MPS_ON,), "sudo ./gpu-configs/disable_mig.sh", MIG_IS_ON),
        ((MPS_ON,), "compute mode is Prohibited", m.gpu(compute_mode="Prohibited")),
        ((MPS_ON,), r"of user CORP\jane doe;", m.daemon(user=r"CORP\jane doe")),
        ((MPS_ON,), "(MPS protocol 3, which answers in other", m.daemon(**ROOTS, protocol=3)),
        ((MPS_ON,), "echo quit | nvidia-cuda-mps-control", m.daemon(**ROOTS)),
        ((MPS_ON, "--exclusive"), "pid 4242 (user alice): python3, 512", m.process(user="alice")),
        (FOUR, "pid 4242 (user alice): python3", m.process(user="alice")),
        (FOUR, "./gpu-configs/disable_mps.sh", (MPS_ON,)),
        (FOUR, "pending: Enabled", m.gpu(mig_pending="Enabled")),
        ((MIG_ON, "3g.40gb", "2"), "11 1g.10gb 4:1", m.instance),
        ((MIG_ON, "2g.20gb", "2"), "sudo ./gpu-configs/disable_mig.sh", FOUR))),
    m.Row("in the way of MIG: a client that is not listed", FOUR, 6,
        ("In use by another client",), m.as_delivered, (m.gpu(mig_switch="in_use"),)),
    # time slicing
    m.Row("clients are recorded, the card is left alone", (TS, "4"), 0,
        ("Time slicing is in force", "clients:       4"),
        lambda scripts: scripts.saved("time-slicing") == {"gpu_uuid": UUID, "clients": "4"},
        environment={"GPU_SETTINGS_LOCKED": "1"}),
    m.Row("a state file that cannot be replaced", (TS, "4"), 5, ("cannot write",),
        lambda scripts: scripts.left_behind() == [f"time-slicing-{UUID}.state"],
        (lambda it: (it.state_directory / f"time-slicing-{UUID}.state").mkdir(0o700, True),)),
    m.Row("a slice is set", (TS, "4", "--timeslice=short"), 0, ("Short",), m.has(timeslice="Short"),
        (m.gpu(timeslice="Medium"),), last=m.has(timeslice="Medium")),
    m.Row("twice: the slice from before both is put back", (TS, "8", "--timeslice", "long"),
        0, (), m.has(timeslice="Long"), ((TS, "4", "--timeslice", "short"),)),
    m.Row("a slice that was set after a restart is somebody else's", (RESET,), 0,
        ("set up before a restart of the machine; left as it is",),
        m.has(timeslice="Short"), ((TS, "4", "--timeslice", "short"), m.saved_before_a_restart)),
    m.Row("a slice that a restart has reset is nothing to put back", (RESET,), 0, (),
        m.as_delivered, ((TS, "4", "--timeslice", "short"), m.saved_before_a_restart,
                         m.gpu(timeslice="Default")),
        silent_on=("left as it is",)),
    m.Row("what was there after a restart is put back", (TS, "4", "--timeslice", "long"), 0, (),
        m.has(timeslice="Long"),
        ((TS, "4", "--timeslice", "short"), m.saved_before_a_restart),
        last=m.has(timeslice="Short")),
    m.Row("without a length the slice stays, and is still known", (TS, "8"), 0, ("Short",),
        m.has(timeslice="Short"), ((TS, "4", "--timeslice", "short"),)),
    m.Row("the length of before is nothing to put back", (TS, "8", "--timeslice", "default"), 0, (),
        lambda scripts: scripts.saved("time-slice") is None, ((TS, "4", "--timeslice", "short"),)),
    m.Row("a slice that somebody else has set since is left", (RESET,), 0, ("left as it is",),
        m.has(timeslice="Long"), ((TS, "4", "--timeslice", "short"), m.gpu(timeslice="Long"))),
    m.Row("killed before the slice changed again: that of before both is put back", (RESET,), 0, (),
        m.as_delivered, ((TS, "4", "--timeslice", "short"), m.killed_during(
            SET_SLICE, TS, "4", "--timeslice", "long"))),
    m.Row("killed before the slice changed again: set anew", (TS, "4", "--timeslice", "medium"),
        0, (), m.has(timeslice="Medium"), ((TS, "4", "--timeslice", "short"), m.killed_during(
            SET_SLICE, TS, "4", "--timeslice", "long"))),
    *(m.Row(f"nothing to undo: {undo}", (undo,), 0, ("nothing to undo",), m.untouched)
      for undo in (RESET, MPS_OFF, MIG_OFF)),
    m.Row("what fails unforeseen is told with its place", (RESET,), 1,
        ("failed with status 127 (common.sh, line ",), before=((TS, "4"), m.without("rm"))),
    m.Row("another user's daemon alone is a warning", (TS, "4"), 0, ("another user's MPS",),
        before=(m.daemon(user="alice"),), last=m.has(daemons=1)),
    *(m.Row(f"a driver that refuses root in a container: {command[0]}", command, 5, (PRIVILEGE,),
          m.as_delivered, environment={"FAKE_GPU_UID": "65534"})
      for command in ((TS, "4", "--timeslice", "short"), FOUR)),
    m.Row("a slice that could not be put back", (TS, "4", "--timeslice", "short"), 4,
        ("the time slice is Custom, which could not be put back",), m.has(timeslice="Custom"),
        (m.gpu(timeslice="Custom"),), ((TS, "4"), (RESET,)), m.has(timeslice="Custom")),
    m.Row("a change that did not take", (TS, "4", "--timeslice", "short"), 1,
        ("the time slice is Default, not Short", "Successfully set"), m.as_delivered,
        (m.rule(SET_SLICE, exit=0, text="Successfully set timeslice policy."),)),
    # MPS
    m.Row("a daemon is started and named", (MPS_ON,), 0, ("MPS is in force", "age:      100"),
        m.has(daemons=1, compute_mode="Default"), kind="geforce"),
    m.Row("twice keeps one daemon", (MPS_ON,), 0, ("answers already",), m.untouched, ((MPS_ON,),)),
    m.Row("a percentage is set", (MPS_ON, "--percentage=12.5"), 0, ("percentage:      12.5",),
        before=((MPS_ON, "--percentage", "25"),)),
    m.Row("a percentage is told in tenths", (MPS_ON, "--percentage", "33.333"), 0,
        ("percentage:      33.3",), lambda scripts: daemons(scripts, "percentage") == [33.333]),
    m.Row("a percentage that the daemon ignores", (MPS_ON, "--percentage", "25"), 1,
        ("percentage of 100.0, not 25",), m.as_delivered,
        (m.rule("nvidia-cuda-mps-control < set_default*", exit=0, text="100.0"),)),
    m.Row("exclusive", (MPS_ON, "--exclusive"), 0, ("undo:            sudo ./gpu-configs/disable",),
        m.has(compute_mode="Exclusive_Process")),
    m.Row("exclusive later and twice", (MPS_ON, "--exclusive"), 0, (), m.untouched,
        ((MPS_ON,), (MPS_ON, "--exclusive"))),
    m.Row("exclusive before stays so", (MPS_ON, "--exclusive"), 0, (), m.has(daemons=1),
        (m.gpu(compute_mode="Exclusive_Process"),),
        last=m.has(daemons=0, compute_mode="Exclusive_Process")),
    m.Row("after a daemon that died the mode of before is known", (MPS_ON,), 0,
        ("no longer answers",), m.has(daemons=1), ((MPS_ON, "--exclusive"), m.machine(mps={}))),
    m.Row("a daemon that died is cleaned up", (MPS_OFF,), 0, ("MPS is off",), m.as_delivered,
        ((MPS_ON,), m.machine(mps={}))),
    m.Row("a compute mode set since is left", (MPS_OFF,), 0, ("left as it is",),
        m.has(daemons=0, compute_mode="Prohibited"),
        ((MPS_ON, "--exclusive"), m.gpu(compute_mode="Prohibited"))),
    m.Row("a daemon that takes its time", (MPS_ON,), 0, (), m.has(daemons=1),
        (m.rule(QUESTION, exit=1, text=NO_DAEMON, times=3),)),
    m.Row("a daemon that never answers", (MPS_ON,), 1, ("did not answer", "Failed to start"),
        m.as_delivered, (m.rule(START, exit=1, text="Failed to start"),), environment=NO_WAIT),
    m.Row("a compute mode that the driver refuses", (MPS_ON, "--exclusive"), 5, (PRIVILEGE,),
        m.as_delivered, (m.rule(SET_MODE, exit=4, text=f"Unable to set: {PRIVILEGE}"),)),
    m.Row("a failure while the daemon ran leaves it", (MPS_ON, "--percentage", "25", "--exclusive"),
        1, (), m.has(daemons=1, compute_mode="Default"),
        ((MPS_ON, "--percentage", "50"), m.rule(SET_MODE, exit=0, text="All done.")),
        ((MPS_ON,),), lambda scripts: daemons(scripts, "percentage") == [50.0]),
    # MPS with static partitions
    *(m.Row(f"{name}: no static partitions", PARTITIONS, 4, (f"{NEEDS_13010}; this one is {this}",),
          m.untouched, (m.machine(mps_version=version), *rules))
      for name, version, this, rules in (
        ("too old a program", 13000, "13000", ()),
        ("a program that says no version", 13010, "of unknown version",
         (m.rule("nvidia-cuda-mps-control -v", exit=1, text="Unknown option"),)))),
    m.Row("equal partitions of whole chunks are made, saved and named", PARTITIONS, 0,
        ("export CUDA_MPS_SM_PARTITION=GPU-",),
        lambda scripts: partitions_are_saved(scripts, [5, 5, 5]), (HAS_PARTITIONS,)),
    m.Row("twice keeps the partitions", PARTITIONS, 0, ("answers already",), m.untouched,
        (HAS_PARTITIONS, PARTITIONS)),
    m.Row("an Ampere's chunks are of four", PARTITIONS, 0, (),
        lambda scripts: partitions_are_saved(scripts, [9, 9, 9]), (HAS_PARTITIONS,),
        kind="a100-40"),
    m.Row("more partitions than chunks", (MPS_ON, "--static-partitions", "17"), 4,
        ("17 static partitions do not fit", "make 16 chunks"), m.as_delivered, (HAS_PARTITIONS,)),
    m.Row("a partition that is refused", PARTITIONS, 1, ("partition 3 of 3", "Failed to fulfill"),
        m.as_delivered, (HAS_PARTITIONS, m.rule("*< sm_partition add *", exit=0, after=2,
                                                text="Failed to fulfill the requested"))),
    m.Row("a partition that is not listed", PARTITIONS, 1, ("lists 2 static partitions, not 3",),
        m.as_delivered, (HAS_PARTITIONS, m.rule("*< sm_partition add *", exit=0, after=2,
                                                text=f"Partition {UUID}/Dz4AAAAA created"))),
    *(m.Row(f"a daemon with {has} partitions is not another", command, 6,
          (f"was started with {has} static", "./gpu-configs/disable_mps.sh"), m.untouched,
          (HAS_PARTITIONS, earlier), ((MPS_OFF,),))
      for has, earlier, command in (
        ("no", (MPS_ON,), PARTITIONS), ("3", PARTITIONS, (MPS_ON,)),
        ("3", PARTITIONS, (MPS_ON, "--static-partitions", "4")))),
    *(m.Row(f"a daemon that was started by hand stays: {whose}", (MPS_OFF,), 0,
          ("left alone: MPS control daemon, pid",), m.untouched, (m.daemon(**whose),))
      for whose in ({"user": "alice"}, ROOTS)),
    *(m.Row(f"no daemon of another: {comm}, {args}", (MPS_ON,), 0, (), m.has(daemons=1),
          (m.machine(others=[{"pid": pid, "uid": 1000, "user": "mallory", "comm": comm,
                              "args": args}]),))
      for pid, comm, args in ((2**22 + 5, "sleep", START), (os.getpid(), "nvidia-cuda-mps", START),
                              (2**22 + 5, "nvidia-cuda-mps", "nvidia-cuda-mps-control"))),
    m.Row("processes without MPS are a warning else", (MPS_ON,), 0,
        ("pid 4242 (user alice): python3", "will contend with its clients"),
        before=(m.process(user="alice"),)),
    m.Row("clients are listed and the daemon stays", (MPS_OFF,), 6, ("pid 938 (user root)",),
        m.has(daemons=1), ((MPS_ON,), m.client), ((MPS_OFF,),), environment=NO_WAIT),
    m.Row("a daemon that does not quit stays known", (MPS_OFF,), 1, ("answers 0 s after quit",),
        m.has(daemons=1), ((MPS_ON,), m.rule(QUIT, exit=0, text="")), ((MPS_OFF,),),
        environment=NO_WAIT),
    m.Row("a daemon of which nothing is heard after quit", (MPS_OFF,), 1, ("could not be asked",),
        m.has(daemons=1), ((MPS_ON,), m.rule(QUIT, exit=124), m.rule(QUESTION, exit=124, after=1)),
        ((MPS_OFF,),), environment=NO_WAIT, silent_on=("still answers",)),
    *(m.Row(f"a damaged state file is named: {kind}", (MPS_OFF,), 1, (words,), m.untouched,
          (m.damaged(kind, text),))
      for kind, text, words in (
        ("mps", "pipe_dir", f"mps-{UUID}.state is damaged"),
        ("compute-mode", f"gpu_uuid={UUID}\nprevious=$(id)\n", "damaged (previous=$(id))"))),
    m.Row("one daemon a GPU, kept to it where there are several", (MPS_ON, "--gpu", "0"), 0, (),
        lambda scripts: daemons(scripts, "visible_devices") == [SECOND, UUID],
        ((MPS_ON, "--gpu", "1"),), ((MPS_OFF, "--gpu", "1"), (MPS_OFF,)),
        kind="h100x2"),
    # MIG
    m.Row("instances are made and named", FOUR, 0, ("MIG is in force", "MIG-"),
        m.has(profiles=["1g.10gb"] * 4)),
    m.Row("twice changes nothing", (MIG_ON, "1g.5gb", "4"), 0, ("MIG is in force",), m.untouched,
        ((MIG_ON, "1g.5gb", "4"),)),
    m.Row("a list makes one instance of each", (MIG_ON, "1g.10gb,2g.20gb,1g.10gb"), 0, (),
        m.has(profiles=["1g.10gb", "1g.10gb", "2g.20gb"]),
        undo=((MIG_ON, "2g.20gb,1g.10gb,1g.10gb"), (MIG_OFF,))),
    *(m.Row(f"{kind}: {asked} is {taken}", (MIG_ON, asked, "1"), 0,
          (f"has no profile {asked}; taking {taken}.",) if asked != taken else (),
          m.has(profiles=[taken]), kind=kind)
      for kind, asked, taken in (
        ("h100", "1g.10gb+me", "1g.10gb+me"), ("h200", "1g.5gb", "1g.18gb"),
        ("a100-40", "7g.80gb", "7g.40gb"), ("a30", "1g.5gb", "1g.6gb"),
        ("rtx-pro-6000", "1g.24gb+me.all", "1g.24gb+me.all"))),
    *(m.Row(f"no counterpart: {asked}", (MIG_ON, asked), 4, words, m.untouched)
      for asked, words in (
        ("1g.5gb+me", ("no profile 1g.5gb+me", "1g.10gb ", "1g.10gb+me ", "7g.80gb ")),
        ("5g.40gb,1g.5gb,5g.40gb,6g.60gb,1g.5gb",
         ("no profile 5g.40gb,6g.60gb, nor one plain profile like it",)))),
    *(m.Row(f"does not fit: {' '.join(asked)}", (MIG_ON, *asked), 4, ("does not fit",), m.untouched,
          kind=kind)
      for kind, *asked in (
        ("h100", "1g.10gb", "8"), ("h100", "4g.40gb,2g.20gb,1g.10gb,1g.10gb"),
        ("rtx-pro-6000", "1g.24gb", "5"))),
    *(m.Row(f"just fits: {' '.join(asked)}", (MIG_ON, *asked), 0)
      for asked in (["3g.40gb", "2"], ["4g.40gb,2g.20gb,1g.10gb"])),
    m.Row("pending until a restart", FOUR, 6, ("restart the machine",),
        m.has(mig_pending="Enabled", instances=[]), (m.gpu(mig_switch="reset_not_supported"),),
        ((MIG_OFF,),)),
    m.Row("off is pending until a restart", (MIG_OFF,), 6, ("restart the machine",),
        m.has(mig_pending="Disabled", instances=[]),
        (TWO, m.gpu(mig_switch="reset_not_supported")), (m.gpu(mig_switch="ok"), (MIG_OFF,))),
    m.Row("after the restart it knows that MIG was off", FOUR, 0, (),
        m.has(profiles=["1g.10gb"] * 4),
        (m.gpu(mig_switch="reset_not_supported"), lambda it: it.run(*FOUR),
         m.gpu(mig_current="Enabled", mig_switch="ok"))),
    m.Row("a failure half-way destroys what was made", FOUR, 1,
        ("only 2 of 4 instances were created", "Insufficient Resources"), m.as_delivered,
        (m.gpu(create_limit=2),)),
    m.Row("instances of others stay when creating fails", FOUR, 1, (),
        m.has(gis=[11], mig_current="Enabled"), (m.instance, m.gpu(create_limit=1))),
    m.Row("instances are added and only those undone", (MIG_ON, "2g.20gb", "2"), 0, (),
        m.has(profiles=["1g.10gb", "2g.20gb", "2g.20gb"]), (m.instance,),
        last=m.has(gis=[11], mig_current="Enabled")),
    m.Row("MIG that was switched on by hand stays on", (MIG_OFF,), 0, ("it is left alone",),
        m.untouched, (m.instance,)),
    m.Row("instances in use", (MIG_OFF,), 6, ("pid 4242 (user alice): python3 on GPU instance 8",),
        m.untouched, (TWO, m.process(user="alice", gi=8)), ((MIG_OFF,),)),
    *(m.Row(f"compute instances that stay: {words}", (MIG_OFF,), code, (f"smi said: {words}",),
          m.has(gis=[7, 8]), (TWO, m.rule("nvidia-smi mig -i * -dci *", exit=4, text=words)),
          ((MIG_OFF,),))
      for code, words in ((5, f"Unable to destroy: {PRIVILEGE}"), (1, "Unknown Error"))),
    m.Row("an instance that the driver does not let go", (MIG_OFF,), 6, ("could not be destroyed",),
        None, (TWO, m.rule(DESTROY, exit=19, text="Unable to destroy: In use by another client")),
        ((MIG_OFF,),)),
    *(m.Row(f"{command[0]}: after a restart the ids are others'", command, code, (words,),
          m.has(gis=[7, 8]), (TWO, *ids, m.saved_before_a_restart))
      for ids in ((), (m.forgotten_ids,))
      for command, code, words in (((MIG_OFF,), 6, "did not create are there (ids 7,8)"),
                                   ((MIG_ON, "7g.80gb"), 6, "does not fit beside them"))),
    m.Row("a state without ids", TWO, 6, ("an earlier run are there; remove them",), m.untouched,
        (TWO, m.damaged("mig", f"gpu_uuid={UUID}\n"))),
    m.Row("killed between creating and saving", (MIG_OFF,), 0, (), m.as_delivered,
        (TWO, m.forgotten_ids)),
    m.Row("instances that did not outlive a reset are made anew", TWO, 0, (),
        m.has(profiles=["1g.10gb"] * 2), (TWO, m.gpu(instances=[]))),
    # status
    m.Row("an untouched GPU", (STATUS,), 0,
        ("mode in force: time-slicing (what CUDA does by itself)", "compute mode:  Default",
         "time slice:    Default", "MIG mode:      Disabled", "MPS daemon:    none",
         "in use by:     nobody", "saved:         nothing"), m.untouched),
    m.Row("processes and their owners", (STATUS,), 0, ("pid 4242 (user alice): python3, 512 MiB",),
        m.untouched, (m.process(user="alice"),)),
    m.Row("a process whose name would steer the terminal", (STATUS,), 0, ("alice): x?2J?[0m, 512",),
        m.untouched, (m.process(user="alice", name="x\u009b2J\x1b[0m"),)),
    m.Row("another user's daemon", (STATUS,), 0,
        ("MPS daemon:    another, pid", "of user alice", "mps, by a daemon that enable_mps.sh did"),
        m.untouched, (m.daemon(user="alice"),)),
    m.Row("a mode without sharing", (STATUS,), 0, ("exclusive (compute mode Exclusive_Process",),
        m.untouched, (m.gpu(compute_mode="Exclusive_Process"),)),
    *(m.Row(f"what undoes {' '.join(setup)}", (STATUS,), 0,
          (f"mode in force: {mode}", f"{saved}-{UUID}.state", f"undo: {undo}"), m.untouched,
          (setup,))
      for setup, mode, saved, undo in (
        ((TS, "4"), "time-slicing", "time-slicing", "./gpu-configs/reset_time_slicing.sh --gpu 0"),
        ((TS, "4", "--timeslice", "long"), "time-slicing", "time-slice",
         "sudo ./gpu-configs/reset_time_slicing.sh"),
        ((MPS_ON,), "mps", "mps", "./gpu-configs/disable_mps.sh"),
        ((MPS_ON, "--exclusive"), "mps", "compute-mode", "sudo ./gpu-configs/disable_mps.sh"),
        (FOUR, "mig", "mig", "sudo ./gpu-configs/disable_mig.sh"))),
    m.Row("restore, as a dry run", (STATUS, "--restore", "--dry-run"), 0,
        (f"disable_mps.sh --gpu {UUID}",), m.untouched, ((MPS_ON,),)),
    m.Row("restore", (STATUS, "--restore"), 0, ("MPS is off",), m.as_delivered,
        ((MPS_ON, "--exclusive"), (STATUS,))),
    m.Row("restore, after a kill while state was being written", (STATUS, "--restore"), 0,
        ("mig-", "state.new"), m.as_delivered, (m.damaged("mig", suffix=".new"),)),
    m.Row("of two GPUs that are listed one is lost a moment later: the other is restored",
        (STATUS, "--restore"), 0, ("MPS is off on GPU 1",), m.has(daemons=0),
        ((MPS_ON, "--gpu", "1"), m.rule(f"nvidia-smi -i {UUID} --query-gpu*", exit=15,
                                        text="GPU is lost.")), kind="h100x2"),
    m.Row("a restore that fails in part keeps the state and the note of a run",
        (STATUS, "--restore"), 1, (),
        lambda scripts: (m.has(daemons=1)(scripts), scripts.saved("driver")["mode"])[1] == "mps",
        ((MPS_ON,), m.damaged("time-slicing", f"gpu_uuid={UUID}\nclients=4\n"),
         m.damaged("driver", f"gpu_uuid={UUID}\nmode=mps\npid=4194999\nstarted=1\n"),
         m.rule(QUIT, exit=0, text="")), ((STATUS, "--restore"),), environment=NO_WAIT),
)  # fmt: skip
def test_a_script_says_and_does_what_its_row_tells(row: m.Row) -> None:
    m.check(row)


def test_a_state_folder_too_long_for_a_socket_leaves_the_sockets_elsewhere(
    scripts: m.ModeScripts,
) -> None:
    scripts.environment["GPU_SHARING_STATE_DIR"] = str(scripts.folder / ("x" * 90))
    scripts.must(MPS_ON)
    (pipe,) = scripts.machine.state()["mps"]
    assert len(f"{pipe}/control_privileged") < 108
    assert Path(pipe).parent.stat().st_mode & 0o777 == 0o700
    scripts.must(MPS_OFF)
    assert not Path(pipe).parent.exists()


# --- whose state it is, and what sudo's caller can set --------------------------------------------


def test_state_is_for_its_owner_alone_whatever_the_umask(scripts: m.ModeScripts) -> None:
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
        m.as_delivered(scripts)


class Sudo:
    """`nobody` types `sudo ./gpu-configs/...`, with a state folder of their own."""

    def __init__(self, scripts: m.ModeScripts) -> None:
        m.require_reachable()
        self.scripts = scripts
        self.folder = scripts.folder / "of-nobody"
        self.folder.mkdir()
        os.chown(self.folder, m.NOBODY.pw_uid, m.NOBODY.pw_gid)
        self.variables = {"GPU_SHARING_STATE_DIR": str(self.folder / "state")}

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.scripts.run(*command, prefix=["sudo"], **{**self.variables, **environment})

    def without(self, *command: str) -> subprocess.CompletedProcess[str]:
        return self.scripts.run(*command, prefix=m.AS_NOBODY, **self.variables)


@pytest.fixture
def sudo(scripts: m.ModeScripts) -> Sudo:
    return Sudo(scripts)


def as_link(path: Path) -> None:
    """Somebody else's text, by a link."""
    path.symlink_to(path.rename(path.parent.parent / "text"))


@m.needs_real_root
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (as_link, "is a symbolic link, which these scripts never make; look at it and remove it"),
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
        m.refused(result, 5, words)
        assert result.stderr.count("\n") == 1
    assert sudo.scripts.machine.changing_calls() == []
    assert len(sudo.scripts.machine.state()["mps"]) == 1


@m.needs_real_root
@pytest.mark.parametrize(
    "command",
    [(MPS_ON, "--exclusive"), (MIG_ON, "1g.5gb", "4"), (TS, "4", "--timeslice", "short")],
    ids=" ".join,
)
def test_a_user_is_refused_with_the_sudo_line(scripts: m.ModeScripts, command: tuple) -> None:
    m.require_reachable()
    result = scripts.run(*command, prefix=m.AS_NOBODY)
    m.refused(result, 5, f"sudo ./gpu-configs/{' '.join(command)}")
    assert scripts.machine.changing_calls() == []


def test_a_state_folder_that_cannot_be_made_is_named(scripts: m.ModeScripts) -> None:
    (scripts.folder / "file").write_text("")
    inside_a_file = str(scripts.folder / "file" / "x")
    m.refused(scripts.run(TS, "4", GPU_SHARING_STATE_DIR=inside_a_file), 5, "GPU_SHARING_STATE_DIR")


def test_without_the_variable_state_goes_to_the_users_and_to_roots_own_folder(
    scripts: m.ModeScripts,
) -> None:
    home = scripts.folder / "home"
    scripts.environment |= {"GPU_SHARING_STATE_DIR": "", "HOME": str(home)}
    scripts.must(TS, "4", "--timeslice", "long")
    (record,) = (home / ".local" / "state" / "gpu-sharing-bench").glob("*.state")
    (setting,) = scripts.root_state.glob("*.state")
    assert record.name == f"time-slicing-{UUID}.state"
    assert setting.name == f"time-slice-{UUID}.state"
    assert setting.stat().st_mode & 0o777 == 0o644
    scripts.must(RESET)
    assert list(scripts.root_state.glob("*.state")) == []
    m.as_delivered(scripts)


@m.needs_real_root
def test_under_sudo_the_daemon_is_the_callers_and_the_compute_mode_is_in_roots_state(
    sudo: Sudo,
) -> None:
    # The guide's two lines: sudo enables, then everything runs as the plain user.
    result = sudo.run(MPS_ON, "--exclusive")
    assert result.returncode == 0, result.stderr
    (found,) = sudo.scripts.machine.state()["mps"].values()
    assert (found["uid"], found["user"]) == (m.NOBODY.pw_uid, "nobody")
    for path in [sudo.folder / "state", *(sudo.folder / "state").rglob("*")]:
        assert path.stat().st_uid == m.NOBODY.pw_uid, path
    (setting,) = sudo.scripts.root_state.glob("*.state")
    assert (setting.name, setting.stat().st_uid) == (f"compute-mode-{UUID}.state", 0)
    # the plain user sees it, and is told to use sudo for the compute mode
    status = sudo.without(STATUS)
    assert "mode in force: mps" in status.stdout
    assert "undo: sudo ./gpu-configs/disable_mps.sh" in status.stdout
    m.refused(sudo.without(MPS_OFF), 5, "sudo ./gpu-configs/disable_mps.sh")
    assert len(sudo.scripts.machine.state()["mps"]) == 1
    result = sudo.run(MPS_OFF)
    assert result.returncode == 0, result.stderr
    assert [
        *sudo.scripts.root_state.glob("*.state"),
        *(sudo.folder / "state").glob("*.state"),
    ] == []
    m.as_delivered(sudo.scripts)
    # without --exclusive no root is needed to end what sudo started
    assert sudo.run(MPS_ON).returncode == 0
    assert sudo.without(MPS_OFF).returncode == 0
    m.as_delivered(sudo.scripts)


@m.needs_real_root
def test_under_sudo_a_restore_goes_by_the_callers_variables(sudo: Sudo) -> None:
    assert sudo.run(MPS_ON, "--exclusive").returncode == 0
    locked = sudo.run(STATUS, "--restore", GPU_SETTINGS_LOCKED="1")
    m.refused(locked, 1, "is refused: GPU_SETTINGS_LOCKED=1")
    m.has(daemons=1, compute_mode="Exclusive_Process")(sudo.scripts)
    assert sudo.run(STATUS, "--restore").returncode == 0
    m.as_delivered(sudo.scripts)
    assert list((sudo.folder / "state").glob("*.state")) == []


@m.needs_real_root
def test_state_that_sudos_caller_has_written_makes_root_undo_nothing(sudo: Sudo) -> None:
    m.instance(sudo.scripts)
    sudo.scripts.machine.change_gpu(compute_mode="Exclusive_Process", timeslice="Long")
    state = sudo.folder / "state"
    state.mkdir(mode=0o700)
    planted = {
        "mig": "previous_mig_mode=Disabled\ngpu_instances=11\ninstances_before=\n",
        "compute-mode": "previous=Prohibited\nset=Exclusive_Process\n",
        "time-slice": "previous=Short\nset=Long\n",
        "time-slicing": "clients=4\n",
        "mps": "user=nobody\nuid=65534\npipe_directory=/nonexistent/pipe\n",
    }
    for kind, text in planted.items():
        (state / f"{kind}-{UUID}.state").write_text(f"gpu_uuid={UUID}\n{text}")
    for path in [state, *state.iterdir()]:
        os.chown(path, m.NOBODY.pw_uid, m.NOBODY.pw_gid)
    for script in (MIG_OFF, MPS_OFF, RESET):
        assert sudo.run(script).returncode == 0
    assert sudo.scripts.machine.changing_calls() == []
    m.has(gis=[11], compute_mode="Exclusive_Process", timeslice="Long")(sudo.scripts)


@m.needs_real_root
@pytest.mark.parametrize("caller", ["nobody", "root"])
def test_a_lock_in_the_callers_environment_holds_under_sudo_too(sudo: Sudo, caller: str) -> None:
    locked = {"FAKE_SUDO_USER": caller, "GPU_SETTINGS_LOCKED": "1"}
    m.refused(sudo.run(MPS_ON, "--exclusive", **locked), 5, "GPU_SETTINGS_LOCKED=1")
    assert sudo.scripts.machine.changing_calls() == []


@m.needs_real_root
def test_root_runs_no_program_from_a_folder_of_sudos_caller(sudo: Sudo) -> None:
    planted = sudo.folder / "bin"
    planted.mkdir()
    for name in ("nvidia-smi", "setpriv", "stat"):
        (planted / name).write_text(f"#!/bin/sh\ntouch {sudo.scripts.folder}/broken\n")
        (planted / name).chmod(0o755)
    os.chown(planted, m.NOBODY.pw_uid, -1)
    path = sudo.scripts.environment["PATH"]
    result = sudo.run(MIG_ON, "1g.10gb", "2", PATH=f"{path.split(':')[0]}:{planted}:{path}")
    assert result.returncode == 0, result.stderr
    assert sudo.run(MIG_OFF).returncode == 0
    assert not (sudo.scripts.folder / "broken").exists()
    m.as_delivered(sudo.scripts)


@m.needs_real_root
def test_root_runs_no_program_of_the_working_directory(sudo: Sudo) -> None:
    planted = sudo.scripts.project / "getent"
    planted.write_text(f"#!/bin/sh\ntouch {sudo.scripts.folder}/broken\n")
    planted.chmod(0o755)
    # a PATH of which no folder is to be trusted
    variables = {"PATH": str(sudo.folder), "SUDO_UID": str(m.NOBODY.pw_uid)}
    m.refused(sudo.scripts.run(STATUS, **variables), 3, "nvidia-smi was not found")
    assert not (sudo.scripts.folder / "broken").exists()


@m.needs_real_root
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
    (sudo.scripts.folder / "link").symlink_to(sudo.folder)  # root's own, to a user's folder
    own = sudo.scripts.run(TS, "2", GPU_SHARING_STATE_DIR=str(sudo.scripts.folder / "link"))
    m.refused(own, 5, "belongs to user nobody")
    assert not (sudo.folder / "lock").exists()


@m.needs_real_root
def test_root_that_may_not_enter_the_callers_folders_does_without_a_turn(sudo: Sudo) -> None:
    # as in a home on NFS
    prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "sudo"]
    for command in (MPS_ON, MPS_OFF):
        result = sudo.scripts.run(command, prefix=prefix, **sudo.variables)
        assert result.returncode == 0, result.stderr


# --- signals --------------------------------------------------------------------------------------

SET_UPS = [
    ((TS, "4", "--timeslice", "long"), SET_SLICE),
    ((MPS_ON, "--exclusive"), START),
    ((MPS_ON, "--exclusive"), SET_MODE),
    (FOUR, SWITCH),
    (FOUR, CREATE),
]


CTRL_C, TERM = (signal.SIGINT, True, 130), (signal.SIGTERM, False, 143)


@pytest.mark.parametrize(
    ("before", "command", "during", "how"),
    [*(((), *set_up, how) for set_up, how in zip(SET_UPS, itertools.cycle((CTRL_C, TERM)))),
     (SET_UPS[0][0], (RESET,), SET_SLICE, TERM), (SET_UPS[1][0], (MPS_OFF,), SET_MODE, CTRL_C),
     (SET_UPS[3][0], (MIG_OFF,), DESTROY, TERM)],
)  # fmt: skip
def test_a_signal_in_the_middle_puts_everything_back_and_an_undo_is_finished_by_the_next(
    scripts: m.ModeScripts, before: tuple[str, ...], command: tuple[str, ...], during: str,
    how: tuple[signal.Signals, bool, int],
) -> None:  # fmt: skip
    number, group, status = how
    if before:
        scripts.must(*before)
    code, stderr = scripts.interrupt(*command, during=during, number=number, group=group)
    assert code == status, stderr
    assert ("Putting back" in stderr) == (not before)
    if before:
        scripts.must(*command)
    m.as_delivered(scripts)


@pytest.mark.parametrize("seed", range(int(os.environ.get("MODE_SCRIPT_KILLS", "8"))))
def test_a_kill_at_a_random_moment_leaves_the_card_as_it_was(
    scripts: m.ModeScripts, seed: int
) -> None:
    chosen = random.Random(seed)
    setup, _ = chosen.choice(SET_UPS)
    number = chosen.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    command = setup
    if chosen.random() < 0.3:
        scripts.must(*setup)
        command = (m.UNDO[setup[0]],)
    process = scripts.start(*command, stderr=subprocess.DEVNULL)
    time.sleep(chosen.uniform(0, 1.0))
    m.send(process, number, group=chosen.random() < 0.5)
    process.wait(timeout=60)
    wait_until(lambda: not has_members(process.pid), "what the script had started ends")
    scripts.must(STATUS, "--restore")
    m.as_delivered(scripts)


def test_who_reads_no_more_ends_it_and_everything_is_put_back(scripts: m.ModeScripts) -> None:
    # As in `setup_mig.sh ... 2>&1 | tee log`, where Ctrl-C ends tee, too.
    scripts.machine.fail(CREATE, seconds=1.0)
    process = scripts.start(*FOUR, stderr=subprocess.PIPE)
    # What it says before comes too early to be sure to find no reader.
    rules = scripts.folder / "machine" / "rules"
    wait_until(lambda: b"seen" in rules.read_bytes(), "the instances are being made")
    assert scripts.gpu()["mig_current"] == "Enabled"
    assert process.stderr is not None
    process.stderr.close()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    m.as_delivered(scripts)


def test_ctrl_c_ends_the_wait_for_a_driver_that_hangs(scripts: m.ModeScripts) -> None:
    scripts.machine.fail(QUERY, seconds=20.0)
    process = scripts.start(STATUS, stderr=subprocess.PIPE)
    rules = scripts.folder / "machine" / "rules"
    wait_until(lambda: b"seen" in rules.read_bytes(), "the question")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=10) == 130


def test_two_at_once_take_turns(scripts: m.ModeScripts) -> None:
    started = [scripts.start(MPS_ON, stderr=subprocess.PIPE) for _ in range(2)]
    assert [process.wait(timeout=60) for process in started] == [0, 0]
    assert daemons(scripts, "locks") == [[]]
    scripts.must(MPS_OFF)
    m.as_delivered(scripts)


def test_who_waits_for_a_turn_can_be_told_to_end(scripts: m.ModeScripts) -> None:
    (scripts.state_directory / "lock").mkdir(parents=True, mode=0o700)
    scripts.state_directory.chmod(0o700)
    lock = os.open(scripts.state_directory / "lock", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    process = scripts.start(MPS_ON, stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert process.stderr.readline() == "Waiting for another of these scripts to end.\n"
    process.terminate()
    assert process.wait(timeout=10) == 143
    os.close(lock)


def test_a_closed_standard_error_changes_no_exit_code(scripts: m.ModeScripts) -> None:
    scripts.machine.add_process(pid=4242)
    for code, *command in ((2, TS, "no"), (6, MPS_ON, "--exclusive"), (3, STATUS, "--gpu", "7")):
        prefix = ["bash", "-c", 'exec "$0" "$@" 2>&-', *(m.ROOT_PREFIX or [])]
        assert scripts.run(*command, prefix=prefix).returncode == code


def test_restore_finds_the_scripts_from_their_own_folder(scripts: m.ModeScripts) -> None:
    scripts.must(MPS_ON)
    subprocess.run(
        [*(m.ROOT_PREFIX or []), "bash", STATUS, "--restore"], cwd=scripts.project / "gpu-configs",
        env=scripts.environment, capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    m.as_delivered(scripts)


def has_members(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
