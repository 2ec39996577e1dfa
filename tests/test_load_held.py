"""A slice of the long load on the server (`load_held.py`)."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("load_held.py")


@pytest.mark.timeout(900)  # 2,000 pictures to decode, on however busy a machine
def test_a_slice_of_the_load_loses_nothing_and_leaves_nothing_open(tmp_path):
    file = tmp_path / "figures.json"
    done = subprocess.run(
        (sys.executable, str(PROGRAM), "--requests", "2000", "--round-seconds", "1",
         "--lead-in-seconds", "1", "--stub", "--device", "cpu", "--json", str(file)),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    figures = json.loads(file.read_text())
    # So short a load on a busy machine says nothing about memory and p99.
    broken = [name for name, kept in figures["bounds"].items() if not kept]
    assert [name for name in broken if not name.startswith(("memory", "p99"))] == [], done.stdout
    assert figures["requests"] == 2000
    assert figures["lead_in_requests"] == math.ceil(figures["offered_per_second"])
    assert figures["lead_in_p99_ms"] > 0
    assert 0 < figures["hostile_requests"] < figures["chaos_requests"]
    assert figures["chaos_requests"] > 10 and figures["slow_senders"] >= 6
    assert done.stdout.splitlines()[-1].startswith(("2000 requests next", "kept: "))
