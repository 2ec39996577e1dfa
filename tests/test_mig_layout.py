"""MIG layouts: which instance a client gets where instances differ in size."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarking.modes.mig import MigMode
from benchmarking.modes.sharing_mode import ModeNotInForceError
from benchmarking.planning import limits, plan
from benchmarking.planning.request import Request
from benchmarking.planning.workloads import SIZE_GUIDE

LAYOUT = ("2g.20gb", "1g.10gb", "1g.10gb")
INSTANCES = [
    {"uuid": f"MIG-{name}-{number}", "profile": name, "multiprocessor_count": 16}
    for number, name in enumerate(["1g.10gb", "1g.10gb", "2g.20gb", "3g.40gb"])
]


def mode(instances: list[dict], layout: tuple[str, ...] = LAYOUT) -> MigMode:
    facts = {"mig_mode": {"current": "Enabled"}, "mig_devices": instances, "uuid": "GPU-1"}
    return MigMode("mig", lambda: facts, Path("empty"), clients=len(layout), layout=layout)


def test_clients_get_instances_in_the_order_of_the_layout_each_its_own():
    sliced = mode(INSTANCES)
    given = [sliced.client_environment(i)["CUDA_VISIBLE_DEVICES"] for i in range(3)]
    assert given == ["MIG-2g.20gb-2", "MIG-1g.10gb-0", "MIG-1g.10gb-1"]
    assert "2g.20gb,1g.10gb,1g.10gb" in sliced.require()[-1].found


@pytest.mark.parametrize("there", [INSTANCES[:2], [{**INSTANCES[0], "profile": None}] * 3])
def test_a_layout_that_is_not_there_is_refused_with_the_command_that_makes_it(there):
    with pytest.raises(ModeNotInForceError) as refusal:
        mode(there).require()
    assert "run sudo ./gpu-configs/setup_mig.sh 2g.20gb,1g.10gb,1g.10gb" in str(refusal.value)


def test_a_client_past_an_instance_that_vanished_gets_none_of_another_size():
    left = [one for one in INSTANCES if one["profile"] != "2g.20gb"]
    assert mode(left).instances() == []


def test_a_job_on_instances_of_unlike_size_has_no_baseline_on_its_instance():
    jobs = ("resnet_training", "batch_inference", "resnet_training")
    clients = [plan.planned_client(i, jobs[i], Request(), SIZE_GUIDE) for i in range(3)]
    co_run = plan.PlannedCoRun("mixed-3-r0", "co_run", "mig", 0, tuple(clients))
    alone = plan.baselines_of(clients, "share_baseline", "mig")
    laid_out = plan.Plan(alone, (co_run,))
    kept, unlike = plan.without_unlike_shares(laid_out, LAYOUT)
    assert [run.clients[0].workload for run in kept.baseline] == ["batch_inference"]
    assert unlike == ["ResNet50 training"]


@pytest.mark.parametrize("text", ["", "1g", "1g.10gb;reboot", "0g.5gb"])
def test_what_is_no_profile_is_refused(text):
    with pytest.raises(ValueError, match="is no MIG profile"):
        limits.profile(text)
