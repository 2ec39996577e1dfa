"""The fleet on a Ray cluster of two pretended hosts, with 2 and 4 pretended cards.

Ray, the units and their watchers are real; run_experiments.sh, the health check and gpu_status.sh
are pretended (`fakes/pretended_fleet.py`), and the cards are NVML's stub's.
"""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nvml_stub
import pytest
import yaml
from conftest import PROJECT_ROOT
from program_copy import copy_programs, processes_of
from waiting import wait_until

from benchmarking import fleet as fleet_program
from benchmarking.cli import SuiteError
from benchmarking.fleet import parse_arguments, unpack
from benchmarking.measuring import locks
from benchmarking.measuring.stop_signal import StopSignal

FAKES = PROJECT_ROOT / "tests" / "fakes"
RECORDED = PROJECT_ROOT / "examples" / "h200-mixed-4" / "comparison.json"
REPLACED = (
    "run_experiments.sh", "benchmarking/hardware/card_health.py", "gpu-configs/gpu_status.sh",
)  # fmt: skip
CARDS = {"host-a": ["GPU-a0", "GPU-a1"], "host-b": ["GPU-b0", "GPU-b1", "GPU-b2", "GPU-b3"]}
ALL_CARDS = [uuid for uuids in CARDS.values() for uuid in uuids]
# `nvidia-smi -L` of the host whose cards NVML's stub has.
LIST_CARDS = r"""
tr , '\n' <"$NVML_STUB_STATE" |
    sed -n 's/.*"uuid_\([0-9]*\)": "\([^"]*\)".*/GPU \1: NVIDIA H100 (UUID: \2)/p'
"""
LIST_MIG = """
echo 'GPU 0: NVIDIA H100 (UUID: GPU-0)'
echo '  MIG 1g.10gb     Device  0: (UUID: MIG-1)'
"""
REFUSAL = "other processes are on the GPU: pid 4711 of somebody"


@dataclass
class Fleet:
    """The programs in a folder of their own, and how to run them on the pretended cards."""

    root: Path
    environment: dict[str, str]
    address: str = ""
    flags: list[str] = field(default_factory=lambda: ["--quick"])

    @property
    def state(self) -> Path:
        return Path(self.environment["FAKE_FLEET"])

    def rule(self, **rules: dict[str, Any]) -> None:
        """Say what the driver does, by card, as `b1={"wait": True}`; forget all earlier calls."""
        named = {f"GPU-{card}": rule for card, rule in rules.items()}
        (self.state / "rules.json").write_text(json.dumps(named))
        (self.state / "calls.jsonl").write_text("")

    def start(self, command: str, output: Path, *words: str, **popen: Any) -> subprocess.Popen[str]:
        """Start the program; `run` joins the cluster."""
        popen = {"env": self.environment, "stdin": subprocess.DEVNULL, **popen}
        address = popen.pop("address", self.address)
        joined = ["--address", address] if command == "run" else []
        return subprocess.Popen(
            [sys.executable, self.root / "benchmarking" / "fleet.py", command, *joined,
             "--output", output, *words, *([] if command == "report" else ["--", *self.flags])],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.root, **popen,
        )  # fmt: skip

    def run(self, command: str, output: Path, *words: str, **popen: Any) -> tuple[int, str]:
        """Run the program to its end; return its exit code and all that it said."""
        process = self.start(command, output, *words, **popen)
        said, _ = process.communicate(timeout=120)
        return process.returncode, said

    def calls(self, program: str) -> list[dict[str, Any]]:
        """Return the calls of a pretended program, oldest first."""
        rows = map(json.loads, (self.state / "calls.jsonl").read_text().splitlines())
        return [row for row in rows if row["program"] == program]

    def driven(self) -> list[str]:
        """Return the card of each start of the driver, in order."""
        return [
            card_of(call)
            for call in self.calls("run_experiments.sh")
            if "exit_code" not in call and "--dry-run" not in call["words"]
        ]

    def has_mode(self, uuid: str) -> bool:
        """Whether a driver has left its mode in force on a card."""
        return (self.state / f"mode-{uuid}").exists()


def card_of(call: dict[str, Any]) -> str:
    """The card that a call of the driver is about: what its folder is called."""
    words = call["words"]
    return Path(words[1] if words[0] == "--resume" else words[-1]).name


