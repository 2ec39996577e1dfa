"""The real sampler process against a scripted card, and once against a real one."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import nvml_stub
import pytest
from conftest import PROJECT_ROOT
from nvml_stub import GPU_UUID, build_nvml_stub, stub_environment, write_state

MONITOR = (sys.executable, str(PROJECT_ROOT / "benchmarking" / "gpu_monitor.py"))
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
# What a sample says of the busy card.
SAID = {
    "gpu_index": 0, "gpu_uuid": GPU_UUID, "utilization_gpu_percent": 97,
    "utilization_source": "nvml", "graphics_engine_active_percent": 99.5,
    "sm_activity_percent": 82.25, "sm_occupancy_percent": 31.5, "tensor_activity_percent": 21.125,
    "dram_activity_percent": 44.0, "memory_total_mib": 81559,
    "memory_used_mib": 12345,  # without the driver's 480 MiB, as nvidia-smi counts
    "sm_clock_mhz": 1755, "power_draw_watts": 612.5, "energy_joules": 98765.432,
    "throttle_reasons": ["sw_power_cap", "hw_power_brake_slowdown"], "temperature_celsius": 61,
}  # fmt: skip
PROCESS_KEYS = {"compute_pids", "mps_pids"}
SAMPLE_KEYS = {"record", "time_seconds", "wall_time", "host_cpu_percent", *SAID}
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


PROCESSES = {"pids": {938: 2228}, "mps_pids": {938: 2228}}
UNKNOWN_ERROR, GPU_IS_LOST = 999, 15


class Seen(NamedTuple):
    """What the sampler wrote and said."""

    code: int
    records: list[dict]
    stderr: str


@pytest.fixture
def card(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Script the card; called again it changes the card. Returns the sampler's environment."""

    def script(without: tuple[str, ...] = (), **state: object) -> dict[str, str]:
        write_state(tmp_path / "card.txt", **state)
        return stub_environment(build_nvml_stub(tmp_path, without), tmp_path / "card.txt")

    return script


def run(environment: dict[str, str], *arguments: str, **how: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        (*MONITOR, "--interval", "0.1", "--duration", "0.1", *arguments), env=environment,
        capture_output=True, text=True, timeout=30, check=False, **how,
    )  # fmt: skip


def sample(environment: dict[str, str], *arguments: str, **how: object) -> Seen:
    """Run the sampler for a moment, or as long as the arguments say."""
    done = run(environment, "--output", "-", *arguments, **how)
    return Seen(done.returncode, [*map(json.loads, done.stdout.splitlines())], done.stderr)


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
    before = time.monotonic()
    listed = {903: 66, 938: 2228, 936: None}
    _, (monitor, first, *_), stderr = sample(card(**BUSY, pids=listed, mps_pids={938: 2228}))
    assert stderr == ""
    assert set(first) == SAMPLE_KEYS | PROCESS_KEYS
    assert {key: first[key] for key in SAID} == SAID
    assert first["compute_pids"] == [
        {"pid": pid, "used_memory_mib": memory} for pid, memory in listed.items()
    ]
    assert first["mps_pids"] == [{"pid": 938, "used_memory_mib": 2228}]
    _, (_, of_535, *_), _ = sample(card(**BUSY, pids=listed, larger_process_entries=1))
    assert of_535["compute_pids"] == first["compute_pids"]
    assert 0 <= first["host_cpu_percent"] <= 100
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first["wall_time"])
    # the first line carries the facts of the card
    assert before < monitor["time_seconds"] <= first["time_seconds"] < time.monotonic()
    facts = {
        "record": "monitor", "ready": True, "index": 0, "uuid": GPU_UUID,
        "name": "NVIDIA H100 80GB HBM3", "memory_total_mib": 81559, "driver_version": "580.159.04",
        "cuda_driver_version": "13.0", "compute_mode": "Default", "compute_capability": "9.0",
        "mig_mode": {"current": "Disabled", "pending": "Disabled"}, "mig_devices": [],
        "gpm_supported": True,
    }  # fmt: skip
    assert {key: monitor[key] for key in facts} == facts


