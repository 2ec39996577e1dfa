"""The suite with a plan of one's own jobs, with pairs, and its search for the breaking point.

Real processes; the script that runs commands is the real one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT_ROOT
from suite_bench import Bench, names, outcomes, statuses, verdicts, window_seconds

from benchmarking.suite.session import run_suite

EXAMPLE = PROJECT_ROOT / "examples" / "plans" / "own-commands.toml"
GPU_COMMAND = PROJECT_ROOT / "tests" / "fakes" / "gpu_command.py"
SECRET = "hunter2-hunter2"


def plan_of(bench: Bench, text: str = "") -> str:
    """Write a plan file, and bring the script that runs commands to the copied suite."""
    for folder in ("common", "custom"):
        target = bench.root / "workloads" / folder
        shutil.copytree(PROJECT_ROOT / "workloads" / folder, target, dirs_exist_ok=True)
    path = bench.root / "own.toml"
    path.write_text(text)
    return str(path)


def gpu_command(*words: str) -> str:
    """The table of a client with a process on the card."""
    return f"[[client]]\ncommand = {json.dumps([sys.executable, str(GPU_COMMAND), *words])}\n"


# --- one's own jobs -----------------------------------------------------------------------------


def test_rounds_of_one_run_are_of_one_plan(bench: Bench) -> None:
    token = f'environment = {{ HF_TOKEN = "{SECRET}" }}'
    before = f'[[client]]\ncommand = "sleep 0.1"\n{token}\n'
    plan = plan_of(bench, before)
    flags = ("--plan", plan, "--run-id", "mine", "--repeats", "2", "--round")
    bench.must(*flags, "1")
    plan_of(bench, before.replace("0.1", "0.2"))
    changed = bench.run(*flags, "2")
    assert changed.returncode == 2
    assert f"{plan} was changed since run mine was begun with it" in changed.stderr
    plan_of(bench, f"# as it was\n{before}")
    assert names(bench.must(*flags, "2")) == ["baseline-command", "own-1-r0", "own-1-r1"]


def test_the_example_plan_runs_alone_and_together_and_is_kept_with_the_run(bench: Bench) -> None:
    plan_of(bench)
    run = bench.must("--plan", str(EXAMPLE))
    assert names(run) == [
        "baseline-batch_inference", "baseline-command", "baseline-command-2", "own-commands-4-r0",
    ]  # fmt: skip
    records = run.clients_of("own-commands-4-r0")
    assert [record["label"] for record in records] == [
        "Batch inference", "hashing", "hashing", "a shell line"]  # fmt: skip
    assert statuses(run, "own-commands-4-r0") == ["ok"] * 4
    for record in records[1:]:
        assert record["units"]["command"]["count"] > 0.9  # one, to what the window's edge cuts
        assert record["slowdown"] > 0
    assert [bool(record["latency_ms"]) for record in records] == [False, False, False, True]
    assert (run.folder / "plan.toml").read_text() == EXAMPLE.read_text()
    assert run.manifest["mix"] == "own-commands"
    assert run.manifest["plan_file"]["path"] == str(EXAMPLE)
    assert run.manifest["plan_file"]["sha256"] == hashlib.sha256(EXAMPLE.read_bytes()).hexdigest()


def test_jobs_without_a_file_run_and_are_kept_as_a_plan_without_their_secrets(
    bench: Bench,
) -> None:
    plan_of(bench)
    done = bench.run(
        "--job", "sleep 0.1", "--job", f"env PASSWORD={SECRET} sleep 0.1", "--workloads", "4"
    )
    assert done.returncode == 0, done.stderr
    run = bench.only_run()
    assert names(run) == ["baseline-command", "baseline-command-2", "sleep-env-4-r0"]
    members = run.clients_of("sleep-env-4-r0")
    assert [record["label"] for record in members] == ["sleep", "env"] * 2
    assert len({record["job_key"] for record in members}) == 2
    assert all(record["slowdown"] > 0 for record in members)
    files = [path.read_text() for path in run.folder.rglob("*") if path.is_file()]
    assert not any(SECRET in text for text in (*files, done.stdout, done.stderr))
    assert "hidden:PASSWORD:" in (run.folder / "plan.toml").read_text()


def test_a_secret_that_a_job_complains_of_is_in_no_note(bench: Bench) -> None:
    done = bench.run("--plan", plan_of(bench, f"""