def cards_in(output: Path) -> dict[str, dict[str, Any]]:
    """The cards of the report, by UUID."""
    return {card["uuid"]: card for card in json.loads((output / "fleet.json").read_text())["cards"]}


def write_program(path: Path, text: str) -> None:
    """Write a shell script that can be run by its name."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The programs, and the cluster as long as this module's tests run."""
    root = tmp_path_factory.mktemp("fleet")
    copy_programs(root, FAKES / "pretended_fleet.py", REPLACED)
    state = root / "state"
    state.mkdir()
    shutil.copy(RECORDED, state)
    write_program(root / "bin" / "nvidia-smi", LIST_CARDS)
    temporary = tempfile.mkdtemp(prefix="ray-")  # short: Ray's sockets lie in it
    environment = {
        **nvml_stub.stub_environment(nvml_stub.build_nvml_stub(root), root / "no-card.txt"),
        "PATH": f"{root / 'bin'}:{os.environ['PATH']}", "HOME": str(root),
        "RAY_TMPDIR": temporary, "FAKE_FLEET": str(state),
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16),
    }  # fmt: skip
    hosts = []
    for host, uuids in CARDS.items():
        named = {f"uuid_{number}": uuid for number, uuid in enumerate(uuids)}
        card = nvml_stub.write_state(root / f"{host}.txt", count=len(uuids), **named)
        hosts.append(f"{host}={len(uuids)}={card}")
    cluster = subprocess.Popen(
        [sys.executable, FAKES / "pretended_cluster.py", *hosts], env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield Fleet(root, environment, cluster.stdout.readline().strip())
    cluster.communicate(timeout=60)
    assert cluster.returncode == 0
    shutil.rmtree(temporary)


def test_a_slow_card_is_flagged_a_killed_worker_resumed_and_a_refusal_a_row(
    fleet: Fleet, tmp_path: Path
) -> None:
    fleet.rule(a1={"slow": True}, b1={"wait": True}, b2={"refuse": REFUSAL})
    process = fleet.start("run", tmp_path)
    worker = None
    said = ""
    for line in process.stdout:
        said += line
        begun = re.match(r"host-b: a unit begins, in Ray's worker (\d+)", line)
        worker = int(begun[1]) if begun else worker
        if "GPU-b1: Phase 1" in line and "goes on" not in said:
            wait_until(lambda: fleet.has_mode("GPU-b1"), "a mode in force on GPU-b1")
            os.kill(worker, signal.SIGKILL)
    assert process.wait(timeout=60) == 1, said
    cards = cards_in(tmp_path)
    assert sorted(cards) == ALL_CARDS
    # slow on purpose: flagged, not averaged
    assert cards["GPU-a1"]["flags"] == ["copy rate 10.0 % under the median of its model"]
    assert [uuid for uuid, card in cards.items() if card["flags"]] == ["GPU-a1"]
    # killed: the driver was told to end, undid its mode, and went on in the same folder
    assert said.count("Ray: The actor died") == 1
    ends = [call["exit_code"] for call in fleet.calls("run_experiments.sh")
            if "exit_code" in call and card_of(call) == "GPU-b1"]  # fmt: skip
    assert ends == [143, 0]
    record = json.loads((tmp_path / "host-b" / "GPU-b1.json").read_text())
    assert (record["attempts"], record["exit_code"]) == (2, 0)
    assert not fleet.has_mode("GPU-b1")
    # refused: a row, not a retry
    assert f"GPU-b2: ended with 4: {REFUSAL}" in said
    assert (cards["GPU-b2"]["outcome"], cards["GPU-b2"]["reason"]) == ("refused", REFUSAL)
    assert fleet.driven().count("GPU-b2") == 1
    (kind,) = json.loads((tmp_path / "fleet.json").read_text())["models"]
    assert (kind["cards"], kind["averaged"], kind["decision"], kind["agreeing"]) == (6, 4, "mps", 4)
    recorded = json.loads(RECORDED.read_text())["sections"][0]["groups"]
    (mps,) = (group for group in recorded if (group["variant"], group["clients"]) == ("mps", 4))
    assert kind["modes"]["mps"]["work_delivered"] == pytest.approx(mps["stp"]["mean"])
    assert list(kind["outliers"]) == ["host-a GPU-a1"]
    assert kind["outliers"]["host-a GPU-a1"][1:] == [
        f"delivers 10.0 % less under {mode}" for mode in ("time-slicing", "mps", "mps:even")
    ]
    report = (tmp_path / "fleet.md").read_text()
    assert "**mps delivers most**; 4 of 4 cards agree." in report
    assert f"| host-b | GPU-b2 | refused: {REFUSAL} |" in report
    # one card of a host at a time, and nothing is left
    calls = [call for call in fleet.calls("run_experiments.sh") if "--dry-run" not in call["words"]]
    for host, uuids in CARDS.items():
        turns = [card_of(call) for call in calls if card_of(call) in uuids]
        assert turns[::2] == turns[1::2], host
    for call in fleet.calls("gpu_status.sh"):
        assert call["words"][0] == "--restore"
    assert processes_of(fleet.root / "benchmarking") == []

    # The same command repeats what was refused, and that alone; Ctrl-C ends it politely.
    fleet.rule(b2={"wait": True})
    process = fleet.start("run", tmp_path)
    wait_until(lambda: fleet.has_mode("GPU-b2"), "a mode in force on GPU-b2")
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, fleet.driven()) == (130, ["GPU-b2"]), said
    # Ray gives the cards of a host in any order, so others may not have had their turn.
    assert "GPU-b2: ended with 143" in said
    assert "the same command goes on" in said
    assert cards_in(tmp_path)["GPU-b2"]["outcome"] == "interrupted"
    assert not fleet.has_mode("GPU-b2")


