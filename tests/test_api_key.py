"""The server's optional API key: who gets in, who does not, and that it stays secret."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import requests
from load_runner import load_test
from server_process import SMALL, ServerProcess, jpeg, running

from workloads.inference.api_key import VARIABLE

KEY = "0123456789abcdef.secret"
WRONG = "0123456789abcdef.wrong"


@pytest.fixture(scope="module")
def locked(tmp_path_factory) -> Iterator[ServerProcess]:
    """A server with a key."""
    with running(tmp_path_factory.mktemp("locked"), "--workers", "1", **{VARIABLE: KEY}) as server:
        yield server


def ask(server: ServerProcess, method: str, path: str, header: str = "") -> requests.Response:
    return requests.request(
        method, server.url + path, headers={"Authorization": header} if header else {}, timeout=10,
        data=jpeg() if path == "/predict" and method == "POST" else None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("header", "status"),
    [(f"Bearer {KEY}", 200), (f"bearer  {KEY} ", 200), ("", 401), (KEY, 401), ("Bearer", 401),
     (f"Bearer {KEY}x", 401), (f"Bearer {WRONG}", 401), (f"Basic {KEY}", 401),
     ("Bearer ÿ", 401)],
)  # fmt: skip
def test_only_the_whole_key_as_a_bearer_token_is_admitted(locked, header, status):
    answer = ask(locked, "POST", "/predict", header.encode("latin-1"))
    assert answer.status_code == status
    assert status == 401 or len(answer.json()["predictions"]) == 5


def test_without_the_key_every_path_but_the_page_and_health_is_a_401(locked):
    for method, path in (
        ("POST", "/predict"), ("POST", "/batch_predict"), ("GET", "/stats"), ("GET", "/metrics"),
        ("GET", "/nothing"), ("OPTIONS", "/predict"), ("BREW", "/stats"),
    ):  # fmt: skip
        answer = ask(locked, method, path)
        assert answer.status_code == 401, path
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert "API key" in answer.json()["error"]
    assert ask(locked, "GET", "/health").status_code == ask(locked, "GET", "/").status_code == 200
    told = ask(locked, "BREW", "/stats", f"Bearer {KEY}")
    assert told.status_code == 405 and "GET" in told.headers["Allow"]


@pytest.mark.parametrize("way", ["flag", "environment"])
def test_the_load_test_shows_its_key_to_the_server_and_to_nobody_else(locked, tmp_path, way):
    flags = ("--api-key", KEY) if way == "flag" else ()
    environment = {**os.environ, **({} if flags else {VARIABLE: KEY})}
    short = ("--clients", "1", "--duration", "0.5", "--no-charts")
    done = load_test(tmp_path, locked.url, *short, *flags, env=environment)
    assert done.returncode == 0, done.stderr
    (result,) = tmp_path.glob("*.json")
    assert KEY not in result.read_text() + done.stdout + done.stderr
    assert ("(hidden)" in result.read_text()) == (way == "flag")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((), "wants an API key"), (("--api-key", "another-key-0"), "does not take this API key")],
)
def test_a_load_test_with_no_or_another_key_is_told_so_at_once(locked, tmp_path, arguments, words):
    done = load_test(tmp_path, locked.url, *arguments)
    assert done.returncode == 2
    assert words in done.stderr and VARIABLE in done.stderr
    assert "another-key-0" not in done.stderr


@pytest.mark.parametrize("key", ["short", "with a blank in it", "line\r\nEvil: 1", "x" * 600])
def test_a_key_that_no_header_can_carry_is_one_sentence_without_it(here, monkeypatch, key):
    monkeypatch.setenv(VARIABLE, key)
    done = here.run("workloads/inference/inference_server.py", *SMALL)
    assert done.returncode == 2
    assert f"{VARIABLE}: a key has 8 to 512" in done.stderr and key not in done.stderr
    assert len(done.stderr.splitlines()) == 1
