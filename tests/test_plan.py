"""The plan: mixes in the guide's order, job sizes, and what names a job."""

from __future__ import annotations

import pytest

from benchmarking.planning import plan
from benchmarking.planning.request import Request
from benchmarking.planning.workloads import SIZE_GUIDE, WORKLOADS

FOUR = ["resnet_training", "batch_inference", "jupyter_simulation", "bert_training"]


def clients(mix: str, count: int = 1, **options: object) -> tuple[plan.PlannedClient, ...]:
    size = str(options.pop("size", SIZE_GUIDE))
    return plan.clients_of(Request(mix=mix, **options), count, size)


def test_mixes_are_the_guides_four_repeated_copies_of_one_or_a_service_with_trainings() -> None:
    mixed = clients("mixed", 8)
    assert [client.workload for client in mixed] == FOUR * 2
    assert [client.client for client in mixed] == list(range(8))
    for mix, workload in (("training", FOUR[0]), ("inference", FOUR[1]), ("interactive", FOUR[2])):
        members = clients(mix, 4)
        assert {client.workload for client in members} == {workload}
        assert len({client.job_key for client in members}) == 1
    service, *trainings = clients("serving", 4, slo_ms=50.0)
    assert service.command[-2:] == ("--slo-ms", "50")
    assert "--slo-ms" not in service.job_key
    assert {client.workload for client in trainings} == {"resnet_training"}


def test_the_guides_sizes_are_spelled_out_and_what_is_unset_is_left_to_the_workload() -> None:
    commands = [" ".join(client.command) for client in clients("mixed", 4)]
    assert "--batch-size 128 --epochs 5" in commands[0]
    assert "--model resnet50 --batch-size 32 --num-batches 100" in commands[1]
    assert "--num-operations 11" in commands[2]
    assert "--batch-size 16 --epochs 3 --num-samples 1000" in commands[3]
    assert all("--seed 42" in command for command in commands)
    assert not any(flag in commands[0] for flag in ("--engine", "--precision", "--dataset"))
    assert {tuple(kind.arguments) for kind in WORKLOADS.values()} == {("guide", "quick", "cpu")}


def test_engine_and_precision_reach_every_client_but_the_data_only_the_image_training() -> None:
    members = clients("mixed", 4, engine="eager", precision="fp32", data_dir="/data",
                      dataset="folder")  # fmt: skip
    assert all("--engine eager --precision fp32" in " ".join(client.command) for client in members)
    assert ["--data-dir" in client.command for client in members] == [True, False, False, False]


def test_the_job_key_names_the_work_and_not_how_it_runs() -> None:
    (client,) = clients("training")
    assert clients("training", engine="eager")[0].job_key == client.job_key
    assert clients("training", size="quick")[0].job_key != client.job_key
    assert clients("training", seed=1)[0].job_key != client.job_key


def test_what_a_baseline_calibrated_is_handed_on_without_changing_which_job_it_is() -> None:
    figures = {"cell_repeats": "3,4,5,6", "request_rate": 12.5, "qps": 13.0, "accuracy": 0.5}
    carried = plan.carried_arguments(figures)
    assert carried == ["--cell-repeats", "3,4,5,6", "--rate", "12.5"]
    assert plan.carried_arguments(None) == []
    (client,) = clients("interactive")
    changed = client.with_arguments(carried)
    assert changed.command[-4:] == tuple(carried)
    assert changed.job_key == client.job_key


@pytest.mark.parametrize(("cores", "count", "threads"), [(2, 4, 1), (16, 4, 4), (16, 3, 5)])
def test_clients_share_the_cores_fairly(cores: int, count: int, threads: int) -> None:
    environment = plan.shared_host_environment(cores, count)
    assert environment["OMP_NUM_THREADS"] == str(threads)