def test_a_fleet_that_is_killed_leaves_no_mode(fleet: Fleet, tmp_path: Path) -> None:
    # Ray gives the cards of a host in any order, so each of them waits.
    waiting = {card.removeprefix("GPU-"): {"wait": True} for card in CARDS["host-b"]}
    fleet.rule(**waiting, a0={"refuse": REFUSAL})
    process = fleet.start("run", tmp_path)
    line = next(line for line in process.stdout if "Phase 1" in line and "GPU-b" in line)
    uuid = re.search(r"GPU-b\d", line)[0]
    wait_until(lambda: fleet.has_mode(uuid), f"a mode in force on {uuid}")
    process.kill()
    process.communicate()
    wait_until(lambda: not fleet.has_mode(uuid), "the end of the mode")
    wait_until(lambda: processes_of(fleet.root / "benchmarking") == [], "the end of the units")
    assert json.loads((tmp_path / "host-b" / f"{uuid}.json").read_text())["exit_code"] == 143


def test_all_cards_at_once_write_on_their_hosts_and_come_back_as_an_archive(
    fleet: Fleet, tmp_path: Path
) -> None:
    fleet.rule(b0={"meet": 2}, b1={"meet": 2}, b3={"refuse": REFUSAL})
    locked = {**fleet.environment, "GPU_SETTINGS_LOCKED": "1"}  # here, and so on the hosts
    code, said = fleet.run(
        "run", tmp_path / "here", "--all-cards", "--archive", tmp_path / "there", env=locked
    )
    assert code == 1, said
    assert not any("--restore" in call["words"] for call in fleet.calls("gpu_status.sh"))
    assert cards_in(tmp_path / "here")["GPU-b3"]["reason"] == REFUSAL
    for name in ("GPU-b0.json", "GPU-b0.log", "GPU-b0/comparison.json"):
        there, here = (tmp_path / one / "host-b" / name for one in ("there", "here"))
        assert there.read_bytes() == here.read_bytes()
    assert [card["outcome"] for card in cards_in(tmp_path / "here").values()].count("measured") == 5


