"""The plan: mixes in the guide's order, job sizes, names, each client's index, and its record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarking.planning import plan
from benchmarking.planning.plan import Plan
from benchmarking.planning.request import Request
from benchmarking.planning.workloads import SIZE_GUIDE, WORKLOADS

ROOT = str(Path(__file__).resolve().parents[1])


def clients(mix: str, count: int, **options: object) -> tuple[plan.PlannedClient, ...]:
    size = str(options.pop("size", SIZE_GUIDE))
    return plan.clients_of(Request(mix=mix, **options), count, size)


def build(
    mode: str, mix: str = "mixed", counts: tuple[int, ...] = (4,), repeats: int = 1, **more: object
) -> Plan:
    request = Request(mode=mode, mix=mix, counts=counts, repeats=repeats, **more)
    return plan.build_plan(request, mode, SIZE_GUIDE, has_own_shares=mode == "mig")


def test_the_rate_that_a_service_bears_alone_is_fixed_for_its_co_runs() -> None:
    assert plan.carried_arguments({"request_rate": 12.5, "qps": 13.0}) == ["--rate", "12.5"]
    service, *trainings = clients("serving", 4, slo_ms=50.0)
    assert service.command[-2:] == ("--slo-ms", "50")
    assert "--slo-ms" not in service.job_key
    assert {client.workload for client in trainings} == {"resnet_training"}


def test_the_mixed_mix_is_the_guides_four_in_order_repeated() -> None:
    four = ["resnet_training", "batch_inference", "jupyter_simulation", "bert_training"]
    assert [client.workload for client in clients("mixed", 8)] == four * 2
    assert [client.client for client in clients("mixed", 8)] == list(range(8))


@pytest.mark.parametrize(
    ("mix", "workload"),
    [("training", "resnet_training"), ("inference", "batch_inference"),
     ("interactive", "jupyter_simulation")],
)  # fmt: skip
def test_the_other_mixes_are_copies_of_one_workload(mix: str, workload: str) -> None:
    members = clients(mix, 4)
    assert {client.workload for client in members} == {workload}
    assert len({client.job_key for client in members}) == 1


def test_the_guides_sizes_are_spelled_out_in_the_command() -> None:
    commands = [" ".join(client.command) for client in clients("mixed", 4)]
    assert "--batch-size 128 --epochs 5" in commands[0]
    assert "--model resnet50 --batch-size 32 --num-batches 100" in commands[1]
    assert "--num-operations 11" in commands[2]
    assert "--batch-size 16 --epochs 3 --num-samples 1000" in commands[3]
    assert all("--seed 42" in command for command in commands)


def test_every_workload_has_a_script_name_and_every_size() -> None:
    for kind in WORKLOADS.values():
        assert set(kind.arguments) == {"guide", "quick", "cpu"}
        assert kind.script.startswith("workloads/")


def test_unset_options_leave_the_workloads_defaults() -> None:
    command = clients("training", 1)[0].command
    assert "--engine" not in command
    assert "--precision" not in command
    assert "--dataset" not in command


def test_engine_and_precision_reach_every_client_but_the_data_only_the_image_training() -> None:
    members = clients("mixed", 4, engine="eager", precision="fp32", data_dir="/data",
                      dataset="folder")  # fmt: skip
    assert all("--engine eager --precision fp32" in " ".join(client.command) for client in members)
    assert [("--data-dir" in client.command) for client in members] == [True, False, False, False]


def test_the_job_key_names_the_work_and_not_how_it_runs() -> None:
    assert clients("training", 1, engine="eager")[0].job_key == clients("training", 1)[0].job_key
    assert clients("training", 1, size="quick")[0].job_key != clients("training", 1)[0].job_key
    assert clients("training", 1, seed=1)[0].job_key != clients("training", 1)[0].job_key


def test_each_distinct_job_has_one_baseline() -> None:
    layout = build("time-slicing", counts=(8,))
    assert [run.co_run for run in layout.baseline] == [
        "baseline-resnet_training", "baseline-batch_inference", "baseline-jupyter_simulation",
        "baseline-bert_training",
    ]  # fmt: skip
    assert {run.mode for run in layout.baseline} == {"exclusive"}
    assert len(build("mps", "training", (4,)).baseline) == 1


def test_counts_and_repeats_make_one_co_run_each() -> None:
    layout = build("mps", "training", (1, 2), repeats=2)
    assert [run.co_run for run in layout.co_runs] == [
        "training-1-r0", "training-1-r1", "training-2-r0", "training-2-r1"]  # fmt: skip
    assert [len(run.clients) for run in layout.co_runs] == [1, 1, 2, 2]


def test_exclusive_mode_has_baselines_only() -> None:
    layout = build("exclusive")
    assert layout.co_runs == ()
    assert len(layout.baseline) == 4


def test_under_mig_each_job_also_runs_alone_on_the_share_of_its_first_client() -> None:
    layout = build("mig", counts=(8,))
    assert [run.phase for run in layout.baseline] == ["share_baseline"] * 4
    assert [run.mode for run in layout.baseline] == ["mig"] * 4
    assert [run.clients[0].client for run in layout.baseline] == [0, 1, 2, 3]


def test_two_jobs_of_one_workload_get_different_baseline_names() -> None:
    members = [clients("training", 1)[0], clients("training", 1, size="quick")[0]]
    names = [run.co_run for run in plan.baselines_of(members, "baseline", "mps")]
    assert names == ["baseline-resnet_training", "baseline-resnet_training-2"]


@pytest.mark.parametrize("mode", ["time-slicing", "mps", "mig"])
def test_the_saved_plan_shows_each_clients_index_and_0_for_every_job_alone(mode: str) -> None:
    layout = build(mode, counts=(2, 8), repeats=2)
    saved = json.loads(json.dumps(layout.to_dict()))
    assert [row["command"][-2:] for row in saved["baseline"]] == [["--client-index", "0"]] * len(
        layout.baseline
    )
    for planned, run in zip(layout.co_runs, saved["co_runs"], strict=True):
        indices = [client["command"][-2:] for client in run["clients"]]
        assert indices == [["--client-index", str(i)] for i in range(len(planned.clients))]
        assert not any("--client-index" in client["job_key"] for client in run["clients"])
        assert [client["job_key"] for client in run["clients"][:4]] == list(layout.jobs())[
            : len(run["clients"])
        ]


def test_the_saved_plan_has_the_documented_shape() -> None:
    saved = build("mps").to_dict()
    assert {"client", "workload", "label", "command", "environment", "job_key", "co_run"} <= set(
        saved["baseline"][0]
    )
    assert {"co_run", "clients"} <= set(saved["co_runs"][0])
    assert {"client", "workload", "label", "command", "environment"} <= set(
        saved["co_runs"][0]["clients"][0]
    )


def test_added_arguments_do_not_change_which_job_it_is() -> None:
    client = clients("interactive", 1)[0]
    changed = client.with_arguments(plan.carried_arguments({"cell_repeats": "3,4,5,6"}))
    assert changed.command[-2:] == ("--cell-repeats", "3,4,5,6")
    assert changed.job_key == client.job_key


def test_what_has_been_run_is_not_changed_any_more() -> None:
    layout = build("mps", "training", (1,))
    changed = layout.map_clients(
        lambda client: client.with_arguments(["--x"]), skip={"baseline-resnet_training"}
    )
    assert changed.baseline == layout.baseline
    assert changed.co_runs[0].clients[0].command[-1] == "--x"


def test_figures_that_are_not_carried_add_nothing() -> None:
    assert plan.carried_arguments({"accuracy": 0.5}) == []
    assert plan.carried_arguments(None) == []


@pytest.mark.parametrize(("cores", "count", "threads"), [(2, 4, 1), (16, 4, 4), (16, 3, 5)])
def test_clients_share_the_cores_fairly(cores: int, count: int, threads: int) -> None:
    environment = plan.shared_host_environment(cores, count)
    assert environment["OMP_NUM_THREADS"] == str(threads)
