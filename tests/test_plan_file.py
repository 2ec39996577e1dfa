"""Plan files: what they make of a user's list, and every mistake in one go."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from benchmarking.cli import PROJECT_ROOT
from benchmarking.planning.job_lines import plan_of_jobs
from benchmarking.planning.plan import PlannedClient, clients_of
from benchmarking.planning.plan_entries import KEYS
from benchmarking.planning.plan_file import (
    PlanFile,
    PlanFileError,
    parse_plan,
    read_plan_file,
    text_hash,
)
from benchmarking.planning.redaction import (
    hidden_in_command_line,
    looks_secret,
    secrets_of_words,
)
from benchmarking.planning.request import Request
from benchmarking.planning.workloads import SIZE_GUIDE
from benchmarking.suite.session import run_suite

COMMAND = '[[client]]\ncommand = "true"\n'
# Its apostrophe ends in a comment; the secrets stand in quotes, behind a flag and in a header.
SHELL_LINE = (
    """API_TOKEN="abc-123" curl --api-key 'def-456' -H "Authorization: Bearer ghi-789" # it's"""
)
SHELL_SECRETS = {"abc-123": "API_TOKEN", "def-456": "API_KEY", "ghi-789": "BEARER"}
BERT = '[[client]]\nworkload = "bert_training"\n'


def read(folder: Path, text: str) -> PlanFile:
    path = folder / "my jobs.toml"
    path.write_text(text)
    return read_plan_file(path)


def mistakes(folder: Path, text: str) -> list[str]:
    with pytest.raises(PlanFileError) as caught:
        read(folder, text)
    return caught.value.mistakes


def clients(plan: PlanFile, count: int, **options: str) -> tuple[PlannedClient, ...]:
    return clients_of(Request(plan_file=plan, **options), count, SIZE_GUIDE)


def test_a_workload_of_ours_gets_the_plans_flags_last(tmp_path: Path) -> None:
    text = '[[client]]\nworkload = "resnet_training"\narguments = ["--batch-size", "64"]\n'
    plan = read(tmp_path, text)
    (client,) = clients(plan, 1, engine="graph")
    assert client.command[-2:] == ("--batch-size", "64")
    assert "--epochs 5" in " ".join(client.command)
    assert client.job_key.endswith("--batch-size 64")
    assert "graph" not in client.job_key
    assert (plan.name, client.label) == ("my-jobs", "ResNet50 training")