[[client]]
command = "echo no $HF_TOKEN >&2; exit 3"
shell = true
environment = {{ HF_TOKEN = "{SECRET}" }}
"""))  # fmt: skip
    assert done.returncode == 1
    folder = bench.only_run().folder
    kept = [path.read_text() for path in folder.glob("*.json*")]
    assert any("no hidden:HF_TOKEN:" in text for text in kept)
    assert not any(SECRET in text for text in (*kept, done.stdout, done.stderr))


def test_a_secret_that_a_job_refuses_is_not_in_what_a_driver_is_told(tmp_path: Path) -> None:
    plan = tmp_path / "own.toml"
    plan.write_text(f"""
[[client]]
workload = "resnet_training"
arguments = ["--api-key={SECRET}"]
""")
    where = ["--device", "cpu", "--results-dir", str(tmp_path / "results")]
    end = run_suite(["--plan", str(plan), *where], from_driver=True)
    assert end.exit_code == 2
    assert "unrecognized arguments: --api-key=hidden:API_KEY:" in str(end.reason)


def test_jobs_in_other_environments_find_data_of_their_own(bench: Bench) -> None:
    scripts = [json.dumps([{"match": "*", "resolve_arguments": ["--model", n]}]) for n in "12"]
    tables = "".join(
        f"[[client]]\nworkload = 'bert_training'\nenvironment.SCRIPTED_CLIENT = '{script}'\n"
        for script in scripts
    )
    run = bench.must("--plan", plan_of(bench, tables))
    clients = run.manifest["plan"]["co_runs"][0]["clients"]
    assert [client["command"][-3] for client in clients] == ["1", "2"]


def test_a_label_is_shown_as_it_is_on_a_terminal(bench: Bench) -> None:
    labels = ("lr [0.1] [/b]", "batch [size=8]", "a :100: b")
    tables = (f'[[client]]\nworkload = "batch_inference"\nlabel = "{one}"\n' for one in labels)
    plan = plan_of(bench, "".join(tables))
    reading, terminal = pty.openpty()
    process = subprocess.Popen(
        bench.command("--plan", plan), stdout=terminal, stderr=terminal,
        env={**bench.environment, "COLUMNS": "200"},
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while chunk := os.read(reading, 65536):
            shown += chunk
    os.close(reading)
    assert process.wait(60) == 0, shown.decode()
    lines = [line for line in shown.decode().splitlines() if "│" in line]
    for label in labels:
        assert sum(f"│ {label} " in line for line in lines) == 1
    assert f"baseline 1/1: {labels[0]} alone: " in shown.decode()


def test_what_a_command_says_before_it_fails_steers_no_terminal(bench: Bench) -> None:
    plan_of(bench)
    # At the end CSI as one letter, then right to left.
    said = r"printf '\033]0;owned\007\033[31mboom\302\2332J\342\200\256moob\n' >&2; exit 1"
    done = bench.run("--job", f'sh -c "{said}"')
    assert done.returncode == 1
    assert "exit code 1:  ]0;owned  [31mboom 2J moob" in done.stdout
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & {*done.stdout, *done.stderr}


def test_no_complaint_about_a_plan_holds_a_secret_since_drivers_record_it(
    bench: Bench, tmp_path: Path
) -> None:
    secret = "hunter2-hunter2"
    plan = tmp_path / "own.toml"
    plan.write_text(f'[[client]]\nworkload = "llm_inference"\narguments = "--token {secret}"\n')
    for jobs in (("--job", f"HF_TOKEN={secret} python train.py"), ("--plan", str(plan))):
        done = bench.run(*jobs)
        assert done.returncode == 2
        assert "TOKEN" in done.stderr and "hidden:" in done.stderr
        assert secret not in done.stderr


def test_a_plan_with_mistakes_is_code_2_with_a_sentence_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "own.toml"
    plan.write_text('[[client]]\nworkload = "bert"\ncount = 0\n')
    assert run_suite(["--plan", str(plan)], from_driver=True).exit_code == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("benchmark_suite.py: error: /") for line in lines] == [True, True]


def test_a_grandchild_on_the_card_proves_a_command_and_one_that_is_never_listed_does_not(
    card_bench: Bench,
) -> None:
    # Long enough for a list of processes, however late a busy machine makes it.
    line = f"{sys.executable} {GPU_COMMAND} 1.0 & wait"
    shell = f'[[client]]\ncommand = "{line}"\nshell = true\n'
    plan = plan_of(card_bench, f"{shell}{gpu_command('1.0', 'hidden')}")
    run = card_bench.must("--plan", plan)
    assert verdicts(run, "baseline") == verdicts(run) == ["verified", "unverified"]
    evidence = run.clients_of("own-2-r0")[1]["proof"]["evidence"]
    assert any("processes is listed" in item["found"] for item in evidence)


def test_a_command_under_mps_is_proved_by_its_own_process_and_invalid_past_the_daemon(
    card_bench: Bench,
) -> None:
    card_bench.start_daemon()
    plan = plan_of(card_bench, f"{gpu_command('1.0')}{gpu_command('1.0', 'without_mps')}")
    run = card_bench.must("--mode", "mps", "--plan", plan, code=5)
    assert verdicts(run, "baseline") == ["verified", "verified"]
    assert verdicts(run) == ["verified", "invalid"]
    assert statuses(run, "own-2-r0") == ["ok", "invalid"]


# --- pairs ----------------------------------------------------------------------------------------


def test_each_job_runs_beside_each_other_one_and_itself_and_one_pair_may_fail(
    bench: Bench,
) -> None:
    failing = "pairs-resnet_training-batch_inference-r0"
    bench.script({"match": f"*:{failing}/1", "fail": "crash", "fail_at": 0.1})
    run = bench.must("--mix", "pairs", "--window", "0.3", code=1)
    assert names(run)[2:] == [
        "pairs-resnet_training-resnet_training-r0", failing,
        "pairs-batch_inference-batch_inference-r0",
    ]  # fmt: skip
    assert outcomes(run)[2:] == ["ok", "failed", "ok"]
    assert run.manifest["is_pairs"] is True
    for record in (run.co_run_records[2], run.co_run_records[4]):
        assert all(one["slowdown"] for one in run.clients_of(record["co_run"]))
        assert 0.3 <= window_seconds(record) < 3  # as asked for


def test_pairs_and_antagonists_are_planned_with_small_jobs(
    card_bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    def pairs_in(plan: str) -> list[str]:
        return re.findall(r"^  ((?:pairs|noisy)-\S+): 2 together", plan, re.MULTILINE)

    pairs = card_bench.run("--mix", "pairs", "--dry-run").stdout
    assert "--num-operations 8 --burst-seconds 0.4" in pairs
    assert "--num-operations 11" not in pairs
    assert len(pairs_in(pairs)) == 10

    noisy = card_bench.run("--mix", "noisy", "--dry-run", "--duty-steps").stdout
    jobs = ("resnet_training", "batch_inference", "jupyter_simulation", "bert_training",
            "llm_inference")  # fmt: skip
    steps = [f"noisy-llm_inference-hbm-{percent}-r0" for percent in (25, 50, 75)]
    kinds = ("hbm", "sm", "pcie")
    assert pairs_in(noisy) == [f"noisy-{job}-{kind}-r0" for job in jobs for kind in kinds] + steps
    # Each alone as well, an antagonist for each kind and duty.
    assert len(re.findall(r"^  baseline-\S+: ", noisy, re.MULTILINE)) == 5 + 3 + 3

    run_suite(["--mix", "noisy", "--dry-run", "--device", "cpu"], from_driver=True)
    assert pairs_in(capsys.readouterr().out) == [
        f"noisy-{job}-{kind}-r0" for job in jobs[:2] for kind in ("hbm", "sm")
    ]


# --- the breaking point -----------------------------------------------------------------------


def test_a_bound_that_is_passed_ends_the_ramp_as_a_result(bench: Bench) -> None:
    bench.script(
        {"match": "*", "latency": True},
        {"match": "*:inference-4-r0/*", "unit_seconds": 0.2},
    )
    run = bench.must(
        "--mix", "inference", "--workloads", "1,2,4,6", "--slo-ms", "150", "--until-break"
    )
    assert names(run)[1:] == ["inference-1-r0", "inference-2-r0", "inference-4-r0"]
    kinds = [(record["stop_reason"] or {}).get("kind") for record in run.co_run_records]
    assert kinds == [None, None, None, "p99"]
    assert run.manifest["outcome"] == "complete"
    assert run.manifest["bounds"] == {"max_slowdown": None, "max_p99_ms": 150.0}