def test_an_archive_writes_nothing_outside_of_the_fleets_folder(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name in ("host/GPU-1.json", "../outside.json", str(tmp_path / "absolute.json")):
            member = tarfile.TarInfo(name)
            member.size, member.mode = 2, 0o600
            archive.addfile(member, io.BytesIO(b"{}"))
        link = tarfile.TarInfo("host/link")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(link)
    unpack(packed.getvalue(), tmp_path / "fleet")
    (written,) = tmp_path.rglob("*.json")
    assert (written.name, written.stat().st_mode & 0o777) == ("GPU-1.json", 0o600)
    assert not (tmp_path / "fleet" / "host" / "link").is_symlink()


def test_a_unit_by_itself_needs_no_ray_and_only_looks_where_the_card_is_locked(
    fleet: Fleet, tmp_path: Path
) -> None:
    fleet.rule()
    environment = {
        **fleet.environment, "NVML_STUB_STATE": str(fleet.root / "host-b.txt"),
        "CUDA_VISIBLE_DEVICES": "2", "GPU_SETTINGS_LOCKED": "1", **without_ray(fleet, tmp_path),
    }  # fmt: skip
    output = tmp_path / "fleet"
    code, said = fleet.run("unit", output, "--host", "node 1", env=environment)
    assert code == 0, said
    assert [call["words"] for call in fleet.calls("gpu_status.sh")] == [["--gpu", "GPU-b2"]]
    assert fleet.driven() == ["GPU-b2"]
    code, said = fleet.run("report", output, env=environment)
    assert (code, list(cards_in(output))) == (0, ["GPU-b2"])
    assert "| node-1 | GPU-b2 | measured | mps |" in said
    fleet.flags = ["--quick", "--repeats", "5"]
    code, said = fleet.run("unit", output, "--host", "node 1", env=environment)
    fleet.flags = ["--quick"]
    assert code == 2
    assert "is of another plan" in said


def test_the_driver_of_a_unit_that_was_killed_is_waited_for(fleet: Fleet, tmp_path: Path) -> None:
    fleet.rule(a1={"wait": True})
    environment = {**fleet.environment, "NVML_STUB_STATE": str(fleet.root / "host-a.txt")}
    fleet.flags = ["--job", "sleep 1 --token hunter2-hunter2"]
    first = fleet.start("unit", tmp_path, "--gpu", "1", env=environment)
    wait_until(lambda: fleet.has_mode("GPU-a1"), "a mode in force")
    first.kill()
    first.communicate()
    second = fleet.start("unit", tmp_path, "--gpu", "GPU-a1", env=environment)
    fleet.flags = ["--quick"]
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(timeout=2)
    os.kill(int((fleet.state / "mode-GPU-a1").read_text()), signal.SIGTERM)
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 0, said
    assert "goes on where it was cut off" in said
    begun = [call for call in fleet.calls("run_experiments.sh") if "exit_code" not in call]
    # the driver keeps no secret of the flags, so going on needs it in the environment
    assert [call["token"] for call in begun] == [None, "hunter2-hunter2"]


def test_a_unit_leaves_a_card_alone_that_another_run_is_at_work_on(
    fleet: Fleet, tmp_path: Path
) -> None:
    fleet.rule()
    environment = {**fleet.environment, "NVML_STUB_STATE": str(fleet.root / "host-a.txt")}
    with locks.hold("GPU-a1"):
        code, said = fleet.run("unit", tmp_path, "--gpu", "1", env=environment)
    assert code == 4, said
    assert f"another run is at work on GPU GPU-a1: pid {os.getpid()}" in said
    programs = ("gpu_status.sh", "card_health.py", "run_experiments.sh")
    assert [fleet.calls(program) for program in programs] == [[], [], []]
    code, said = fleet.run("unit", tmp_path, "--gpu", "1", env=environment)
    assert code == 0, said


def test_the_slurm_script_measures_each_card_of_its_node(fleet: Fleet, tmp_path: Path) -> None:
    fleet.rule(a0={"refuse": REFUSAL})
    write_program(tmp_path / "srun", 'shift\nexec "$@"')
    environment = {
        **fleet.environment, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:"
        f"{fleet.environment['PATH']}", "NVML_STUB_STATE": str(fleet.root / "host-a.txt"),
        "SLURM_SUBMIT_DIR": str(fleet.root),
    }  # fmt: skip
    output = tmp_path / "fleet"
    done = subprocess.run(
        [PROJECT_ROOT / "examples" / "fleet" / "slurm-array.sh", output, "--quick"],
        env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, fleet.driven()) == (4, CARDS["host-a"]), done.stderr
    fleet.run("report", output)
    outcomes = {uuid: card["outcome"] for uuid, card in cards_in(output).items()}
    assert outcomes == {"GPU-a0": "refused", "GPU-a1": "measured"}


def test_the_jobs_of_kubernetes_show_the_hosts_pids_and_call_a_command_that_there_is() -> None:
    folder = PROJECT_ROOT / "examples" / "fleet"
    job = yaml.safe_load((folder / "kubernetes-job.yaml").read_text())
    ray_job = yaml.safe_load((folder / "kuberay-job.yaml").read_text())["spec"]
    (workers,) = ray_job["rayClusterSpec"]["workerGroupSpecs"]
    for pod in (job["spec"]["template"]["spec"], workers["template"]["spec"]):
        assert pod["hostPID"] is True
        assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8}
    (unit,) = job["spec"]["template"]["spec"]["containers"]
    for words in ([*unit["command"], *unit["args"]], ray_job["entrypoint"].split()):
        sys_argv = ["fleet.py", *words[2:]]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", sys_argv)
            options = parse_arguments()
        assert (options.output, options.flags) == (Path("/fleet"), ["--quick"])