def test_process_lists_come_once_a_second_and_energy_is_power_times_time(card: Callable) -> None:
    environment = card(**PROCESSES, power_draw_watts=500, energy_joules="clock")
    _, (_, *samples), _ = sample(environment, "--duration", "1.5")
    with_lists = [sample for sample in samples if "compute_pids" in sample]
    assert len(with_lists) == 2
    in_between = [sample for sample in samples if sample not in with_lists]
    assert in_between
    assert all(PROCESS_KEYS.isdisjoint(sample) for sample in in_between)
    joules = samples[-1]["energy_joules"] - samples[0]["energy_joules"]
    seconds = samples[-1]["time_seconds"] - samples[0]["time_seconds"]
    assert joules == pytest.approx(500 * seconds, rel=0.1)
    # the duration ends it: late, perhaps, but never early
    assert len(samples) <= 16
    assert 1.2 <= seconds < 5


def test_a_card_that_changes_is_followed_and_a_failure_that_passes_leaves_no_false_figure(
    card: Callable,
) -> None:
    with running(card(**BUSY), "--output", "-") as process:
        first = read_until(process, lambda record: "compute_pids" in record)
        assert (first["compute_pids"], first["mps_pids"]) == ([], [])
        card(**BUSY, pids={4711: 100}, mps_pids={4711: 100})
        later = read_until(process, lambda record: bool(record.get("mps_pids")))
        assert later["compute_pids"] == [{"pid": 4711, "used_memory_mib": 100}]
        card(**BUSY, fail={"nvmlGpmSampleGet": GPU_IS_LOST})
        read_until(process, lambda record: record["sm_activity_percent"] is None)
        card(**{**BUSY, "gpm_sm_util": 11})
        found = read_until(process, lambda record: record["sm_activity_percent"] is not None)
        assert found["sm_activity_percent"] == pytest.approx(11)


@pytest.mark.parametrize(
    ("state", "wanted"),
    [
        ({"clocks_event_reasons": "0x10004"},
         {"throttle_reasons": ["sw_power_cap", "unknown_0x10000"]}),
        ({"utilization_gpu_percent": None},
         {"utilization_gpu_percent": 99.5, "utilization_source": "gpm"}),
        ({"gpm_any_tensor_util": None, "gpm_sm_util": "nan"},
         {"tensor_activity_percent": None, "sm_activity_percent": None,
          "sm_occupancy_percent": 31.5}),
        (dict.fromkeys(("sm_clock_mhz", "power_draw_watts", "energy_joules", "temperature_celsius",
                        "clocks_event_reasons", "memory_used_mib", "pids", "mps_pids")),
         {**dict.fromkeys(("sm_clock_mhz", "power_draw_watts", "energy_joules", "mps_pids",
                           "temperature_celsius", "throttle_reasons", "memory_used_mib",
                           "compute_pids")), "utilization_gpu_percent": 97}),
    ],
    ids=["a bit without a name", "no utilization", "one GPM figure", "no sensors"],
)  # fmt: skip
def test_what_a_card_does_not_tell_is_null_and_no_failure(
    card: Callable, state: dict, wanted: dict
) -> None:
    _, (_, first, *_), stderr = sample(card(**{**BUSY, **state}))
    assert {field: first[field] for field in wanted} == wanted
    assert stderr == ""


@pytest.mark.parametrize(
    ("state", "lacks", "capability", "unknown"),
    [
        (nvml_stub.GTX_1080_TI, (), "6.1", {"energy_joules"}),
        (nvml_stub.RTX_2080, nvml_stub.DRIVER_440_LACKS, "7.5", PROCESS_KEYS),
    ],
    ids=["GTX 1080 Ti", "RTX 2080 with an old driver"],
)
def test_what_an_older_or_smaller_card_lacks_is_null_and_never_0(
    card: Callable, state: dict, lacks: tuple[str, ...], capability: str, unknown: set[str]
) -> None:
    _, (monitor, first, *_, last), stderr = sample(card(lacks, **state), "--duration", "0.2")
    assert stderr == ""
    assert monitor["compute_capability"] == capability
    assert monitor["memory_total_mib"] == state["memory_total_mib"]
    assert (monitor["mig_mode"], monitor["mig_devices"]) == (None, [])
    assert not monitor["gpm_supported"]
    found = {**last, **{key: first[key] for key in PROCESS_KEYS}}
    assert {key for key, value in found.items() if value is None} == {*GPM_FIELDS, *unknown}
    assert found["power_draw_watts"] == state["power_draw_watts"]


