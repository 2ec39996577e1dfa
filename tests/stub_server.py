"""The inference server with a stub model: everything but the device, and no torch.

    python3 tests/stub_server.py --port 0 --host 127.0.0.1      # the flags of inference_server.py
    python3 tests/stub_server.py serving --rate 20              # the flags of serving_client.py

The class of a picture is the red value of its first pixel, so an answer shows whose picture it is
of. In the environment: STUB_LOAD_SECONDS and STUB_BATCH_SECONDS, how long loading and a batch take
(0); STUB_FAIL, fail at a batch whose first picture has that class; STUB_FAIL_AFTER, fail after so
many batches.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from workloads.inference import inference_server, serving_client


class StubModel:
    """Answers with the first pixels of its pictures."""

    weights = SimpleNamespace(
        kind="random", source="stub", class_names=[f"class {n}" for n in range(256)]
    )

    _batches_left = int(os.environ.get("STUB_FAIL_AFTER", -1))

    def warm_up(self) -> None:
        pass

    def start(self, pictures: list[np.ndarray]) -> np.ndarray:
        first = np.concatenate([array[:, 0, 0, 0] for array in pictures]).astype(np.float32)
        self._batches_left -= 1
        if str(int(first[0])) == os.environ.get("STUB_FAIL") or self._batches_left == -1:
            raise RuntimeError("the stub model fails")
        return first

    def finish(self, first: np.ndarray) -> np.ndarray:
        time.sleep(float(os.environ.get("STUB_BATCH_SECONDS", 0)))
        probabilities = np.tile(np.float32([0.5, 0.2, 0.1, 0.05, 0.01]), (len(first), 1))
        classes = (first[:, None] + np.arange(5, dtype=np.float32)) % 256
        return np.concatenate([probabilities, classes], axis=1)


class Stubbed:
    """Takes the place of a server's model and device."""

    def _load_model(self) -> None:
        time.sleep(float(os.environ.get("STUB_LOAD_SECONDS", 0)))
        self._classifier = StubModel()
        self._facts = {"device": "cpu", "gpu_name": None, "engine": "eager", "precision": "fp32",
                       "model": self.args.model, "weights": "random"}  # fmt: skip

    def identity(self) -> dict:
        return {"pid": os.getpid(), "port": self._port, "gpu_name": None, "gpu_uuid": None,
                "workers": self.args.workers, **self._facts}  # fmt: skip


class StubServer(Stubbed, inference_server.InferenceServer):
    """The real server, whose model and device are stubs."""


class StubService(Stubbed, serving_client.ServingClient):
    """The real service, whose model and device are stubs."""


if __name__ == "__main__":
    if sys.argv[1:2] == ["serving"]:
        del sys.argv[1]
        inference_server.serve(StubService(serving_client.parse_arguments()))
    inference_server.serve(StubServer(inference_server.parse_arguments()))