def without_ray(fleet: Fleet, folder: Path) -> dict[str, str]:
    """What hides Ray from a program."""
    (folder / "ray.py").write_text("raise ImportError('No module named ray')\n")
    return {"PYTHONPATH": f"{folder}:{fleet.environment['PYTHONPATH']}"}


def test_what_cannot_be_done_is_said_in_a_sentence(fleet: Fleet, tmp_path: Path) -> None:
    fleet.rule()
    output = tmp_path / "fleet"
    hidden = {**fleet.environment, **without_ray(fleet, tmp_path)}
    write_program(tmp_path / "mig" / "nvidia-smi", LIST_MIG)
    mig = {**fleet.environment, "PATH": f"{tmp_path / 'mig'}:{os.environ['PATH']}",
           "CUDA_VISIBLE_DEVICES": "MIG-1"}  # fmt: skip
    stranger = {**fleet.environment, "RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)}
    refused = [
        (1, "pip install -r requirements-fleet.txt", fleet.run("run", output, env=hidden)),
        (1, "cannot join Ray at", fleet.run("run", output, env=stranger)),
        (2, "holds no unit of a fleet", fleet.run("report", output)),
        (2, "MIG-1 is a MIG instance", fleet.run("unit", output, env=mig)),
        (3, "nvidia-smi lists no GPU here: install the NVIDIA driver", fleet.run("unit", output)),
    ]
    for flags, complaint in ((["--gpu=1"], "--gpu behind -- is the fleet's own"),
                             (["--nonsense"], "unknown option: --nonsense")):  # fmt: skip
        fleet.flags = flags
        refused.append((2, complaint, fleet.run("run", output)))
    fleet.flags = ["--quick"]
    for code, complaint, (status, said) in refused:
        assert (status, complaint in said) == (code, True), said
        assert "Traceback" not in said


def test_a_cluster_without_a_gpu_is_code_3() -> None:
    node = {"Alive": True, "NodeID": "1", "NodeManagerHostname": "host", "Resources": {"CPU": 1.0}}
    ray = SimpleNamespace(nodes=lambda: [node])
    with pytest.raises(SuiteError, match="Ray knows of no GPU: look at nvidia-smi") as refused:
        fleet_program.Fleet(ray, SimpleNamespace(), Path("mark"), StopSignal())
    assert refused.value.exit_code == 3


# As much of NVML as Ray itself calls, which has a pynvml of its own.
NVML_OF_RAY = """
int nvmlInitWithFlags(unsigned flags) { return flags != 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **gpu) { *gpu = 0; return index > 1; }
int nvmlDeviceGetName(void *gpu, char *name, unsigned size) { *name = 0; return 0; }
"""


def test_ray_on_this_host_finds_its_cards_and_has_a_token_of_its_user_alone(
    fleet: Fleet, tmp_path: Path
) -> None:
    fleet.rule()
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc, for an NVML that Ray's own pynvml loads")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", tmp_path / "libnvidia-ml.so.1"],
        input=NVML_OF_RAY, text=True, check=True,
    )  # fmt: skip
    joining = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    environment = {name: v for name, v in fleet.environment.items() if name not in joining}
    environment |= {
        "HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0", "LD_LIBRARY_PATH": str(tmp_path),
        "NVML_STUB_STATE": str(fleet.root / "host-a.txt"),
    }  # fmt: skip
    status, said = fleet.run("run", tmp_path, env=environment, address="local")
    assert (status, "**mps delivers most**; 1 of 1 card agrees" in said) == (0, True), said
    token = tmp_path / ".ray" / "auth_token"
    assert token.exists()
    assert token.parent.stat().st_mode & 0o77 == 0
