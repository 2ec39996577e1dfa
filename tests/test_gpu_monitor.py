"""The real sampler process against a scripted card, and once against a real one."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import nvml_stub
import pynvml
import pytest
from conftest import PROJECT_ROOT
from nvml_stub import GPU_UUID, SOURCE, build_nvml_stub, stub_environment, write_state

MONITOR = (sys.executable, str(PROJECT_ROOT / "benchmarking" / "gpu_monitor.py"))
SAMPLE_KEYS = {
    "record", "time_seconds", "wall_time", "gpu_index", "gpu_uuid", "utilization_gpu_percent",
    "utilization_source", "graphics_engine_active_percent", "sm_activity_percent",
    "sm_occupancy_percent", "tensor_activity_percent", "dram_activity_percent",
    "memory_used_mib", "memory_total_mib", "sm_clock_mhz", "power_draw_watts", "energy_joules",
    "throttle_reasons", "temperature_celsius", "host_cpu_percent",
}  # fmt: skip
PROCESS_KEYS = {"compute_pids", "mps_pids"}
HOST_KEYS = {"record", "time_seconds", "wall_time", "host_cpu_percent"}
GPM_FIELDS = (
    "graphics_engine_active_percent", "sm_activity_percent", "sm_occupancy_percent",
    "tensor_activity_percent", "dram_activity_percent",
)  # fmt: skip
BUSY = {
    "utilization_gpu_percent": 97, "memory_used_mib": 12345, "sm_clock_mhz": 1755,
    "power_draw_watts": 612.5, "energy_joules": 98765.432, "temperature_celsius": 61,
    "clocks_event_reasons": "0x84", "gpm_graphics_util": 99.5, "gpm_sm_util": 82.25,
    "gpm_sm_occupancy": 31.5, "gpm_any_tensor_util": 21.125, "gpm_dram_bw_util": 44.0,
}  # fmt: skip
MIG = {
    "mig_mode_current": 1,
    "mig_devices": [
        ("MIG-aaaaaaaa-0000-0000-0000-000000000001", 7, 16, 9984, 1000),
        None,  # NVML's numbering has holes
        ("MIG-bbbbbbbb-0000-0000-0000-000000000002", 8, 48, 40448, 2000, "3g.40gb"),
    ],
    "gpm_sm_util_gi7": 20,
    "gpm_sm_util_gi8": 60,
    "gpm_graphics_util_gi7": 30,
    "gpm_graphics_util_gi8": 70,
}
MIG_SMALL, MIG_LARGE = (device[0] for device in MIG["mig_devices"] if device)


@pytest.fixture
def card(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Script the card; called again it changes the card. Returns the sampler's environment."""

    def script(without: tuple[str, ...] = (), **state: object) -> dict[str, str]:
        write_state(tmp_path / "card.txt", **state)
        return stub_environment(build_nvml_stub(tmp_path, without), tmp_path / "card.txt")

    return script