def test_a_command_is_run_in_its_folder_without_a_shell_unless_asked_for(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    plan = read(
        tmp_path,
        '[[client]]\ncommand = ["echo", "a b"]\nworking_directory = "sub"\n'
        '[[client]]\ncommand = "true && true"\nshell = true\nlatency = true\n'
        '[[client]]\ncommand = "true # it\'s fine"\nshell = true\n',
    )
    plain, by_shell, commented = clients(plan, 3)
    words = dict(zip(plain.command[2::2], plain.command[3::2], strict=True))
    assert words == {"--command": "echo 'a b'", "--working-directory": str(tmp_path / "sub")}
    assert by_shell.command[-2:] == ("--shell", "--latency")
    assert "true # it's fine" in commented.command
    unreadable = read(tmp_path, f"[[client]]\nshell = true\ncommand = {json.dumps(SHELL_LINE)}\n")
    assert unreadable.secrets.names == SHELL_SECRETS
    kept = " ".join(hidden_in_command_line(["--job", SHELL_LINE]))
    assert not any(secret in text for secret in SHELL_SECRETS for text in (kept, unreadable.text))
    assert plan.has_latency


def test_another_environment_is_another_job_and_limits_of_mps_are_not(tmp_path: Path) -> None:
    one = f'{COMMAND}environment = {{ SIZE = "1" }}\n'
    knobs = (
        'knobs = { mps_percentage = 25, mps_memory_limit = "8G", mps_priority = "below-normal" }\n'
    )
    plan = read(tmp_path, f"{one}{one.replace('1', '2')}{BERT}{BERT}{knobs}")
    first, second, plain, limited = clients(plan, 4)
    assert first.environment == {"SIZE": "1"}
    assert first.job_key != second.job_key
    assert limited.environment == {
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "25",
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=8G",
        "CUDA_MPS_CLIENT_PRIORITY": "1",
    }
    assert limited.job_key == plain.job_key


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "client: list at least one client under the heading [[client]]"),
        ("client = 3", "client: list at least one client"),
        (f'name = "a/b"\n{COMMAND}', "name: use letters"),
        ("[[client]]", "client 1: workload, command: gives neither"),
        (f'{BERT}command = "true"', "gives both"),
        ('[[client]]\nworkload = "bert"', "there is no workload 'bert'; there are resnet_training"),
        ("[[client]]\nworkload = 3", "workload: is 3, but needs one of"),
        (f"{COMMAND}cuont = 2", "cuont: there is no such key here; there are"),
        (f'{COMMAND}arguments = ["x"]', "arguments: there is no such key"),
        (f"{COMMAND}count = 0", "count: is 0, but needs a whole number"),
        (f"{COMMAND}count = 100000000", "count: is 100000000, but needs a whole number"),
        (f'name = "{"a" * 101}"\n{COMMAND}', "name: use letters"),
        (f'{COMMAND}label = "a\\u001b[31m"', "label: leave line breaks and control characters"),
        ('[[client]]\ncommand = ["true", "\\u0000"]', "command: holds a NUL"),
        (f'{COMMAND}environment = {{ A = "\\u0000" }}', "environment.A: holds a NUL"),
        (f"a = {'[' * 20_000}", "is not TOML (maximum recursion depth"),
        ("#" * (1 << 20) + COMMAND, "is too long for a plan"),
        (f"{COMMAND}count = true", "count: is True, but needs a whole number"),
        (f"{BERT}arguments = [3]", 'put each in quotes, as "3"'),
        (f'{BERT}arguments = ["--device=cpu"]', "leave --device out"),
        ('[[client]]\ncommand = "./no.sh"', "there is no program './no.sh' that can be run in"),
        ('[[client]]\ncommand = "no-such-program"', "there is no program 'no-such-program'"),
        ("[[client]]\ncommand = \"echo 'a\"", "close the quotes"),
        ("[[client]]\ncommand = []", "command: is empty"),
        ("[[client]]\ncommand = ' '", "command: is empty"),
        ('[[client]]\ncommand = ["true"]\nshell = true', "give one text, not a list"),
        (f'{COMMAND}shell = "yes"', "shell: is 'yes', but needs true or false"),
        (f'{COMMAND}working_directory = "no"', "there is no folder"),
        (f"{COMMAND}environment = {{ A = 1 }}", "environment.A: needs a text"),
        (f'{COMMAND}environment = {{ CUDA_VISIBLE_DEVICES = "1" }}', "belongs to the sharing mode"),
        (f"{COMMAND}knobs = {{ mps_percentage = 120 }}",
         "knobs.mps_percentage: '120' is not a percentage"),
        (f'{COMMAND}knobs = {{ mps_memory_limit = "lots" }}', "512M or 8G"),
        (f"{COMMAND}knobs = {{ percentage = 5 }}", "there is no such knob"),
        ("[[client]\n", "is not TOML"),
        *((f"[[client]]\ncommand = '{line}'\n", f"command: {sign} is read by a shell alone")
          for line, sign in (("true && true", "&&"), ("true | wc", "|"), ("true > out", ">"),
                             ("true 2>&1", "2>&1"), ("ls; true", ";"), ("true &", "&"),
                             ("cat <in", "<in"))),
        (f'{COMMAND}environment = {{ PATH = "/nowhere" }}', "there is no program 'true'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_with_file_key_and_fix(
    tmp_path: Path, text: str, words: str
) -> None:
    (found,) = mistakes(tmp_path, text)
    assert words in found
    assert found.startswith(str(tmp_path / "my jobs.toml"))
    assert "\n" not in found


