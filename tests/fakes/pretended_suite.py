"""Stands in for `benchmarking/suite/session.py` and `benchmarking/analyze_results.py` in a copy.

Standard library alone. In the folder of FAKE_SUITE_STATE:

calls.jsonl   one JSON object a call of suite or analysis: program, arguments, the pretended GPU at
              that moment; and an object {"program", "signal"} for each signal that a waiting suite
              is told of, the first being 1
rules.json    by run id (or "analysis"): {"exit": status}, {"wait": true} to run until a signal
              comes, {"deaf": true} to run on after the first, {"slow_to_end": seconds} to end that
              much later and record the pretended GPU then, {"kill_driver": true} to send SIGKILL to
              the driver, {"crash": name} to raise that exception, {"words": sentence} to end with
              that, {"files": {name: text}} for what the analysis writes, {"outcome": word} and
              {"session": name} for the run's manifest
"""

from __future__ import annotations

import builtins
import json
import marshal
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(os.environ["FAKE_SUITE_STATE"])
SUITE, ANALYSIS = "benchmark_suite.py", "analyze_results.py"


@dataclass(frozen=True)
class SessionResult:
    """As the real one."""

    exit_code: int
    reason: str | None
    folder: Path | None


class StopSignal:
    """As the real one, but every signal counts."""

    count = 0

    def request(self) -> None:
        """Note that somebody asked to stop."""
        self.count += 1


def run_suite(words: Sequence[str], stop: StopSignal, *, from_driver: bool) -> SessionResult:
    """Leave a run folder; wait for a signal where the rule says so."""
    assert from_driver
    record({"program": SUITE, "arguments": list(words), "gpu": pretended_gpu()})
    if "--resume" in words:
        folder = Path(value_of(words, "--resume"))
    else:
        folder = Path(value_of(words, "--results-dir")) / value_of(words, "--run-id")
    rule = rule_of(folder.name)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {name: rule[name] for name in ("outcome", "session") if name in rule}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    if rule.get("kill_driver"):
        os.kill(os.getpid(), signal.SIGKILL)
    if "crash" in rule:
        raise getattr(builtins, rule["crash"])("the suite has a fault")
    if rule.get("wait"):
        wait_for_stop(folder.name, rule, stop)
        return SessionResult(130, None, folder)
    return SessionResult(rule.get("exit", 0), rule.get("words"), folder)


def estimate_repeat_seconds(words: Sequence[str]) -> float:
    """As the real one: a minute."""
    return 60.0


def wait_for_stop(run_id: str, rule: dict, stop: StopSignal) -> None:
    """Run on until as many signals came as it takes."""
    record({"program": SUITE, "waiting": run_id})
    deadline = time.monotonic() + 30
    told = 0
    while told < (2 if rule.get("deaf") else 1) and time.monotonic() < deadline:
        time.sleep(0.02)
        while told < stop.count:
            told += 1
            record({"program": SUITE, "signal": told})
    if "slow_to_end" in rule:
        time.sleep(rule["slow_to_end"])
        record({"program": SUITE, "ended": run_id, "gpu": pretended_gpu()})


def analyze(arguments: list[str]) -> int:
    """Leave the files of the rule."""
    record({"program": ANALYSIS, "arguments": arguments, "gpu": pretended_gpu()})
    rule = rule_of("analysis")
    for name, text in rule.get("files", {}).items():
        (Path(value_of(arguments, "--results-dir")) / name).write_text(text)
    print("report", flush=True)  # as the real one; fails where nobody can read it
    if "words" in rule:
        print(f"{ANALYSIS}: error: {rule['words']}", file=sys.stderr)
    return rule.get("exit", 0)


def value_of(arguments: Sequence[str], flag: str) -> str:
    """The word after a flag."""
    return arguments[arguments.index(flag) + 1]


def rule_of(name: str) -> dict:
    """What the test wants of this run."""
    path = FOLDER / "rules.json"
    return json.loads(path.read_text()).get(name, {}) if path.exists() else {}


def pretended_gpu() -> dict | None:
    """What the fake driver would say now, as far as modes go."""
    path = Path(os.environ.get("FAKE_GPU_STATE", "/nonexistent")) / "machine"
    if not path.exists():
        return None
    machine = marshal.loads(path.read_bytes())
    if not machine["gpus"]:
        return None
    gpu = machine["gpus"][0]
    return {"daemons": len(machine["mps"]), "mig": gpu["mig_current"],
            "instances": len(gpu["instances"]), "compute_mode": gpu["compute_mode"],
            "timeslice": gpu["timeslice"]}  # fmt: skip


def record(entry: dict) -> None:
    """Append one line to calls.jsonl."""
    with (FOLDER / "calls.jsonl").open("a") as stream:
        stream.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    sys.exit(analyze(sys.argv[1:]))