# Newer functions of NVML's with the older ones that they came in the place of.
PAIRS = {
    "nvmlDeviceGetMemoryInfo_v2": "nvmlDeviceGetMemoryInfo",
    "nvmlDeviceGetCurrentClocksEventReasons": "nvmlDeviceGetCurrentClocksThrottleReasons",
    "nvmlDeviceGetTemperatureV": "nvmlDeviceGetTemperature",
    "nvmlDeviceGetComputeRunningProcesses_v3": "nvmlDeviceGetComputeRunningProcesses_v2",
    "nvmlDeviceGetMPSComputeRunningProcesses_v3": "nvmlDeviceGetMPSComputeRunningProcesses_v2",
}
ALONE = {
    "nvmlDeviceGetUtilizationRates": (), "nvmlDeviceGetClockInfo": ("sm_clock_mhz",),
    "nvmlDeviceGetPowerUsage": ("power_draw_watts",),
    "nvmlDeviceGetTotalEnergyConsumption": ("energy_joules",),
}  # fmt: skip
OF_PAIRS = {"memory_used_mib", "memory_total_mib", "throttle_reasons", "temperature_celsius",
            *PROCESS_KEYS}  # fmt: skip


@pytest.mark.parametrize(
    ("failing", "unknown", "named"),
    [
        # Of two that fail, or of the newer one alone, both are asked and named as they were.
        ([*PAIRS, *PAIRS.values()], OF_PAIRS, [*PAIRS, *PAIRS.values()]),
        ([*PAIRS], set(), [*PAIRS]),
        ([*PAIRS.values()], set(), []),
        *(([name], set(fields), [name]) for name, fields in ALONE.items()),
        *(([name], set(GPM_FIELDS), [name])
          for name in ("nvmlGpmSampleAlloc", "nvmlGpmSampleGet", "nvmlGpmMetricsGet")),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value else "",
)  # fmt: skip
def test_a_function_that_fails_leaves_its_fields_unknown_and_is_named_once(
    card: Callable, failing: list[str], unknown: set[str], named: list[str]
) -> None:
    failures = dict.fromkeys(failing, UNKNOWN_ERROR)
    _, (_, first, *_, last), stderr = sample(card(**BUSY, **PROCESSES, fail=failures))
    values = first | {key: value for key, value in last.items() if value is not None}
    assert {key for key, value in values.items() if value is None} == unknown
    assert (first["utilization_source"] == "gpm") is ("nvmlDeviceGetUtilizationRates" in failing)
    if failing == [*PAIRS]:  # the older ones have answered
        assert first["mps_pids"] == first["compute_pids"] == [{"pid": 938, "used_memory_mib": 2228}]
        assert first["memory_used_mib"] == 12345 + 480  # all that an old driver can tell
    said = [line.split()[1] for line in stderr.splitlines() if "failed: Unknown Error" in line]
    # pynvml has one name for both ways to ask for the memory
    assert sorted(said) == sorted({name.replace("MemoryInfo_v2", "MemoryInfo") for name in named})


# --- which card


def test_a_card_is_found_by_index_and_by_uuid(card: Callable) -> None:
    environment = card(count=2, uuid_1="GPU-second", power_draw_watts_1=77)
    for selector in ("1", "GPU-second"):
        _, (monitor, first, *_), _ = sample(environment, "--gpu", selector)
        assert (monitor["index"], monitor["uuid"]) == (1, "GPU-second")
        assert (first["gpu_index"], first["power_draw_watts"]) == (1, 77)


@pytest.mark.parametrize(
    ("selector", "state", "words"),
    [
        *((selector, {}, f"GPU {selector} cannot be found") for selector in
          ("7", "4294967296", "GPU-nowhere", "-1")),
        ("0", {"fail": {"nvmlInitWithFlags": 9}}, "Driver Not Loaded"),
    ],
)  # fmt: skip
def test_a_card_that_does_not_exist_is_refused_with_the_ones_there_are(
    card: Callable, selector: str, state: dict, words: str
) -> None:
    code, records, stderr = sample(card(**state), f"--gpu={selector}")
    assert (code, records, stderr.count("\n")) == (3, [], 1)
    assert words in stderr
    assert state or f"0 ({GPU_UUID})" in stderr


@pytest.mark.parametrize(
    "state", [{"fail": {"nvmlInitWithFlags": 9}}, {"fail": {"nvmlInitWithFlags": 18}}, {"count": 0}]
)
def test_without_a_gpu_the_host_is_still_sampled_and_that_is_said_once(
    card: Callable, state: dict
) -> None:
    _, (monitor, *samples), stderr = sample(card(**state), "--duration", "0.3")
    assert (monitor["ready"], monitor["uuid"], monitor["mig_devices"]) == (True, None, None)
    assert 2 <= len(samples) <= 4
    for one in samples:
        assert set(one) - PROCESS_KEYS == SAMPLE_KEYS
        assert {one[key] for key in SAID} == {None}
        assert 0 <= one["host_cpu_percent"] <= 100
    assert stderr.count("no GPU to sample") == 1


def test_a_mig_instance_has_its_own_memory_gpm_and_processes(card: Callable) -> None:
    environment = card(**MIG, pids={100: (5, 7), 200: (6, 8)})
    _, (monitor, first, *_), _ = sample(environment, "--gpu", MIG_SMALL)
    assert (monitor["uuid"], monitor["index"]) == (MIG_SMALL, 0)
    assert monitor["mig_mode"] == {"current": "Enabled", "pending": "Enabled"}
    assert monitor["mig_devices"] == [
        {"uuid": MIG_SMALL, "profile": None, "gpu_instance_id": 7, "multiprocessor_count": 16,
         "memory_mib": 9984},
        {"uuid": MIG_LARGE, "profile": "3g.40gb", "gpu_instance_id": 8,
         "multiprocessor_count": 48, "memory_mib": 40448},
    ]  # fmt: skip
    assert (first["gpu_uuid"], first["gpu_index"]) == (MIG_SMALL, 0)
    assert (first["memory_used_mib"], first["memory_total_mib"]) == (1000, 9984)
    assert first["sm_activity_percent"] == 20
    assert (first["utilization_gpu_percent"], first["utilization_source"]) == (30, "gpm")
    assert first["compute_pids"] == [{"pid": 100, "used_memory_mib": 5}]
    assert first["power_draw_watts"] == 119.25  # the whole card's: instances have no sensor


def test_a_whole_card_under_mig_reads_the_mean_over_its_multiprocessors(card: Callable) -> None:
    pids = {100: (5, 7), 200: (6, 8)}
    _, (monitor, first, *_), stderr = sample(card(**MIG, pids=pids, mig_mode_pending=0))
    assert stderr == ""
    assert [one["pid"] for one in first["compute_pids"]] == [100, 200]
    assert first["sm_activity_percent"] == (16 * 20 + 48 * 60) / (16 + 48)
    assert first["utilization_gpu_percent"] == (16 * 30 + 48 * 70) / (16 + 48)
    assert first["utilization_source"] == "gpm"
    assert monitor["mig_mode"] == {"current": "Enabled", "pending": "Disabled"}


# --- for Prometheus


def scraped(environment: dict[str, str], *arguments: str) -> tuple[dict[str, float], str]:
    """Return what a dashboard reads, values by DCGM's name, and the labels of the last one."""
    with running(environment, "--output", "-", "--prometheus", "0", *arguments) as process:
        for _ in range(2):
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
    assert {'gpu="0"', f'UUID="{GPU_UUID}"', 'modelName="NVIDIA H100 80GB HBM3"',
            f'Hostname="{socket.gethostname()}"'} <= {*labels.split(",")}  # fmt: skip


def test_a_dashboard_reads_a_mig_instance_and_nothing_that_is_unknown(card: Callable) -> None:
    values, labels = scraped(card(**{**MIG, "sm_clock_mhz": None}), "--gpu", MIG_LARGE)
    # DCGM has no utilization of an instance either
    assert {"DCGM_FI_DEV_SM_CLOCK", "DCGM_FI_DEV_GPU_UTIL"}.isdisjoint(values)
    assert values["DCGM_FI_PROF_SM_ACTIVE"] == 0.6
    assert values["DCGM_FI_DEV_FB_USED"] == 2000
    assert 'GPU_I_ID="8"' in labels
    assert 'GPU_I_PROFILE="3g.40gb"' in labels


# --- its life


def test_hundreds_of_silent_connections_keep_no_dashboard_and_no_sample_away(
    card: Callable,
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, limit[1]))
        try:
            arguments = ("--output", "-", "--prometheus", "0")
            process = stack.enter_context(running(card(**BUSY), *arguments))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        url = process.stderr.readline().split()[-1]
        address = urlsplit(url)
        where = (address.hostname, address.port)
        with ThreadPoolExecutor(20) as pool:  # some wait for a second try of the kernel's
            clients = pool.map(lambda _: socket.create_connection(where, timeout=30), range(200))
        for client in clients:
            stack.enter_context(client)
        assert b"DCGM_FI_DEV_GPU_UTIL{" in urllib.request.urlopen(url, timeout=10).read()
        latest = time.monotonic()
        read_until(process, lambda record: record["time_seconds"] > latest)
        assert len(os.listdir(f"/proc/{process.pid}/fd")) < 64
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=10)[1] == ""


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


