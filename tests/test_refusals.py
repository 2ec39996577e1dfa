"""Wrong arguments: exit code 2 and a sentence that names the fix, before anything is done."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT_ROOT
from driver_runner import DriverRunner
from mode_script_runner import ROOT_PREFIX

PLAN = str(PROJECT_ROOT / "examples" / "plans" / "own-commands.toml")
MODES = "--modes needs some of: time-slicing mps mps:even mps:PERCENT mps:partitions mig"
TS, MPS_ON, MIG_ON = (
    f"gpu-configs/{name}.sh" for name in ("setup_time_slicing", "enable_mps", "setup_mig")
)
TOO_LONG = "x" * 300  # for the name of a file
# Arguments as words between blanks, and the sentence's meaning.
REFUSED: dict[str, list[tuple[str, str]]] = {
    "run_experiments.sh": [
        *((f"--modes={given}", MODES)
          for given in ("mps,mpz", "", "mps:0", "mps:101", "mps:even/", "mps:even/50",
                        "time-slicing:50")),
        *((f"--modes {given} --mps-percentage 50", "leave --mps-percentage")
          for given in ("mps:partitions", "mps:even,mps:25")),
        ("--workloads 0", "--workloads needs a whole number from 1 on"),
        ("--phase-minutes 0.0", "--phase-minutes needs a number of minutes over 0"),
        ("--engine fast", "--engine needs one of: eager graph compile"),
        ("--data-dir /nonexistent", "--data-dir: '/nonexistent' is not a folder"),
        *((f"{flag} {TOO_LONG}", said) for flag, said in (
            ("--data-dir", "is not a folder"), ("--plan", "is not a file"),
            ("--baseline", "is no run folder"), ("--output", "cannot make the folder"))),
        ("--baseline /nonexistent", "--baseline: '/nonexistent' is no run folder"),
        ("--seed -1", "--seed needs a whole number from 0 on"),
        ("--nonsense", "unknown option: --nonsense"),
        ("extra", "unexpected argument: extra"),
        ("--quick --repeats", "--repeats needs a whole number from 1 on"),
        (f"--mix serving --plan {PLAN}", "--mix and --plan: give one of the two"),
        ("--mix pairs --workloads 4", "two jobs in each co-run: leave --workloads"),
        *((f"{flag} --quick", f"{flag} needs a value")
          for flag in ("--output", "--data-dir", "--plan", "--baseline")),
        ("--resume /nowhere", "'/nowhere' holds no arguments.nul"),
        ("--resume /tmp --quick", "--resume needs a folder and takes no other flags"),
        ("--quick --resume /tmp", "give no others"),
        ("--mig --mig-layout 1g.5gb,1g.5gb,9g.90gb",
         "has no profile 1g.5gb,9g.90gb; it has 1g.10gb 1g.10gb+me"),
        ("--mig --mig-layout 1g.10gb,2g.20gb --workloads 4",
         "has 2 instances for 4 jobs; name one for each"),
        ("--mig --mig-layout 2g,1g", "needs MIG profiles with commas between"),
        *((f"--mps-percentage {given}", "--mps-percentage needs even, or percentages up to 100")
          for given in ("0", "101", "5_0", "50,")),
        ("--mps-memory-limit 8", "--mps-memory-limit needs sizes such as 512M or 8G"),
        ("--modes time-slicing --mps-priority normal", "--mps-priority needs mps among"),
    ],
    "stress_test.sh": [
        ("exclusive", "MODE needs one of: time-slicing mps mps:partitions mig"),
        ("time-slicing 99999999999", "9999 at most"),
        ("mps ''", "MAX needs a whole number from 1 on"),
        ("mps none", "MAX needs a whole number from 1 on"),
        ("mps 6 --mix mixed", "MAX needs to be a multiple of 4"),
        (f"mps 6 --plan {PLAN}", "MAX needs to be a multiple of 4"),
        ("--slo-ms 0", "--slo-ms needs a number above 0"),
        ("--slo-ms 50", "--slo-ms needs jobs with response times"),
        ("mig --until-break", "as many jobs as instances"),
        ("mps:partitions --until-break", "each on its own partition"),
        ("mps:partitions --mps-percentage 50", "--mps-percentage: under mps:partitions"),
        ("--mps-percentage 50", "--mps-percentage needs MODE mps"),
        ("--plan no.toml", "'no.toml' is not a file"),
        ("--mix all", "--mix needs one of: training inference interactive mixed"),
    ],
    TS: [
        *((given, "CLIENTS must be a number from 1 to 9999") for given in ("0", "4x", "10000")),
        ("", "CLIENTS must be a number"),
        ("4 8", "unexpected argument: 8"),
        ("4 --nonsense", "unknown option: --nonsense"),
        ("4 --gpu", "--gpu needs a value"),
        ("4 --timeslice tiny", "default, short, medium or long"),
    ],
    MPS_ON: [
        *((f"--percentage={given}", "over 0 and up to 100") for given in ("0", "-1", "101", "1e1")),
        ("--percentage=", "--percentage needs a value"),
        *((f"--static-partitions {given}", "a number from 1 to 99") for given in ("0", "4x")),
        ("--static-partitions 4 --percentage 25", "leave --percentage"),
        ("--exclusive=1", "--exclusive takes no value"),
    ],
    MIG_ON: [
        ("", "a profile and a count"),
        ("1g.10gb 0", "COUNT must be a number"),
        ("1g.10gb -3", "unknown option: -3"),
        ("4 1g.10gb", "'4' is no MIG profile"),
        ("1g.10gb,2g.20gb 2", "takes no count"),
        ("1g.10gb;reboot 2", "is no MIG profile"),
    ],
    "benchmarking/gpu_monitor.py": [
        ("--interval 0.05", "give 0.1 to 86400 seconds"),
        ("--interval nan", "give 0.1 to 86400 seconds"),
        ("--duration -1", "give 0 (no end) or more seconds"),
        ("--prometheus 70000", "give a port from 0 to 65535"),
    ],
    "workloads/training/bert_training.py": [
        *((f"--{flag}=", f"argument --{flag}: is empty: give a value, or leave it out")
          for flag in ("results-dir", "gpu", "model", "data", "events")),
        ("--mode mps", "unrecognized arguments: --mode mps"),
    ],
    "benchmarking/benchmark_suite.py": [
        *((f"--device cpu --dry-run --{flag}", "'10000' is too many: 9999 at most")
          for flag in ("repeats 10000", "workloads 10000", "run-id x --round 10000")),
        *((f"--{flag}=", f"argument --{flag}: is empty: give a value, or leave it out")
          for flag in ("resume", "gpu", "results-dir", "job")),
        *((f"--mode mps --mps-percentage {given}", f"'{given}' is not a percentage over 0")
          for given in ("5_0", "1e1")),
        *((f"{flag} {TOO_LONG}", said) for flag, said in (
            ("--data-dir", "is no folder"), ("--device cpu --results-dir", "cannot create"),
            ("--resume", "there is no run"), ("--device cpu --baseline", "there is no run"))),
        ("--resum mine", "unrecognized arguments: --resum mine"),
        ("--resume mine --quick", "leave --quick out"),
        *((f"--mode mig --mig-layout {given}", "is no MIG profile")
          for given in ("1g", "1g.10gb;reboot", "0g.5gb")),
    ],
    "benchmarking/analyze_results.py": [
        ("--results-dir /nowhere", "/nowhere is not a folder"),
        (f"--results-dir {TOO_LONG}", "is not a folder"),
    ],
    "benchmarking/blast_radius.py": [
        ("--fault fire", "invalid choice: 'fire'"),
        ("--fault oom --summary x", "give --fault to measure one, or --summary"),
        ("--summary x", "x holds no blast_radius.json"),
        (f"--summary {TOO_LONG}", "holds no blast_radius.json"),
    ],
    "benchmarking/speed_table.py": [
        ("--only resnet51", "there is no job resnet51; choose of resnet50-training-cifar"),
        ("--engines eager", "there is no engine eager; choose of graph, compile"),
        ("--repeats 0", "'0' is not a whole number of 1 or more"),
        ("--repeats 10000", "'10000' is too many: 9999 at most"),
        ("--data-dir /nowhere", "--data-dir /nowhere is no folder"),
    ],
    "benchmarking/sweep.py": [
        (f"--output sweep --knob {knob} --values {words}", said) for knob, words, said in (
            ("workloads", "1,1", "give each value once"),
            ("mps-percentage", "50,150 -- --mode mps", "'150' is not a percentage"),
            ("mps-percentage", "50", "limits of MPS clients need --mode mps"),
            ("workloads", "2 -- --run-id x", "--run-id behind -- is the sweep's own"),
            ("workloads", "2 -- --workloads 2", "is the knob itself"),
            ("job-flag=batch-size", "2", "is none of the knobs: workloads, "),
            ("job-flag=--x", "2 -- --baseline y", "leave --job-arguments and --baseline"),
            ("mps-priority", "normal -- --mode mps --mix pairs", "leave exclusive and pairs"))
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("program", "arguments", "code"),
    [
        ("fleet", "run --output {}/out", 2),
        ("sweep", "--knob workloads --values 1 --output {}/out", 2),
        ("benchmark_suite", "--device cpu --job true --results-dir {}/out", 2),
        ("benchmark_suite", "--device cpu --dry-run --mix inference --results-dir {}/out", 0),
        ("gpu_monitor", "--duration 0.1 --output -", 0),
    ],
)
def test_a_program_that_needs_the_folder_it_was_started_in_says_that_it_is_gone(
    tmp_path: Path, program: str, arguments: str, code: int
) -> None:
    (gone := tmp_path / "gone").mkdir()
    path = PROJECT_ROOT / "benchmarking" / f"{program}.py"
    command = shlex.join([sys.executable, str(path), *arguments.format(tmp_path).split()])
    result = subprocess.run(
        ["bash", "-c", f"rmdir {shlex.quote(str(gone))}; exec {command}"], cwd=gone,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == code, result.stderr
    if code:
        assert "the folder that this was started in is gone" in result.stderr
        assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# Starts a Python program, imported once, with each row of words that standard input has.
START_ALL = """
import json, os, runpy, sys
program, ends = sys.argv[1], []
runpy.run_path(program)
for words in json.load(sys.stdin):
    said, shown = os.memfd_create("said"), os.memfd_create("shown")
    child = os.fork()
    if not child:
        os.dup2(shown, 1)
        os.dup2(said, 2)
        sys.argv = [program, *words]
        runpy.run_path(program, run_name="__main__")
        sys.exit()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ends.append((code, *(os.pread(file, 1 << 20, 0).decode() for file in (said, shown))))
