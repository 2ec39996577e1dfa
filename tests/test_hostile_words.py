"""Names of GPUs, processes, folders and runs that try to be commands, flags or markup.

The scripts are real, GPU, suite and analysis pretended (fakes/).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from driver_runner import DriverRunner, copy_drivers
from mode_script_runner import PROJECT_ROOT, ModeScripts
from waiting import wait_until

from benchmarking.measuring import proofs
from benchmarking.report import render
from benchmarking.report.tables import Table
from benchmarking.suite.session import run_suite

# Makes a file `broken` where it is run as a command, from whichever folder.
HOSTILE_NAME = (
    'NVIDIA $(touch "$FAKE_GPU_STATE/broken") "H100"; touch "$FAKE_GPU_STATE/broken" a[$(id)] é中'
    "`touch $FAKE_GPU_STATE/broken` %s %n 'H100, \\ * | <script>alert(1)</script>"
)
HOSTILE_FOLDER = '-x  é中 it\'s "$HOME" `id`;& \\n a[b]*?{c,d}'
SCRIPT_SOURCES = sorted(
    path
    for folder in (".", "gpu-configs", "gpu-configs/lib")
    for path in (PROJECT_ROOT / folder).glob("*.sh")
)


def test_a_gpus_name_is_never_run_and_the_records_stay_json(runner: DriverRunner) -> None:
    runner.machine.change_gpu(name=HOSTILE_NAME)
    assert HOSTILE_NAME in runner.must("gpu_status.sh").stdout
    runner.environment["GPU_SHARING_WAIT_SECONDS"] = "0"
    runner.machine.fail("nvidia-cuda-mps-control -d", exit=1, text=HOSTILE_NAME)
    assert runner.drive("run_experiments.sh", "--modes", "mps").returncode == 1
    assert "did not answer within 0 s" in runner.reason("mps")
    assert (list(runner.suite_calls()), runner.left_behind()) == (["baseline"], [])
    runner.machine.forget_rules()
    runner.machine.change_gpu(mig_current="[N/A]", mig_pending="[N/A]")
    runner.output = runner.folder / "second"
    assert runner.drive("run_experiments.sh", "--modes", "mig").returncode == 0
    assert runner.reason("mig") == f"{HOSTILE_NAME} has no MIG"
    assert not list(runner.folder.rglob("*broken*"))


def test_a_line_break_or_an_escape_in_a_gpus_name_makes_no_second_gpu_and_steers_no_terminal(
    scripts: ModeScripts,
) -> None:
    scripts.machine.change_gpu(name="NVIDIA\x1b]0;x\x07\nH100, GPU-../../x, Default")
    status = scripts.must("gpu_status.sh").stdout
    assert status.count("mode in force") == 1
    assert "NVIDIA?]0;x?" in status
    assert "\x1b" not in status


@pytest.mark.parametrize("field", [{"uuid": "GPU-../../../x"}, {"index": "a[$(touch broken)]"}])
def test_an_index_or_uuid_that_is_none_is_no_gpu(
    scripts: ModeScripts, field: dict[str, str]
) -> None:
    scripts.machine.change(gpus=[{**scripts.gpu(), **field}])
    result = scripts.run("setup_time_slicing.sh", "2")
    assert result.returncode == 3
    assert "nvidia-smi names no GPU that can be used" in result.stderr
    assert scripts.left_behind() == []
    assert not (PROJECT_ROOT / "broken").exists()


def test_a_strangers_process_name_steers_no_terminal(scripts: ModeScripts, tmp_path: Path) -> None:
    scripts.machine.add_process(pid=4242, name="\x1b[2Jpython3 $(touch broken)", user="alice")
    assert "pid 4242 (user alice): ?[2Jpython3" in scripts.must("gpu_status.sh").stdout
    sleep = tmp_path / "\x1b[2Jabcdefghijé"  # the kernel cuts it within the last letter
    sleep.symlink_to(shutil.which("sleep"))
    with subprocess.Popen([sleep, "60"]) as process:
        comm = Path(f"/proc/{process.pid}/comm")
        wait_until(lambda: b"abcdef" in comm.read_bytes(), "the program's start")
        words = proofs.describe_pids([process.pid])
        process.kill()
    assert words == f"pid {process.pid} (?[2Jabcdefghij\ufffd)"


def test_project_results_data_state_and_temporary_files_may_lie_in_folders_of_any_name(
    runner: DriverRunner, tmp_path: Path
) -> None:
    odd = HOSTILE_FOLDER
    runner.project = project = tmp_path / odd
    project.mkdir()
    shutil.copytree(PROJECT_ROOT / "gpu-configs", project / "gpu-configs")
    copy_drivers(project)
    temporary, state = project / f"tmp {odd}", runner.folder / f"s{odd}"
    for folder in (temporary, project / f"data {odd}"):
        folder.mkdir()
    runner.environment |= {"TMPDIR": str(temporary), "GPU_SHARING_STATE_DIR": str(state)}
    runner.output = Path(odd)
    flags = ("--modes", "time-slicing,mps", "--data-dir", f"data {odd}")
    runner.must_drive("run_experiments.sh", *flags)
    assert (project / odd / "phases.jsonl").read_text().count('"status":"ok"') == 4
    call = runner.suite_calls()["mps"]
    assert Path(project, call["flags"]["--results-dir"]).samefile(project / odd)
    assert not call["flags"]["--results-dir"].startswith("-")
    assert call["gpu"]["daemons"] == 1
    assert not runner.machine.state()["mps"]
    # The folder that is locked stays, empty.
    assert [path.name for path in state.rglob("*")] == ["lock"]
    assert list(temporary.iterdir()) == []

    again = runner.drive("run_experiments.sh")
    assert again.returncode == 2
    assert "is not empty; name another folder" in again.stderr
    resumed = runner.drive("run_experiments.sh", "--resume", odd)
    assert resumed.returncode == 0, resumed.stderr
    shutil.rmtree(project / odd)

    runner.rule(analysis={"files": {"comparison.json": "{}", "scaling-x.png": ""}})
    stress = runner.drive("stress_test.sh", "mps", "2")
    assert stress.returncode == 0, stress.stderr
    assert "(the ramp is scaling-x.png)" in stress.stderr
    assert not any("broken" in path.name for path in project.rglob("*"))


def test_a_run_id_that_is_none_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for run_id in ("../../etc", "a;touch broken", "$(touch broken)", "-x", "é\n"):
        for flag in ("--resume", "--run-id"):
            words = ["--device", "cpu"] if flag == "--run-id" else []
            words = [*words, "--results-dir", "results", f"{flag}={run_id}"]
            assert run_suite(words, from_driver=True).exit_code == 2
            assert "error: " in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.rglob("broken*"))
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_bar_in_a_name_makes_no_cell_of_the_markdown_table() -> None:
    page = render.environment("md").get_template("blocks.md.j2").module
    made = page.table(Table(("gpu | x", "mode"), [["H100 | y", "m|s"]], keys=1, code=(1,)))
    lines = [line for line in str(made).splitlines() if line]
    assert lines == [r"| gpu \| x | mode |", "|---|---|", r"| H100 \| y | `m\|s` |"]


def test_no_script_writes_to_a_name_in_tmp_that_others_can_guess() -> None:
    # Where CUDA itself looks for a daemon, and a parent of a folder with a random name.
    known = {"((${#folder} < 70)) || folder=/tmp"}
    lines = {
        line.strip()
        for path in SCRIPT_SOURCES
        for line in path.read_text().splitlines()
        if re.search(r"/tmp\b|TMPDIR", line) and not line.strip().startswith("#")
    }
    assert lines == known
    programs = [*PROJECT_ROOT.glob("benchmarking/**/*.py"), *PROJECT_ROOT.glob("workloads/**/*.py")]
    guessed = [
        str(path) for path in programs
        if re.search(r"gettempdir|mktemp\(|[\"']/tmp/(?!nvidia-mps\")", path.read_text())
    ]  # fmt: skip
    assert guessed == []
