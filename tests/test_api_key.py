"""The server's optional API key: who gets in, who does not, and that it stays secret."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from conftest import PROJECT_ROOT
from server_process import SCRIPT, SMALL, ServerProcess, jpeg, running

from workloads.inference import api_key

KEY = "0123456789abcdef.secret"
LOAD_TEST = PROJECT_ROOT / "workloads" / "inference" / "load_test.py"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with a key."""
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(api_key.VARIABLE, KEY)  # for the server alone
            folder = tmp_path_factory.mktemp("locked")
            server = stack.enter_context(running(folder, "--workers", "1"))
        yield server


@pytest.mark.parametrize(
    ("header", "admitted"),
    [
        (f"Bearer {KEY}", True),
        (f"bearer  {KEY} ", True),
        ("", False),
        (KEY, False),
        ("Bearer", False),
        (f"Bearer {KEY}x", False),
        (f"Bearer {KEY[:-1]}", False),
        (f"Basic {KEY}", False),
        ("Bearer ÿ", False),
    ],
)
def test_only_the_whole_key_as_a_bearer_token_is_admitted(header: str, admitted: bool) -> None:
    assert api_key.admits(KEY, header) is admitted
    assert api_key.admits(None, header)


@pytest.mark.parametrize("text", ["short", "with a blank in it", "line\r\nEvil: 1", "x" * 600, ""])
def test_a_key_that_no_header_can_carry_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as refusal:
        api_key._key(text)
    assert not text or text not in str(refusal.value)


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer 0123456789abcdef.wrong"}])
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/predict"), ("POST", "/batch_predict"), ("GET", "/stats"), ("GET", "/metrics"),
     ("GET", "/nothing"), ("OPTIONS", "/predict"), ("DELETE", "/stats"), ("BREW", "/stats")],
)  # fmt: skip
def test_without_the_key_every_path_but_health_is_a_401(
    locked: ServerProcess, method: str, path: str, headers: dict
) -> None:
    answer = requests.request(method, locked.url + path, headers=headers, timeout=10)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert "API key" in answer.json()["error"]
    assert requests.get(f"{locked.url}/health", timeout=10).status_code == 200


def test_with_the_key_pictures_are_classified(locked: ServerProcess) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = requests.post(f"{locked.url}/predict", data=jpeg(), headers=headers, timeout=30)
    assert answer.status_code == 200
    assert len(answer.json()["predictions"]) == 5


def test_with_the_key_an_unknown_method_is_told_what_the_path_takes(locked: ServerProcess) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = requests.request("BREW", f"{locked.url}/stats", headers=headers, timeout=10)
    assert answer.status_code == 405 and "GET" in answer.headers["Allow"]


def load_test(server: ServerProcess, folder: Path, *arguments: str, **environment: str):
    return subprocess.run(
        [sys.executable, str(LOAD_TEST), "--server", server.url, "--clients", "1", "--duration",
         "0.5", "--no-charts", "--results-dir", str(folder), *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("way", ["flag", "environment"])
def test_the_load_test_shows_its_key_to_the_server_and_to_nobody_else(
    locked: ServerProcess, tmp_path: Path, way: str
) -> None:
    if way == "flag":
        done = load_test(locked, tmp_path, "--api-key", KEY)
    else:
        done = load_test(locked, tmp_path, **{api_key.VARIABLE: KEY})
    assert done.returncode == 0, done.stderr
    (result,) = tmp_path.glob("*.json")
    text = result.read_text()
    assert KEY not in text + done.stdout + done.stderr
    assert ("(hidden)" in text) == (way == "flag")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((), "wants an API key"), (("--api-key", "another-key-0"), "does not take this API key")],
)
def test_a_load_test_with_no_or_another_key_is_told_so_at_once(
    locked: ServerProcess, tmp_path: Path, arguments: tuple, words: str
) -> None:
    done = load_test(locked, tmp_path, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "INFERENCE_API_KEY" in done.stderr
    assert "another-key-0" not in done.stderr


def test_a_bad_key_in_the_environment_is_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *SMALL, "--results-dir", str(tmp_path)],
        env={**os.environ, api_key.VARIABLE: "too bad"}, capture_output=True, text=True,
        timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "INFERENCE_API_KEY: a key has 8 to 512" in done.stderr
    assert "too bad" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