def sample_for(
    environment: dict[str, str], *arguments: str, duration: float = 0.1
) -> tuple[dict, list[dict]]:
    """Run the sampler for a moment; return its first line and its samples."""
    run = subprocess.run(
        (*MONITOR, "--output", "-", "--interval", "0.1", "--duration", str(duration), *arguments),
        env=environment, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    monitor, *samples = [json.loads(line) for line in run.stdout.splitlines()]
    assert monitor["record"] == "monitor"
    assert {sample["record"] for sample in samples} == {"sample"}
    return monitor, samples


@contextlib.contextmanager
def running(environment: dict[str, str], *arguments: str) -> Iterator[subprocess.Popen]:
    """Start the sampler with pipes to it; kill it in the end if it still runs."""
    process = subprocess.Popen(
        (*MONITOR, "--interval", "0.1", *arguments), env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen, wanted: Callable[[dict], bool]) -> dict:
    """Return the sampler's first line that is wanted; the test's timeout bounds the wait."""
    for line in process.stdout:
        record = json.loads(line)
        if wanted(record):
            return record
    raise AssertionError(f"the sampler ended first: {process.stderr.read()}")


# --- what a line says


def test_every_field_of_a_busy_card_has_its_value_and_unit(card: Callable) -> None:
    _, samples = sample_for(card(**BUSY))
    sample = samples[0]
    assert set(sample) == SAMPLE_KEYS | PROCESS_KEYS
    measured = {key: sample[key] for key in SAMPLE_KEYS - HOST_KEYS}
    assert measured == {
        "gpu_index": 0,
        "gpu_uuid": GPU_UUID,
        "utilization_gpu_percent": 97,
        "utilization_source": "nvml",
        "graphics_engine_active_percent": 99.5,
        "sm_activity_percent": 82.25,
        "sm_occupancy_percent": 31.5,
        "tensor_activity_percent": 21.125,
        "dram_activity_percent": 44.0,
        "memory_used_mib": 12345,  # without the driver's 480 MiB, as nvidia-smi counts
        "memory_total_mib": 81559,
        "sm_clock_mhz": 1755,
        "power_draw_watts": 612.5,
        "energy_joules": 98765.432,
        "throttle_reasons": ["sw_power_cap", "hw_power_brake_slowdown"],
        "temperature_celsius": 61,
    }
    assert 0 <= sample["host_cpu_percent"] <= 100
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", sample["wall_time"])


def test_the_first_line_carries_the_facts_of_the_card(card: Callable) -> None:
    before = time.monotonic()
    monitor, samples = sample_for(card())
    assert monitor["ready"] is True
    assert before < monitor["time_seconds"] <= samples[0]["time_seconds"] < time.monotonic()
    facts = {
        "index": 0,
        "uuid": GPU_UUID,
        "name": "NVIDIA H100 80GB HBM3",
        "memory_total_mib": 81559,
        "driver_version": "580.159.04",
        "cuda_driver_version": "13.0",
        "mig_mode": {"current": "Disabled", "pending": "Disabled"},
        "compute_mode": "Default",
        "compute_capability": "9.0",
        "mig_devices": [],
        "gpm_supported": True,
    }
    assert {key: monitor[key] for key in facts} == facts


def test_process_lists_come_once_a_second_and_are_absent_in_between(card: Callable) -> None:
    environment = card(pids={903: 66, 938: 2228, 936: None}, mps_pids={938: 2228})
    _, samples = sample_for(environment, duration=1.5)
    with_lists = [sample for sample in samples if "compute_pids" in sample]
    assert len(with_lists) == 2
    assert with_lists[0]["compute_pids"] == [
        {"pid": 903, "used_memory_mib": 66},
        {"pid": 938, "used_memory_mib": 2228},
        {"pid": 936, "used_memory_mib": None},
    ]
    assert with_lists[0]["mps_pids"] == [{"pid": 938, "used_memory_mib": 2228}]
    in_between = [sample for sample in samples if sample not in with_lists]
    assert in_between
    assert all(PROCESS_KEYS.isdisjoint(sample) for sample in in_between)


def test_a_process_that_starts_later_is_seen(card: Callable) -> None:
    with running(card(), "--output", "-") as process:
        first = read_until(process, lambda record: "compute_pids" in record)
        assert (first["compute_pids"], first["mps_pids"]) == ([], [])
        card(pids={4711: 100}, mps_pids={4711: 100})
        later = read_until(process, lambda record: bool(record.get("mps_pids")))
        assert later["compute_pids"] == [{"pid": 4711, "used_memory_mib": 100}]


def test_the_energy_counter_grows_by_power_times_time(card: Callable) -> None:
    _, samples = sample_for(card(power_draw_watts=500, energy_joules="clock"), duration=1.0)
    joules = samples[-1]["energy_joules"] - samples[0]["energy_joules"]
    seconds = samples[-1]["time_seconds"] - samples[0]["time_seconds"]
    assert joules == pytest.approx(500 * seconds, rel=0.1)


def test_a_reason_without_a_name_is_shown_as_its_bit(card: Callable) -> None:
    _, samples = sample_for(card(clocks_event_reasons="0x10004"))
    assert samples[0]["throttle_reasons"] == ["sw_power_cap", "unknown_0x10000"]


# --- what a card does not offer


@pytest.mark.parametrize(
    ("state", "lacks", "capability", "memory_mib", "unknown"),
    [
        (nvml_stub.GTX_1080_TI, (), "6.1", 11264, {"energy_joules"}),
        (nvml_stub.RTX_2080, nvml_stub.DRIVER_440_LACKS, "7.5", 7982, PROCESS_KEYS),
        (nvml_stub.RTX_3060, (), "8.6", 12288, set()),
    ],
    ids=["GTX 1080 Ti", "RTX 2080 with an old driver", "RTX 3060"],
)
def test_what_an_older_or_smaller_card_lacks_is_null_and_never_0(
    card: Callable, state: dict, lacks: tuple[str, ...], capability: str, memory_mib: int,
    unknown: set[str],
) -> None:  # fmt: skip
    run = subprocess.run(
        (*MONITOR, "--output", "-", "--interval", "0.1", "--duration", "0.2"),
        env=card(lacks, **state), capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert run.stderr == ""  # what a card lacks is no failure
    monitor, first, *_, last = [json.loads(line) for line in run.stdout.splitlines()]
    assert (monitor["compute_capability"], monitor["memory_total_mib"]) == (capability, memory_mib)
    assert (monitor["mig_mode"], monitor["mig_devices"]) == (None, [])
    assert not monitor["gpm_supported"]
    sample = {**last, **{key: first[key] for key in PROCESS_KEYS}}
    assert {key for key, value in sample.items() if value is None} == {*GPM_FIELDS, *unknown}
    assert sample["power_draw_watts"] == state["power_draw_watts"]
    assert sample["utilization_source"] == "nvml"


def test_without_nvml_utilization_gpm_stands_in_and_is_named(card: Callable) -> None:
    _, samples = sample_for(card(**{**BUSY, "utilization_gpu_percent": None}))
    assert samples[0]["utilization_gpu_percent"] == 99.5
    assert samples[0]["utilization_source"] == "gpm"


def test_one_gpm_figure_that_fails_leaves_the_others(card: Callable) -> None:
    _, samples = sample_for(card(**{**BUSY, "gpm_any_tensor_util": None, "gpm_sm_util": "nan"}))
    assert samples[0]["tensor_activity_percent"] is None
    assert samples[0]["sm_activity_percent"] is None
    assert samples[0]["sm_occupancy_percent"] == 31.5


def test_sensors_that_are_not_supported_give_null(card: Callable) -> None:
    unsupported = {
        "sm_clock_mhz": "sm_clock_mhz",
        "power_draw_watts": "power_draw_watts",
        "energy_joules": "energy_joules",
        "temperature_celsius": "temperature_celsius",
        "clocks_event_reasons": "throttle_reasons",
        "memory_used_mib": "memory_used_mib",
        "pids": "compute_pids",
        "mps_pids": "mps_pids",
    }
    _, samples = sample_for(card(**{**BUSY, **dict.fromkeys(unsupported)}))
    assert {field: samples[0][field] for field in unsupported.values()} == dict.fromkeys(
        unsupported.values()
    )
    assert samples[0]["utilization_gpu_percent"] == 97


UNKNOWN_ERROR = 999
# What a sample is made of: functions of NVML's, where a newer one came in the place of an older one
# both, with the fields that are unknown without them.
OF_A_SAMPLE = {
    ("nvmlDeviceGetUtilizationRates",): ("utilization_gpu_percent",),
    ("nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetMemoryInfo"):
        ("memory_used_mib", "memory_total_mib"),
    ("nvmlDeviceGetClockInfo",): ("sm_clock_mhz",),
    ("nvmlDeviceGetPowerUsage",): ("power_draw_watts",),
    ("nvmlDeviceGetTotalEnergyConsumption",): ("energy_joules",),
    ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
        ("throttle_reasons",),
    ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature"): ("temperature_celsius",),
    ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetComputeRunningProcesses_v2"):
        ("compute_pids",),
    ("nvmlDeviceGetMPSComputeRunningProcesses_v3", "nvmlDeviceGetMPSComputeRunningProcesses_v2"):
        ("mps_pids",),
    ("nvmlGpmSampleAlloc",): GPM_FIELDS,
    ("nvmlGpmSampleGet",): GPM_FIELDS,
    ("nvmlGpmMetricsGet",): GPM_FIELDS,
}  # fmt: skip
# One of two that fails alone is not missed; only the newer one is asked, and named.
ONE_OF_TWO = [((name,), name == pair[0]) for pair in OF_A_SAMPLE if pair[1:] for name in pair]


@pytest.mark.parametrize(
    ("failing", "unknown", "is_named"),
    [*((names, fields, True) for names, fields in OF_A_SAMPLE.items()),
     *((names, (), is_named) for names, is_named in ONE_OF_TWO)],
    ids=lambda value: "+".join(value) if value and value is not True else "",
)  # fmt: skip
def test_a_function_that_fails_leaves_its_fields_unknown_and_is_named_once(
    card: Callable, failing: tuple[str, ...], unknown: tuple[str, ...], is_named: bool
) -> None:
    environment = card(
        **BUSY, pids={938: 2228}, mps_pids={938: 2228}, fail=dict.fromkeys(failing, UNKNOWN_ERROR)
    )
    run = subprocess.run(
        (*MONITOR, "--output", "-", "--interval", "0.1", "--duration", "0.1"), env=environment,
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    _, first, *samples = [json.loads(line) for line in run.stdout.splitlines()]
    assert samples
    values = first | {key: value for key, value in samples[-1].items() if value is not None}
    for sample in (first, samples[-1]):
        for field in set(unknown) & set(sample) - {"utilization_gpu_percent"}:
            assert sample[field] is None
    known = {*SAMPLE_KEYS, *PROCESS_KEYS} - set(unknown)
    assert {key for key in known if values[key] is None} == set()
    if "utilization_gpu_percent" in unknown:  # GPM's stands in
        assert first["utilization_source"] == "gpm"
    said = [line for line in run.stderr.splitlines() if "failed: Unknown Error" in line]
    # pynvml has one name for both ways to ask for the memory
    named = dict.fromkeys(name.replace("MemoryInfo_v2", "MemoryInfo") for name in failing)
    assert [line.split()[1] for line in said] == (list(named) if is_named else [])


def test_what_a_card_does_not_support_is_no_failure(card: Callable) -> None:
    run = subprocess.run(
        (*MONITOR, "--output", "-", "--duration", "0.2"), env=card(power_draw_watts=None, gpm=0),
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert run.stderr == ""


def test_a_failure_that_passes_leaves_values_again_and_no_false_gpm_figure(card: Callable) -> None:
    gpu_is_lost = 15
    with running(card(**BUSY), "--output", "-") as process:
        read_until(process, lambda record: record.get("sm_activity_percent") == 82.25)
        card(**BUSY, fail={"nvmlGpmSampleGet": gpu_is_lost})
        read_until(process, lambda r: r["record"] == "sample" and r["sm_activity_percent"] is None)
        card(**{**BUSY, "gpm_sm_util": 11})
        assert read_until(process, lambda record: record["sm_activity_percent"] is not None)[
            "sm_activity_percent"
        ] == pytest.approx(11)


def test_an_old_driver_answers_through_the_older_functions(card: Callable) -> None:
    environment = card(
        without=(
            "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetMPSComputeRunningProcesses_v3",
            "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetTemperatureV",
            "nvmlDeviceGetMemoryInfo_v2", "nvmlSystemGetCudaDriverVersion_v2",
        ),
        **BUSY, pids={938: 2228}, mps_pids={938: 2228},
    )  # fmt: skip
    monitor, samples = sample_for(environment)
    assert monitor["cuda_driver_version"] == "13.0"
    assert samples[0]["compute_pids"] == [{"pid": 938, "used_memory_mib": 2228}]
    assert samples[0]["mps_pids"] == [{"pid": 938, "used_memory_mib": 2228}]
    assert samples[0]["throttle_reasons"] == ["sw_power_cap", "hw_power_brake_slowdown"]
    assert samples[0]["temperature_celsius"] == 61
    assert samples[0]["memory_used_mib"] == 12345 + 480  # all that this driver can tell


# --- which card


def test_a_card_is_found_by_index_and_by_uuid(card: Callable) -> None:
    environment = card(count=2, uuid_1="GPU-second", power_draw_watts_1=77)
    for selector in ("1", "GPU-second"):
        monitor, samples = sample_for(environment, "--gpu", selector)
        assert (monitor["index"], monitor["uuid"]) == (1, "GPU-second")
        assert (samples[0]["gpu_index"], samples[0]["power_draw_watts"]) == (1, 77)


@pytest.mark.parametrize("selector", ["7", "4294967296", "GPU-nowhere", "-1"])
def test_a_card_that_does_not_exist_is_refused_with_the_ones_there_are(
    card: Callable, selector: str
) -> None:
    run = subprocess.run(
        (*MONITOR, "--output", "-", f"--gpu={selector}"), env=card(), capture_output=True,
        text=True, timeout=30, check=False,
    )  # fmt: skip
    assert run.returncode == 3
    assert run.stdout == ""
    assert run.stderr.count("\n") == 1
    assert f"GPU {selector} cannot be found" in run.stderr
    assert f"0 ({GPU_UUID})" in run.stderr


def test_naming_a_card_on_a_machine_without_a_driver_is_refused(card: Callable) -> None:
    run = subprocess.run(
        (*MONITOR, "--output", "-", "--gpu", "0"), env=card(fail={"nvmlInitWithFlags": 9}),
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert run.returncode == 3
    assert "Driver Not Loaded" in run.stderr


@pytest.mark.parametrize(
    "state", [{"fail": {"nvmlInitWithFlags": 9}}, {"fail": {"nvmlInitWithFlags": 18}}, {"count": 0}]
)
def test_without_a_gpu_the_host_is_still_sampled_and_that_is_said_once(
    card: Callable, state: dict
) -> None:
    run = subprocess.run(
        (*MONITOR, "--output", "-", "--interval", "0.1", "--duration", "0.3"), env=card(**state),
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    monitor, *samples = [json.loads(line) for line in run.stdout.splitlines()]
    assert (monitor["ready"], monitor["uuid"], monitor["mig_devices"]) == (True, None, None)
    assert 2 <= len(samples) <= 4
    for sample in samples:
        assert set(sample) - PROCESS_KEYS == SAMPLE_KEYS
        assert {sample[key] for key in SAMPLE_KEYS - HOST_KEYS} == {None}
        assert 0 <= sample["host_cpu_percent"] <= 100
    assert run.stderr.count("no GPU to sample") == 1


# --- MIG


def test_a_mig_instance_has_its_own_memory_gpm_and_processes(card: Callable) -> None:
    environment = card(**MIG, pids={100: (5, 7), 200: (6, 8)})
    monitor, samples = sample_for(environment, "--gpu", MIG_SMALL)
    assert (monitor["uuid"], monitor["index"]) == (MIG_SMALL, 0)
    assert monitor["mig_mode"] == {"current": "Enabled", "pending": "Enabled"}
    assert monitor["mig_devices"] == [
        {"uuid": MIG_SMALL, "profile": None, "gpu_instance_id": 7, "multiprocessor_count": 16,
         "memory_mib": 9984},
        {"uuid": MIG_LARGE, "profile": "3g.40gb", "gpu_instance_id": 8,
         "multiprocessor_count": 48, "memory_mib": 40448},
    ]  # fmt: skip
    sample = samples[0]
    assert (sample["gpu_uuid"], sample["gpu_index"]) == (MIG_SMALL, 0)
    assert (sample["memory_used_mib"], sample["memory_total_mib"]) == (1000, 9984)
    assert sample["sm_activity_percent"] == 20
    assert (sample["utilization_gpu_percent"], sample["utilization_source"]) == (30, "gpm")
    assert sample["compute_pids"] == [{"pid": 100, "used_memory_mib": 5}]
    assert sample["power_draw_watts"] == 119.25  # the whole card's: instances have no sensor


def test_a_whole_card_under_mig_reads_the_mean_over_its_multiprocessors(card: Callable) -> None:
    _, samples = sample_for(card(**MIG))
    assert samples[0]["sm_activity_percent"] == (16 * 20 + 48 * 60) / (16 + 48)
    assert samples[0]["utilization_gpu_percent"] == (16 * 30 + 48 * 70) / (16 + 48)
    assert samples[0]["utilization_source"] == "gpm"


def test_a_pending_mig_mode_is_told_apart_from_the_current_one(card: Callable) -> None:
    monitor, _ = sample_for(card(mig_mode_pending=1))
    assert monitor["mig_mode"] == {"current": "Disabled", "pending": "Enabled"}


# --- for Prometheus


def scraped(environment: dict[str, str], *arguments: str) -> tuple[dict[str, float], str]:
    """Return what a dashboard reads, values by DCGM's name, and the labels of the last one."""
    with running(environment, "--output", "-", "--prometheus", "0", *arguments) as process:
        read_until(process, lambda record: record["record"] == "sample")
        read_until(process, lambda record: record["record"] == "sample")
        url = process.stderr.readline().split()[-1]
        assert url.startswith("http://127.0.0.1:")
        page = urllib.request.urlopen(url, timeout=10).read().decode()
    lines = re.findall(r"^(\w+)\{(.*)\} (\S+)$", page, re.MULTILINE)
    assert len({labels for _, labels, _ in lines}) == 1
    return {name: float(value) for name, _, value in lines}, lines[0][1]


def test_a_dashboard_of_dcgm_reads_its_own_names_units_and_labels(card: Callable) -> None:
    values, labels = scraped(card(**BUSY))
    assert values == {
        "DCGM_FI_DEV_GPU_UTIL": 97,
        "DCGM_FI_PROF_GR_ENGINE_ACTIVE": 0.995,
        "DCGM_FI_PROF_SM_ACTIVE": pytest.approx(0.8225),
        "DCGM_FI_PROF_SM_OCCUPANCY": 0.315,
        "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": 0.21125,
        "DCGM_FI_PROF_DRAM_ACTIVE": 0.44,
        "DCGM_FI_DEV_FB_USED": 12345,
        "DCGM_FI_DEV_FB_FREE": 81559 - 12345,
        "DCGM_FI_DEV_FB_TOTAL": 81559,
        "DCGM_FI_DEV_SM_CLOCK": 1755,
        "DCGM_FI_DEV_GPU_TEMP": 61,
        "DCGM_FI_DEV_POWER_USAGE": 612.5,
        "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": 98765432,
    }
    for label in ('gpu="0"', f'UUID="{GPU_UUID}"', 'modelName="NVIDIA H100 80GB HBM3"'):
        assert label in labels.split(",")
    assert f'Hostname="{socket.gethostname()}"' in labels.split(",")


def test_a_dashboard_reads_a_mig_instance_and_nothing_that_is_unknown(card: Callable) -> None:
    values, labels = scraped(card(**{**MIG, "sm_clock_mhz": None}), "--gpu", MIG_LARGE)
    assert "DCGM_FI_DEV_SM_CLOCK" not in values
    assert "DCGM_FI_DEV_GPU_UTIL" not in values  # DCGM has none of an instance either
    assert values["DCGM_FI_PROF_SM_ACTIVE"] == 0.6
    assert values["DCGM_FI_DEV_FB_USED"] == 2000
    assert 'GPU_I_ID="8"' in labels
    assert 'GPU_I_PROFILE="3g.40gb"' in labels


def test_a_port_that_is_taken_ends_with_code_2_and_one_sentence(card: Callable) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        run = subprocess.run(
            (*MONITOR, "--output", "-", "--prometheus", port), env=card(), capture_output=True,
            text=True, timeout=30, check=False,
        )  # fmt: skip
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "choose another port" in run.stderr


# --- its life


def test_the_period_does_not_drift_and_missed_deadlines_are_left_out(card: Callable) -> None:
    with running(card(), "--output", "-") as process:
        monitor = read_until(process, lambda record: record["record"] == "monitor")
        time.sleep(0.5)
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.65)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.6)
        process.terminate()
        out, _ = process.communicate(timeout=10)
    times = [
        json.loads(line)["time_seconds"] - monitor["time_seconds"] for line in out.splitlines()
    ]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    resumed = gaps.index(max(gaps)) + 1
    assert max(gaps) > 0.5
    # What was missed is not made up for in a burst.
    assert len(times) <= times[-1] / 0.1 + 1 - 4
    # After the stop, which is no multiple of the period, the samples lie on the old grid again.
    late_seconds = [time - 0.1 * int(time / 0.1 + 1e-6) for time in times[resumed + 1 :]]
    # The most punctual one tells: a busy machine delays some, a shifted grid delays all.
    assert min(late_seconds) < 0.02


def test_the_duration_ends_it(card: Callable) -> None:
    _, samples = sample_for(card(), duration=0.5)
    assert len(samples) <= 6
    # It may be late on a busy machine, but never early.
    assert 0.42 <= samples[-1]["time_seconds"] - samples[0]["time_seconds"] < 2


@pytest.mark.parametrize("flag", ["--stdin-control", "--leash"])
def test_it_ends_when_its_standard_input_closes_where_that_is_asked_for(
    card: Callable, flag: str
) -> None:
    with running(card(), "--output", "-", flag) as process:
        process.stdin.write("words mean nothing\n")
        process.stdin.flush()
        written = time.monotonic()
        read_until(process, lambda record: record["time_seconds"] > written + 0.3)
        process.stdin.close()
        process.stdin = None
        assert process.wait(timeout=5) == 0


def test_a_closed_standard_input_does_not_end_it_unasked(card: Callable) -> None:
    run = subprocess.run(
        (*MONITOR, "--output", "-", "--interval", "0.1", "--duration", "0.3"), env=card(),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    first, *_, last = [json.loads(line) for line in run.stdout.splitlines()]
    assert last["time_seconds"] - first["time_seconds"] > 0.25


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_at_once_with_a_whole_last_line(
    card: Callable, tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "samples.jsonl"
    with running(card(), "--output", str(output)) as process:
        while not output.exists() or output.read_text().count("\n") < 3:
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=5)
    assert process.returncode == 0
    assert err == ""
    assert "summary" in out
    text = output.read_text()
    assert text.endswith("}\n")
    assert [json.loads(line)["record"] for line in text.splitlines()][:2] == ["monitor", "sample"]


def test_a_reader_that_goes_away_ends_it_quietly(card: Callable) -> None:
    with running(card(), "--output", "-") as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=5) == 0
        assert process.stderr.read() == ""
        process.stdout = None


# --- by hand


def test_by_hand_it_prints_lines_and_a_summary_and_names_its_file(
    card: Callable, tmp_path: Path
) -> None:
    run = subprocess.run(
        (*MONITOR, "--interval", "0.1", "--duration", "0.2"), env=card(**BUSY), cwd=tmp_path,
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    (output,) = (tmp_path / "results").iterdir()
    assert re.fullmatch(r"gpu_monitor_\d{8}-\d{6}\.jsonl", output.name)
    assert re.search(rf"[23] samples: results/{output.name}$", run.stdout, re.MULTILINE)
    assert f"GPU 0 {GPU_UUID}" in run.stdout
    assert "SM activity 82.2 %" in run.stdout
    assert re.search(r"power draw +612\.5 W +612\.5 W", run.stdout)
    assert len(output.read_text().splitlines()) in (3, 4)


def test_on_a_terminal_it_shows_a_table(card: Callable, tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        (*MONITOR, "--interval", "0.1", "--duration", "0.2", "--output", str(tmp_path / "o")),
        env={**card(**BUSY), "TERM": "xterm"}, stdout=theirs, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # Linux's end of file on a terminal whose other end closed
        while chunk := os.read(ours, 65536):
            shown += chunk
    os.close(ours)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (0, "")
    assert "82.2 %" in shown.decode()
    assert "┃" in shown.decode()


def test_an_existing_file_is_continued(card: Callable, tmp_path: Path) -> None:
    output = tmp_path / "samples.jsonl"
    output.write_text('{"record": "earlier"}\n')
    subprocess.run(
        (*MONITOR, "--duration", "0.1", "--interval", "0.1", "--output", str(output)), env=card(),
        stdout=subprocess.DEVNULL, timeout=30, check=True,
    )  # fmt: skip
    records = [json.loads(line)["record"] for line in output.read_text().splitlines()]
    assert records[:3] == ["earlier", "monitor", "sample"]


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (("--interval", "0.05"), "give 0.1 seconds or more"),
        (("--interval", "nan"), "give 0.1 seconds or more"),
        (("--duration", "-1"), "give 0 (no end) or more seconds"),
        (("--prometheus", "70000"), "give a port from 0 to 65535"),
        (("--output", "/proc/no/such/file"), "name a file that can be written"),
    ],
)
def test_wrong_arguments_end_with_code_2_and_the_fix(
    card: Callable, arguments: tuple[str, ...], fix: str
) -> None:
    run = subprocess.run(
        (*MONITOR, *arguments), env=card(), capture_output=True, text=True, timeout=30, check=False
    )
    assert run.returncode == 2
    assert fix in run.stderr
    assert run.stderr.count("\n") == 1


def test_an_output_that_breaks_ends_it_with_code_1_and_one_sentence(card: Callable) -> None:
    run = subprocess.run(
        (*MONITOR, "--output", "/dev/full"), env=card(), capture_output=True, text=True,
        timeout=30, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr == (
        "gpu_monitor: the samples cannot be written: [Errno 28] No space left on device\n"
    )


# --- the stand-in itself


def test_the_structs_of_the_stand_in_are_those_that_pynvml_declares(tmp_path: Path) -> None:
    structs = {
        "memory_t": "c_nvmlMemory_t",
        "memory_v2_t": "c_nvmlMemory_v2_t",
        "utilization_t": "c_nvmlUtilization_t",
        "process_t": "c_nvmlProcessInfo_v2_t",
        "attributes_t": "c_nvmlDeviceAttributes",
        "temperature_t": "c_nvmlTemperature_v1_t",
        "gpm_support_t": "c_nvmlGpmSupport_t",
        "gpm_metric_t": "c_nvmlGpmMetric_t",
    }
    if not hasattr(pynvml, "nvmlTemperature_v1"):  # nvidia-ml-py before 12.570
        del structs["temperature_t"]
    checks = [
        f'_Static_assert(sizeof({c}) == {ctypes.sizeof(getattr(pynvml, python))}, "{c}");'
        for c, python in structs.items()
    ]
    # The array at the request's end has no length in C: where it begins is what has to agree.
    for c_field, field in (("earlier", "sample1"), ("later", "sample2"), ("metrics", "metrics")):
        offset = getattr(pynvml.c_nvmlGpmMetricsGet_t, field).offset
        checks.append(
            f'_Static_assert(offsetof(gpm_request_t, {c_field}) == {offset}, "{c_field}");'
        )
    source = tmp_path / "layout.c"
    source.write_text("\n".join([f'#include "{SOURCE}"', *checks, ""]))
    subprocess.run(("gcc", "-fsyntax-only", str(source)), check=True)


# --- a real card


@pytest.mark.gpu
def test_a_real_card_gives_plausible_values() -> None:
    monitor, samples = sample_for(dict(os.environ), "--interval", "0.2", duration=2)
    assert monitor["uuid"].startswith("GPU-")
    assert monitor["memory_total_mib"] > 1000
    assert len(samples) >= 9
    for sample in samples:
        assert sample["gpu_uuid"] == monitor["uuid"]
        assert sample["utilization_source"] in ("nvml", "gpm")
        assert 0 <= sample["utilization_gpu_percent"] <= 100
        assert 0 <= sample["memory_used_mib"] <= monitor["memory_total_mib"]
        assert 100 <= sample["sm_clock_mhz"] <= 5000
        assert 5 <= sample["power_draw_watts"] <= 2000
        assert 10 <= sample["temperature_celsius"] <= 110
        assert isinstance(sample["throttle_reasons"], list)
        if monitor["gpm_supported"]:
            assert 0 <= sample["sm_occupancy_percent"] <= sample["sm_activity_percent"] + 1 <= 101
            assert 0 <= sample["dram_activity_percent"] <= 100
            assert 0 <= sample["tensor_activity_percent"] <= 100
    assert isinstance(samples[0]["compute_pids"], list)
    assert isinstance(samples[0]["mps_pids"], list)
    joules = samples[-1]["energy_joules"] - samples[0]["energy_joules"]
    seconds = samples[-1]["time_seconds"] - samples[0]["time_seconds"]
    mean_watts = sum(sample["power_draw_watts"] for sample in samples) / len(samples)
    assert joules / seconds == pytest.approx(mean_watts, rel=0.5)
