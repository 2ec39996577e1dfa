"""Stands in for every program that the speed table runs; needs no torch.

Under the name `card_rates.py` it answers with a card of 1 TB/s and 100 TFLOP/s, under
`work_count.py` with work whose step takes at least 0.001 s on that card, else it is a workload
that writes a result. SPEED_SCRIPT holds settings as JSON: `{"fail": ENGINE}` ends with a
complaint, `{"hang": ENGINE}` waits until it is told to end. Every command line is appended to the
file SPEED_CALLS.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

EPOCH_SECONDS = {"eager": 8.0, "graph": 2.0, "compile": 1.0}
BATCH_MS = {"eager": 8.0, "graph": 2.0, "compile": 1.0}


def value_of(flag: str, default: str) -> str:
    """Value behind the last occurrence of a flag."""
    if flag not in sys.argv:
        return default
    return sys.argv[len(sys.argv) - sys.argv[::-1].index(flag)]


def answer_as_workload() -> None:
    """Behave as told, then write a result file."""
    engine = value_of("--engine", "graph")
    told = json.loads(os.environ.get("SPEED_SCRIPT", "{}"))
    if told.get("fail") == engine:
        sys.exit(f"{Path(sys.argv[0]).name}: error: scripted | failure")
    if told.get("hang") == engine:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
        print("hanging", file=sys.stderr, flush=True)
        threading.Event().wait()
    is_first = value_of("--epochs", "2") == "1" or value_of("--num-batches", "9") == "1"
    figures = {"startup_seconds": 40.0 if is_first else 5.0}
    settings = {"engine": engine, "precision": value_of("--precision", "bf16"),
                "batch_size": int(value_of("--batch-size", "1"))}  # fmt: skip
    if "inference" in sys.argv[0]:
        figures["latency_median_ms"] = BATCH_MS[engine]
    else:
        # The first epoch is slower, and not to be counted.
        seconds = [99.0, EPOCH_SECONDS[engine]][-int(value_of("--epochs", "2")) :]
        figures["epochs"] = [{"epoch_seconds": value} for value in seconds]
        settings |= {"train_samples": 1280, "image_size": 32, "classes": ["a", "b"]}
    result = {
        "figures": figures, "settings": settings, "warnings": [],
        "identity": {"versions": {"torch": "scripted", "cuda": "13.0", "flask": None}},
    }  # fmt: skip
    folder = Path(value_of("--results-dir", "results"))
    (folder / "result.json").write_text(json.dumps(result))


def main() -> None:
    """Answer as the program whose name this file has."""
    with open(os.environ["SPEED_CALLS"], "a", encoding="utf-8") as calls:
        cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "-")
        calls.write(" ".join([Path(sys.argv[0]).name, *sys.argv[1:], f"cache={cache}"]) + "\n")
    name = Path(sys.argv[0]).name
    if name == "card_rates.py":
        print(json.dumps({"gpu_name": "Scripted", "copy_bytes_per_second": 1e12,
                          "matrix_operations_per_second": 1e14, "matrix_size": 8192}))  # fmt: skip
    elif name == "work_count.py":
        # 0.4 ms of operations, 0.5 ms of bytes, and 0.1 ms of state.
        print(json.dumps({
            "operators": [
                {"operator": "mm", "operations": 2e10, "bytes": 1e8, "count": 2},
                {"operator": "mm", "operations": 1e9, "bytes": 5e8, "count": 1},
            ],
            "operations": 4.1e10, "operator_bytes": 7e8, "state_bytes": 1e8, "parameters": 10,
        }))  # fmt: skip
    else:
        answer_as_workload()


if __name__ == "__main__":
    main()