print(json.dumps(ends))
"""


def ends_of(path: Path, rows: list[list[str]], **how: object) -> list[tuple[int, str, str]]:
    """The exit code, standard error and output of a Python program for each row of words."""
    command = [sys.executable, "-I", "-c", START_ALL, str(path)]
    said = subprocess.check_output(command, input=json.dumps(rows), text=True, timeout=100, **how)
    return json.loads(said)


@pytest.mark.parametrize("program", REFUSED)
def test_a_wrong_argument_is_exit_2_with_one_sentence_before_anything_is_done(
    asked: DriverRunner, tmp_path: Path, program: str
) -> None:
    rows = [shlex.split(arguments) for arguments, _ in REFUSED[program]]
    how = {"cwd": tmp_path, "env": asked.environment}
    if program.startswith("gpu-configs/"):
        command = [*(ROOT_PREFIX or []), str(asked.project / program)]
        how |= {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 60}
        done = [subprocess.run([*command, *words], check=False, **how) for words in rows]
        ends = [(one.returncode, one.stderr, one.stdout) for one in done]
    elif program.endswith(".sh"):  # the program behind it is told the same words
        driver = asked.project / "benchmarking" / program.replace(".sh", ".py")
        ends = ends_of(driver, rows, **how)
    else:
        ends = ends_of(PROJECT_ROOT / program, rows, **how)
    for (arguments, words), (code, said, _) in zip(REFUSED[program], ends, strict=True):
        assert (code, words in said, "Traceback" in said) == (2, True, False), (arguments, said)
        assert not program.endswith(".py") or said.count("\n") == 1, arguments
    assert list(tmp_path.iterdir()) == []
    assert asked.machine.changing_calls() == []