def test_a_program_is_looked_for_where_its_job_will_find_it(tmp_path: Path) -> None:
    (tmp_path / "mine").symlink_to(sys.executable)
    variables = f"environment = {{ PATH = '{tmp_path}' }}"
    line = json.dumps("""mine -c "1;2" '|' a\\; 1<2""")
    lines = f"{variables}\ncommand = {line}"
    assert read(tmp_path, f"[[client]]\n{lines}\n").entries[0].label == "mine"


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    found = mistakes(tmp_path, f'mane = "x"\n{COMMAND}count = "2"\n[[client]]\nworkload = "bert"\n')
    assert [sentence.split(": ")[1] for sentence in found] == ["mane", "client 1", "client 2"]
    with pytest.raises(PlanFileError, match=r"cannot be read .*: name a file"):
        read_plan_file(tmp_path / "no.toml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ('["--bach-size", "3"]', "unrecognized arguments: --bach-size 3"),
        ('["--epochs", "x"]', "argument --epochs: 'x' is not a whole number"),
    ],
)
def test_a_dry_run_lets_our_workloads_look_at_their_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, words: str
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"{BERT}arguments = {arguments}\n")
    words_of_plan = ["--device", "cpu", "--plan", str(path), "--dry-run"]
    assert run_suite(words_of_plan, from_driver=True).exit_code == 2
    said = capsys.readouterr().err
    assert f"BERT fine-tuning: bert_training.py: error: {words}" in said


