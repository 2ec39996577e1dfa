#!/usr/bin/env python3
"""Stands in, by its name, for what a unit of a fleet runs: run_experiments.sh, card_health.py and
gpu_status.sh. Standard library alone.

In the folder of FAKE_FLEET: calls.jsonl has one object a call, {"program", "words", "time"} and, as
"token", the variable TOKEN, and one where a driver ends; rules.json says by the card's UUID
{"slow": true} for figures that are a tenth lower, {"refuse": sentence} to end with 4, {"wait":
true} to enable a mode, which is the file mode-UUID with its pid, and to wait for SIGTERM unless the
run is resumed, {"meet": count} to wait for so many drivers at once; comparison.json is the report
that each card gets.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["FAKE_FLEET"])
WAIT_SECONDS = 60


def drive(words: list[str]) -> int:
    """As the driver: refuse, wait, or leave a report."""
    if "--dry-run" in words:
        if "--nonsense" in words:
            print("error: unknown option: --nonsense", file=sys.stderr)
        return 2 * ("--nonsense" in words)
    is_resumed = words[0] == "--resume"
    folder = Path(words[1] if is_resumed else words[words.index("--output") + 1])
    rule = rule_of(folder.name)
    if "refuse" in rule:
        print(f"error: {rule['refuse']}", file=sys.stderr)
        return 4
    folder.mkdir(exist_ok=is_resumed)
    (folder / "arguments.nul").touch()
    print("Phase 1: baseline: ok", file=sys.stderr, flush=True)
    if rule.get("wait") and not is_resumed:
        wait_for_term(folder.name)
        return 143
    if "meet" in rule:
        meet(folder.name, rule["meet"])
    report = json.loads((FOLDER / "comparison.json").read_text())
    for group in report["sections"][0]["groups"]:
        for name in ("mean", "low", "high"):
            group["stp"][name] *= 0.9 if rule.get("slow") else 1
    (folder / "comparison.json").write_text(json.dumps(report))
    return 0


def wait_for_term(uuid: str) -> None:
    """Have a mode in force until somebody asks to stop, and undo it, which takes a while."""
    mode = FOLDER / f"mode-{uuid}"
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    partial = mode.with_suffix(".new")
    partial.write_text(str(os.getpid()))
    partial.replace(mode)
    end = time.monotonic() + WAIT_SECONDS
    while not asked and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.5)
    if asked:
        mode.unlink()


def meet(uuid: str, count: int) -> None:
    """Wait for other drivers; fail where they do not come."""
    (FOLDER / f"meet-{uuid}").touch()
    end = time.monotonic() + WAIT_SECONDS
    while len(list(FOLDER.glob("meet-*"))) < count:
        assert time.monotonic() < end, "nobody came"
        time.sleep(0.02)


def look(words: list[str]) -> int:
    """As the health check: a card like any other, or a slow one."""
    factor = 0.9 if rule_of(words[words.index("--gpu") + 1]).get("slow") else 1
    rates = {"copy_bytes_per_second": 4e12 * factor, "matrix_operations_per_second": 7e14}
    print(json.dumps({**rates, "throttle_reasons": [], "xids": None, "power_limit_watts": 700.0}))
    return 0


def rule_of(uuid: str) -> dict:
    """What the test wants of a card."""
    return json.loads((FOLDER / "rules.json").read_text()).get(uuid, {})


def record(**entry: object) -> None:
    """Append one line to calls.jsonl."""
    with (FOLDER / "calls.jsonl").open("a") as stream:
        stream.write(json.dumps({**entry, "time": time.monotonic()}) + "\n")


def main() -> int:
    """Do what the program of this name would do; return its exit code."""
    program, words = Path(sys.argv[0]).name, sys.argv[1:]
    record(program=program, words=words, token=os.environ.get("TOKEN"))
    work = {"run_experiments.sh": drive, "card_health.py": look}.get(program, lambda words: 0)
    code = work(words)
    if program == "run_experiments.sh" and "--dry-run" not in words:
        record(program=program, words=words, exit_code=code)
    return code


if __name__ == "__main__":
    sys.exit(main())
