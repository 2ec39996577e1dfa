"""The server's description of itself is true: by its routes, and by generated requests."""

from __future__ import annotations

import contextlib
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from server_process import ServerProcess, jpeg, running

from workloads.inference import api_key

KEY = "0123456789abcdef.described"
SCHEMATHESIS = Path(sysconfig.get_path("scripts")) / "schemathesis"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose largest requests are still small."""
    folder = tmp_path_factory.mktemp("described")
    with running(folder, "--max-batch-predict", "4", "--max-body-mib", "1") as process:
        yield process


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The same with an API key and front ends of its own."""
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(api_key.VARIABLE, KEY)  # for the server alone
            flags = ("--max-batch-predict", "4", "--max-body-mib", "1", "--frontends", "2")
            folder = tmp_path_factory.mktemp("locked")
            server = stack.enter_context(running(folder, *flags))
        yield server


def described(server: ServerProcess) -> dict:
    return requests.get(f"{server.url}/openapi.json", timeout=10).json()


def test_every_described_path_is_there_with_its_methods_and_no_other(
    server: ServerProcess,
) -> None:
    for path, operations in described(server)["paths"].items():
        # 503 is an overload or a shutdown; nothing else is the server's fault.
        (operation,) = operations.values()
        statuses = set(operation["responses"])
        assert {status for status in statuses if status >= "5"} == {"503"}
        assert {"200", "400", "405", "408"} <= statuses
        allowed = requests.options(server.url + path, timeout=10)
        assert allowed.status_code == 200
        assert {method.upper() for method in operations} == set(
            allowed.headers["Allow"].split(", ")
        )
    for path in ("/docs", "/redoc", "/openapi.yaml", "/v1/predict"):
        assert path not in described(server)["paths"]
        assert requests.get(server.url + path, timeout=10).status_code == 404


def test_limits_are_the_servers_own(server: ServerProcess) -> None:
    paths = described(server)["paths"]
    size = paths["/batch_predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert size["properties"]["batch_size"]["maximum"] == 4
    assert size["properties"]["batch_size"]["default"] == 4
    assert server.batch_predict({}).json()["batch_size"] == 4
    assert "at most 1048576 bytes" in paths["/predict"]["post"]["requestBody"]["description"]
    assert described(server)["security"] == []


@pytest.mark.parametrize(
    "flags",
    [
        # Random bytes are no picture, so what the schema allows is still refused, with a 400.
        ("--exclude-checks", "positive_data_acceptance"),
        ("--exclude-path", "/predict"),
    ],
)
def test_generated_requests_find_nothing_that_is_not_described(
    server: ServerProcess, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    explore(server, tmp_path, *flags)
    assert server.predict(jpeg()).status_code == 200


def test_a_key_and_front_ends_change_nothing_of_what_is_described(
    locked: ServerProcess, tmp_path: Path
) -> None:
    header = {"Authorization": f"Bearer {KEY}"}
    # Its own checks of the key leave it out and change it, and want a 401.
    explore(locked, tmp_path, "--header", f"Authorization: Bearer {KEY}",
            "--exclude-checks", "positive_data_acceptance")  # fmt: skip
    answer = requests.post(f"{locked.url}/predict", data=jpeg(), headers=header, timeout=30)
    assert answer.status_code == 200
    assert "Traceback" not in locked.log.read_text()
    assert KEY not in locked.log.read_text()


def explore(server: ServerProcess, folder: Path, *flags: str) -> None:
    """Let Schemathesis ask everything; fail with its words where an answer is not described."""
    done = subprocess.run(
        [str(SCHEMATHESIS), "run", f"{server.url}/openapi.json", "--phases", "coverage,fuzzing",
         "--max-examples", "40", "--seed", "1", "--no-color", *flags],
        cwd=folder, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "Tested: " in done.stdout
