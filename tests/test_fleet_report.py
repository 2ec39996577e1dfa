"""What a fleet's report makes of its units, and what the health check reads of a card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nvml_stub
import pytest
from conftest import PROJECT_ROOT

from benchmarking import fleet_report

RECORDED = PROJECT_ROOT / "examples" / "h200-mixed-4" / "comparison.json"


@pytest.mark.parametrize(
    ("changes", "best_mode"),
    [({}, "mps"), ({"best": "mps:even"}, "mps:even"), ({"verdict": "cannot tell"}, None),
     ({"verdict": "no difference that matters"}, None), ({"mix": "another"}, None)],
)  # fmt: skip
def test_a_card_decides_for_a_mode_only_where_the_conclusion_is_sure(
    tmp_path: Path, changes: dict[str, str], best_mode: str | None
) -> None:
    comparison = json.loads(RECORDED.read_text())
    for conclusion in comparison["sections"][0]["conclusions"]:
        if conclusion["subject"] == "whole card":
            conclusion.update(changes)
    record = add_card(tmp_path, "GPU-0", comparison=comparison)
    assert fleet_report.read_card(record)["best_mode"] == best_mode


@pytest.mark.parametrize(
    "change", [{"outcome": "failed"}, {"invalid": "the baseline was disturbed"}]
)
def test_a_mode_whose_figures_are_void_has_none_in_the_table(
    tmp_path: Path, change: dict[str, str]
) -> None:
    comparison = json.loads(RECORDED.read_text())
    for group in comparison["sections"][0]["groups"]:
        if group["variant"] == "mps":
            group.update(change)
    record = add_card(tmp_path, "GPU-0", comparison=comparison)
    modes = fleet_report.read_card(record)["modes"]
    assert {name for name, value in modes["mps"].items() if value is not None} == {"outcome"}
    assert modes["mps:even"]["worst_slowdown"] > 1


def test_a_p99_of_missed_requests_is_infinite_and_not_another_jobs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison = json.loads(RECORDED.read_text())
    for group in comparison["sections"][0]["groups"]:
        if (group["variant"], group["clients"]) == ("mps", 4):
            group["client_rows"][0] |= {"p99_ms": None, "responses": 900, "missed": 100}
    add_card(tmp_path, "GPU-0", comparison=comparison)
    assert fleet_report.write(tmp_path, []) == 0
    rows = capsys.readouterr().out.splitlines()
    assert ["∞" in row for row in rows if "| mps |" in row] == [True, True]
    assert not any("∞" in row for row in rows if "| time-slicing |" in row)
    (card,) = json.loads((tmp_path / "fleet.json").read_text())["cards"]
    assert card["modes"]["mps"]["p99_ms"] is None


def test_cards_of_which_no_more_than_half_agree_decide_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for uuid, best in (("GPU-0", "mps"), ("GPU-1", "time-slicing")):
        comparison = json.loads(RECORDED.read_text())
        for conclusion in comparison["sections"][0]["conclusions"]:
            conclusion["best"] = best
        add_card(tmp_path, uuid, comparison=comparison)
    assert fleet_report.write(tmp_path, []) == 0
    said = capsys.readouterr().out
    assert "**the cards do not agree on a mode**; at most 1 of 2 do." in said
    assert "odd: host GPU-0: decides for mps" in said
    assert "odd: host GPU-1: decides for time-slicing" in said


def test_the_worst_slowdown_of_copies_is_that_of_the_worst_one(tmp_path: Path) -> None:
    comparison = json.loads(RECORDED.read_text())
    for group in comparison["sections"][0]["groups"]:
        for number, row in enumerate(group["client_rows"]):
            row |= {"label": "copy", "slowdown": {"mean": 9.0 - number}}
        # Of a service, which comes to its share of the work at any speed, it says nothing.
        group["client_rows"].append({**row, "service": {}, "slowdown": {"mean": 99.0}})
    card = fleet_report.read_card(add_card(tmp_path, "GPU-0", comparison=comparison))
    assert card["modes"]["mps"]["worst_slowdown"] == 9.0


def test_cards_are_averaged_only_where_runs_would_be_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = {"exit_code": 137, "health_failure": "it has fallen off the bus"}
    units = {"GPU-0": {}, "GPU-1": {}, "GPU-2": {"commit": "b"}, "GPU-3": lost}
    for uuid, fields in units.items():
        add_card(tmp_path, uuid, **fields)
    assert fleet_report.write(tmp_path, []) == 1
    said = capsys.readouterr().out
    assert "H100, driver 580, commit a: **mps delivers most**; 2 of 2 cards agree." in said
    assert "H100, driver 580, commit b: **mps delivers most**; 1 of 1 card agrees." in said
    assert "Not measured: host GPU-3: it has fallen off the bus" in said
    assert "| host | GPU-3 | failed (flagged) |" in said


@pytest.mark.parametrize(
    "broken",
    ["[]", "[" * 100_000, "fifo", {"gpu": None}, {"exit_code": [0]}, {"health": {"xids": [[1]]}},
     {"schema_version": 9}, {"host": None}, "comparison"],
)  # fmt: skip
def test_a_record_that_is_none_is_a_row_beside_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: str | dict[str, Any]
) -> None:
    add_card(tmp_path, "GPU-0")
    path = add_card(tmp_path, "GPU-1")
    if broken == "fifo":
        path.unlink()
        os.mkfifo(path)
    elif broken == "comparison":
        path = path.with_suffix("") / "comparison.json"
        path.write_text(json.dumps({"schema_version": 4, "sections": []}))
    else:
        record = json.loads(path.read_text())
        path.write_text(broken if isinstance(broken, str) else json.dumps(record | broken))
    assert fleet_report.write(tmp_path, []) == 1
    said = capsys.readouterr().out
    assert "**mps delivers most**; 1 of 1 card agrees." in said
    assert "| host |  | not measured: GPU-1.json, or its comparison.json, cannot be read (" in said


def test_a_card_that_was_measured_under_two_hosts_names_counts_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for host, begun in (("pod-b", "2026-01-01"), ("pod-a", "2026-01-02")):
        add_card(tmp_path, "GPU-0", host=host, started_at=begun)
    assert fleet_report.write(tmp_path, []) == 0
    said = capsys.readouterr().out
    assert "1 of 1 card agrees." in said
    assert "odd: pod-b GPU-0: the card that pod-a measured again later" in said


def add_card(
    folder: Path, uuid: str, host: str = "host", comparison: dict | None = None, **fields: Any
) -> Path:
    """Write what is left of a card that was measured; return its record's path."""
    record = {
        "host": host, "gpu": {"uuid": uuid, "name": "H100", "driver_version": "580"},
        "exit_code": 0, "reason": None, "health": None, "health_failure": None, "commit": "a",
        "plan": "1", "host_cores": 16,
    }  # fmt: skip
    (folder / host / uuid).mkdir(parents=True)
    compared = RECORDED.read_text() if comparison is None else json.dumps(comparison)
    (folder / host / uuid / "comparison.json").write_text(compared)
    path = folder / host / f"{uuid}.json"
    path.write_text(json.dumps(record | fields))
    return path