def test_jobs_of_the_command_line_are_a_plan_that_is_named_after_them(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    job = f"{sys.executable} train.py --epochs 1"
    plan = plan_of_jobs([job, job, f"{sys.executable} train.py", "sleep 1"], tmp_path)
    assert plan.name == "train-train-train-sleep"
    members = clients(plan, 5)
    assert [client.label for client in members] == [
        "train.py", "train.py", "train.py (2)", "sleep", "train.py"]  # fmt: skip
    assert len({client.job_key for client in members}) == 3
    with pytest.raises(PlanFileError, match=r"--job: client 1: command: there is no file 'no\.py'"):
        plan_of_jobs([f"{sys.executable} no.py"], tmp_path)
    with pytest.raises(PlanFileError, match="--job: holds a name that is no UTF-8"):
        plan_of_jobs(["true caf\udce9"], tmp_path)
    assert plan_of_jobs(["true 😀"], tmp_path).entries[0].command == "true 😀"


def test_the_example_shows_all_keys() -> None:
    text = (PROJECT_ROOT / "examples/plans/own-commands.toml").read_text()
    shown = set(re.findall(r"^(?:# )?(\w+) = ", text, re.MULTILINE))
    assert shown == set(KEYS)


def test_a_plan_may_begin_as_editors_of_windows_have_it(tmp_path: Path) -> None:
    assert len(read(tmp_path, f"\ufeff{COMMAND}").entries) == 1


# --- secrets ----------------------------------------------------------------------------------

SECRET = "hunter2-hunter2"
WITH_SECRETS = f"""
[[client]]
command = "sleep 1"
environment = {{ HF_TOKEN = "{SECRET}", SIZE = "large-model" }}
[[client]]
workload = "bert_training"
arguments = ["--api-key", "{SECRET}-2", "--tokenizer=plain-words"]
"""


def test_secrets_are_named_in_what_is_recorded_and_given_to_the_job(tmp_path: Path) -> None:
    plan = read(tmp_path, WITH_SECRETS)
    first, second = clients(plan, 2)
    assert first.environment["HF_TOKEN"] == SECRET
    assert f"{SECRET}-2" in second.command
    recorded = str(plan.secrets.hide([dataclasses.asdict(client) for client in (first, second)]))
    for text in (plan.text, recorded, first.job_key, second.job_key):
        assert SECRET not in text
    assert "hidden:HF_TOKEN:" in plan.text
    assert "large-model" in first.job_key
    assert "plain-words" in recorded


def test_a_kept_plan_gets_its_secrets_back_from_the_environment_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = read(tmp_path, WITH_SECRETS)
    monkeypatch.setenv("API_KEY", f"{SECRET}-2")
    for value in (None, "another value"):
        if value:
            monkeypatch.setenv("HF_TOKEN", value)
        with pytest.raises(PlanFileError, match="HF_TOKEN is not kept with the run: set the var"):
            parse_plan(plan.text, "plan.toml", tmp_path)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    again = parse_plan(plan.text, "plan.toml", tmp_path)
    assert again.entries == plan.entries
    assert text_hash(again.text) == text_hash(plan.text)


def test_an_inherited_variable_is_recorded_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f'{COMMAND}inherit = ["MY_LICENSE"]\n'
    monkeypatch.delenv("MY_LICENSE", raising=False)
    assert "inherit.MY_LICENSE: is not set where this was started" in mistakes(tmp_path, text)[0]
    monkeypatch.setenv("MY_LICENSE", "1")
    plan = read(tmp_path, text)
    (client,) = clients(plan, 1)
    assert client.environment == {"MY_LICENSE": "1"}
    assert client.job_key.endswith(" MY_LICENSE")
    recorded = plan.secrets.hide(dataclasses.asdict(client))
    assert recorded["environment"] == {"MY_LICENSE": "inherited:MY_LICENSE"}


def test_a_label_may_hold_any_script_and_its_blanks(tmp_path: Path) -> None:
    label = "画像\u3000分類 25\u00a0%"
    assert clients(read(tmp_path, f'{COMMAND}label = "{label}"\n'), 1)[0].label == label


def test_other_work_of_one_label_is_told_apart_from_copies(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("")
    tables = (
        'command = ["python3", "a.py"]', 'command = ["python3", "-c", "0"]',
        'command = ["python3", "-c", "1"]', f"{BERT[11:]}knobs = {{ mps_percentage = 50 }}",
        BERT[11:], f'{BERT[11:]}arguments = ["--batch-size", "1"]',
    )  # fmt: skip
    plan = read(tmp_path, "".join(f"[[client]]\n{table}\n" for table in tables))
    assert [client.label for client in clients(plan, 7)] == [
        "a.py", "python3", "python3 (2)", "BERT fine-tuning", "BERT fine-tuning",
        "BERT fine-tuning (2)", "a.py",
    ]  # fmt: skip


def test_a_secret_is_told_by_its_name() -> None:
    secret = ("HF_TOKEN", "--api-key", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY", "--token",
              "PGPASSWORD", "MYSQL_PWD", "KAGGLE_KEY", "GH_PAT", "DB_PASS")  # fmt: skip
    plain = ("TOKENIZERS_PARALLELISM", "--max-tokens", "SORT_KEY", "DATA", "PWD", "--sort-key",
             "--pass", "--two-pass", "--pat")  # fmt: skip
    assert [name for name in (*secret, *plain) if looks_secret(name)] == list(secret)


@pytest.mark.parametrize(
    "line", ["--title 'Basic training'", "--use-auth --input images", "--no-auth data/images"]
)
def test_what_is_no_secret_is_shown(line: str) -> None:
    words = ["python3", *shlex.split(line)]
    assert hidden_in_command_line(words) == words


def test_a_secret_of_a_job_is_called_as_its_own_variable_or_flag() -> None:
    for job in (
        f"env TOKEN={SECRET} sleep 1",
        f"sh run.sh --token={SECRET} -v",
        f"a --token {SECRET}",
        f"bash -c 'cd x && a --token {SECRET}; b'",
        f"""ssh host "sh -c 'export TOKEN={SECRET}; a'\"""",
        f"docker run --env=TOKEN={SECRET} image",
        f"sh -c 'TOKEN={SECRET} a'",
        f"""python3 -c "a = 1; token = '{SECRET}'\"""",
        f"""python3 -c "from a import b; b(1, token='{SECRET}', c=2)\"""",
        f"a {'=' * 2000} --token {SECRET}",
    ):
        for words in (["--job", job], [f"--job={job}"], ["--", "--job", job]):
            assert secrets_of_words(words) == {SECRET: "TOKEN"}, words
        assert SECRET not in plan_of_jobs([f"env {job}"], PROJECT_ROOT).text
    assert secrets_of_words(["--token", f"{SECRET};"]) == {f"{SECRET};": "TOKEN"}


def test_a_secret_is_found_within_a_word_and_under_quotes(tmp_path: Path) -> None:
    line = f"""true "Authorization: Bearer {SECRET}" --token "it's-{SECRET}\""""
    url = f'environment = {{ DATABASE_URL = "postgres://me:{SECRET}@host/data" }}\n'
    quotes = "'" * 3
    plan = read(tmp_path, f"[[client]]\ncommand = {quotes}{line}{quotes}\n{url}")
    (client,) = clients(plan, 1)
    for kept in (plan.text, client.job_key):
        assert SECRET not in kept
        assert "postgres://me:" in kept