def test_it_ends_when_its_standard_input_closes_where_that_is_asked_for(card: Callable) -> None:
    with running(card(), "--output", "-", "--leash") as process:  # the former --stdin-control
        process.stdin.write("words mean nothing\n")
        process.stdin.flush()
        written = time.monotonic()
        read_until(process, lambda record: record["time_seconds"] > written + 0.3)
        process.stdin.close()
        process.stdin = None
        assert process.wait(timeout=5) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_at_once_with_a_whole_last_line_and_an_existing_file_is_continued(
    card: Callable, tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "samples.jsonl"
    output.write_text('{"record": "earlier"}\n')
    with running(card(), "--output", str(output)) as process:
        process.stdin.close()  # which does not end it unasked
        process.stdin = None
        while output.read_text().count("\n") < 4:
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=5)
    assert (process.returncode, err) == (0, "")
    assert "summary" in out
    text = output.read_text()
    assert text.endswith("}\n")
    records = [json.loads(line)["record"] for line in text.splitlines()]
    assert records[:3] == ["earlier", "monitor", "sample"]


def test_a_file_whose_last_line_was_cut_off_is_continued_on_a_line_of_its_own(
    card: Callable, tmp_path: Path
) -> None:
    output = tmp_path / "samples.jsonl"
    output.write_text('{"record": "sam')
    assert run(card(), "--output", str(output)).returncode == 0
    cut_off, *rest = output.read_text().splitlines()
    assert cut_off == '{"record": "sam'
    assert [json.loads(line)["record"] for line in rest][:2] == ["monitor", "sample"]


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
    done = run(card(**BUSY), "--duration", "0.2", cwd=tmp_path)
    (output,) = (tmp_path / "results").iterdir()
    assert re.fullmatch(r"gpu_monitor_\d{8}-\d{6}\.jsonl", output.name)
    assert re.search(rf"[23] samples: results/{output.name}$", done.stdout, re.MULTILINE)
    assert f"GPU 0 {GPU_UUID}" in done.stdout
    assert "SM activity 82.2 %" in done.stdout
    assert re.search(r"power draw +612\.5 W +612\.5 W", done.stdout)
    assert len(output.read_text().splitlines()) in (3, 4)