HEALTHY = {"copy_bytes_per_second": 4e12, "matrix_operations_per_second": 7e14,
           "power_limit_watts": 700.0, "throttle_reasons": ["sw_power_cap"], "xids": [31],
           "ecc_uncorrected_errors": 0.0}  # fmt: skip


@pytest.mark.parametrize(
    ("health", "flags"),
    [
        ({"matrix_operations_per_second": 6.8e14}, []),
        ({"matrix_operations_per_second": 6.7e14}, ["bf16 rate 4.3 % under the median"]),
        ({"copy_bytes_per_second": None, "xids": None}, []),
        ({"power_limit_watts": 500.0}, ["power limit 500.0 W, of others 700.0 W"]),
        ({"power_limit_watts": None}, []),
        ({"throttle_reasons": ["hw_slowdown"], "xids": [31, 79]}, ["clock lowered", "Xid 79"]),
        ({"ecc_uncorrected_errors": 2.0}, ["2 uncorrected ECC errors"]),
        ({"copy_bytes_per_second": 0.0}, ["copy rate 100.0 % under the median"]),
    ],
)
def test_what_the_health_check_has_against_a_card(health: dict[str, Any], flags: list[str]) -> None:
    cards = [
        {"model": model, "flags": [], "health": found}
        for model, found in [
            ("H200", {**HEALTHY, **health}), ("H200", HEALTHY), ("H200", HEALTHY),
            ("L4", {**HEALTHY, "copy_bytes_per_second": 1e11, "power_limit_watts": 72.0}),
        ]
    ]  # fmt: skip
    fleet_report.flag(cards)
    assert len(cards[0]["flags"]) == len(flags)
    for found, wanted in zip(cards[0]["flags"], flags, strict=True):
        assert wanted in found
    assert [card["flags"] for card in cards[1:]] == [[], [], []]


def test_the_health_check_reads_the_card_while_it_is_loaded(tmp_path: Path) -> None:
    card = nvml_stub.write_state(tmp_path / "card.txt", clocks_event_reasons="0x9")
    programs = {
        "nvidia-smi": """case $3 in
            *=pci.bus_id) echo 00000000:18:00.0 ;;
            *=power.limit | *=power.default_limit) echo 'WARNING: corrupt'; echo 700.00 ;;
            *=ecc.errors.corrected.volatile.total) echo 3 ;;
            *=clocks.max.sm) echo 1980 ;;
            *) echo "Field \\"$3\\" is not a valid field to query."; exit 2 ;;
        esac""",
        "dmesg": "echo '[1.0] NVRM: Xid (PCI:0000:18:00): 79, GPU has fallen off the bus.'\n"
        "echo '[2.0] NVRM: Xid (PCI:0000:19:00): 48, pid=1, DBE'",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = nvml_stub.stub_environment(nvml_stub.build_nvml_stub(tmp_path), card)
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    code = (
        "import json, time; from benchmarking.hardware import card_health\n"
        "rates = iter([7e14, 5e14, 6e14])\n"
        "def measure():\n"
        "    time.sleep(0.4)\n"
        "    return {'copy_bytes_per_second': 4e12, 'matrix_operations_per_second': next(rates)}\n"
        f"print(json.dumps(card_health.look('{nvml_stub.GPU_UUID}', 1.0, measure)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=PROJECT_ROOT,
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert json.loads(done.stdout) == {
        "seconds": 1.0, "repeats": 3, "copy_bytes_per_second": 4e12,
        "matrix_operations_per_second": 6e14, "sm_clock_mhz": 1980, "power_draw_watts": 119.25,
        "temperature_celsius_max": 50, "throttle_reasons": ["hw_slowdown"],
        "pci_bus_id": "00000000:18:00.0", "power_limit_watts": 700.0,
        "power_default_limit_watts": 700.0, "sm_clock_max_mhz": 1980.0,
        "ecc_corrected_errors": 3.0, "ecc_uncorrected_errors": None, "xids": [79],
    }  # fmt: skip