def test_the_usual_file_is_a_new_one_where_its_name_is_taken_or_a_planted_link(
    card: Callable, tmp_path: Path
) -> None:
    (tmp_path / "results").mkdir()
    victim = tmp_path / "victim"
    victim.touch()
    for later in range(60):
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(time.time() + later))
        (tmp_path / "results" / f"gpu_monitor_{stamp}.jsonl").symlink_to(victim)
    done = run(card(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert victim.read_text() == ""
    (output,) = (path for path in (tmp_path / "results").iterdir() if not path.is_symlink())
    assert output.name.endswith("-2.jsonl")
    assert done.stdout.endswith(f" samples: results/{output.name}\n")


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


@pytest.mark.parametrize(
    ("arguments", "code", "fix"),
    [
        (("--prometheus", "TAKEN"), 2, "choose another port"),
        (("--prometheus=0", "--prometheus-address=a..b"), 2, "choose another port"),
        (("--interval", "1e300"), 2, "give 0.1 to 86400 seconds"),
        (("--output", "/proc/no/such/file"), 2, "name a file that can be written"),
        (("--output", "/dev/full"), 1, "cannot be written: [Errno 28] No space left on device"),
    ],
)
def test_what_cannot_be_done_ends_with_one_sentence_that_names_the_fix(
    card: Callable, arguments: tuple[str, str], code: int, fix: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run(card(), "--output", "-", arguments[0], arguments[1].replace("TAKEN", port))
    assert (done.returncode, done.stderr.count("\n")) == (code, 1)
    assert fix in done.stderr


@pytest.mark.parametrize(
    ("closed", "arguments", "code", "says"),
    [
        ("<&-", ("--stdin-control",), 2, "standard input is closed"),
        (">&-", ("--output", "-"), 2, "standard output is closed"),
        (">&-", (), 0, ""),
    ],
)
def test_a_closed_stream_is_said_where_it_is_needed(
    card: Callable, tmp_path: Path, closed: str, arguments: tuple[str, ...], code: int, says: str
) -> None:
    command = ("bash", "-c", f'exec "$0" "$@" {closed}', *MONITOR, "--duration", "0.1", *arguments)
    done = subprocess.run(
        command, env=card(), cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_whose_name_is_no_text_is_written_and_named(card: Callable, tmp_path: Path) -> None:
    output = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    command = [*MONITOR, "--duration", "0.1", "--output", output]
    done = subprocess.run(command, env=card(), capture_output=True, check=True, timeout=30)
    assert b"/caf\xe9" in done.stdout
    assert os.path.getsize(output)


# --- a real card


@pytest.mark.gpu
def test_a_real_card_gives_plausible_values() -> None:
    monitor, *samples = sample(dict(os.environ), "--interval", "0.2", "--duration", "2").records
    assert monitor["uuid"].startswith("GPU-")
    assert monitor["memory_total_mib"] > 1000
    assert len(samples) >= 9
    for one in samples:
        assert one["gpu_uuid"] == monitor["uuid"]
        assert one["utilization_source"] in ("nvml", "gpm")
        assert 0 <= one["utilization_gpu_percent"] <= 100
        assert 0 <= one["memory_used_mib"] <= monitor["memory_total_mib"]
        assert 100 <= one["sm_clock_mhz"] <= 5000
        assert 5 <= one["power_draw_watts"] <= 2000
        assert 10 <= one["temperature_celsius"] <= 110
        assert isinstance(one["throttle_reasons"], list)
        if monitor["gpm_supported"]:
            assert 0 <= one["sm_occupancy_percent"] <= one["sm_activity_percent"] + 1 <= 101
            assert 0 <= one["dram_activity_percent"] <= 100
            assert 0 <= one["tensor_activity_percent"] <= 100
    assert isinstance(samples[0]["compute_pids"], list)
    assert isinstance(samples[0]["mps_pids"], list)
    joules = samples[-1]["energy_joules"] - samples[0]["energy_joules"]
    seconds = samples[-1]["time_seconds"] - samples[0]["time_seconds"]
    mean_watts = sum(one["power_draw_watts"] for one in samples) / len(samples)
    assert joules / seconds == pytest.approx(mean_watts, rel=0.5)
