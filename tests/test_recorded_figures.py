"""The figures in README and docs/ are those of the recorded runs in examples/.

That the program gives the runs' figures again: test_oracle.py.
"""

from __future__ import annotations

import functools
import gzip
import json
import re
import statistics

import pytest
from conftest import PROJECT_ROOT

from benchmarking.records import run_folder

EXAMPLES = PROJECT_ROOT / "examples"
LABELS = {"notebook session": "Jupyter session", "batch inference": "Batch inference",
          "token generation": "Token generation"}  # fmt: skip
VARIANTS = ("time-slicing", "mps", "mps:even")


@functools.cache
def section(example: str) -> dict:
    """The one section of a recorded run's comparison."""
    plain = EXAMPLES / example / "comparison.json"
    text = plain.read_bytes() if plain.exists() else gzip.decompress(
        plain.with_suffix(".json.gz").read_bytes()
    )  # fmt: skip
    (only,) = json.loads(text)["sections"]
    return only


@functools.cache
def page(name: str) -> str:
    """The text of a page, or of one section of it: "docs/PAGE.md#words of its heading"."""
    path, _, heading = name.partition("#")
    text = (PROJECT_ROOT / path).read_text()
    return text.partition(f"## {heading}")[2].partition("\n## ")[0] if heading else text


def cells(page_name: str, *begin: str) -> list[str]:
    """The further cells of the one row of a page's tables that begins with these."""
    rows = [
        [cell.strip().replace("*", "") for cell in line.strip().strip("|").split("|")]
        for line in page(page_name).splitlines() if line.startswith("|")
    ]  # fmt: skip
    (row,) = [row for row in rows if tuple(row[: len(begin)]) == begin]
    return row[len(begin) :]


def figures(values: list[float]) -> list[str]:
    return [f"{value:.2f}" for value in values]


def spread(values: list[float]) -> str:
    low, high = figures([min(values), max(values)])
    return low if low == high else f"{low} to {high}"


def client(example: str, variant: str, label: str) -> dict:
    (group,) = [one for one in section(example)["groups"] if one["variant"] == variant]
    (row,) = [row for row in group["client_rows"] if row["label"] == label]
    return row


def pair_cells(variant: str) -> list[dict]:
    (matrix,) = [one for one in section("h200-pairs")["interference"] if one["variant"] == variant]
    return matrix["cells"]


def stp(example: str) -> list[dict]:
    groups = {group["variant"]: group["stp"] for group in section(example)["groups"]}
    return [groups[variant] for variant in VARIANTS]


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ("ResNet50 training, slowdown", "ResNet50 training"),
        ("batch inference, slowdown; p99 (1.9 ms alone)", "Batch inference"),
        ("notebook session, slowdown of its cells", "Jupyter session"),
        ("BERT fine-tuning, slowdown", "BERT fine-tuning"),
    ],
)
def test_the_readme_shows_each_jobs_slowdown(row, label):
    clients = [client("h200-mixed-4", variant, label) for variant in VARIANTS]
    shown = [cell.partition(";") for cell in cells("README.md", row)]
    assert [head for head, _, _ in shown] == figures([one["slowdown"]["mean"] for one in clients])
    if "p99" in row:
        tails = [f"{one['p99_ms']['mean']:.1f} ms" for one in clients]
        assert [tail.strip() for _, _, tail in shown] == tails


def test_the_readme_shows_the_work_delivered_with_its_intervals_and_the_methods_own_error():
    assert cells("README.md", "work delivered (STP)") == [
        "{mean:.2f} ({low:.2f} to {high:.2f})".format(**work) for work in stp("h200-mixed-4")
    ]
    own_error = section("h200-mixed-4")["own_error"]["percent"]
    assert f"{own_error:.2f} % off its baseline" in page("README.md")


TOKENS = "docs/tokens-and-neighbors.md"


@pytest.mark.parametrize(
    "job", ["token generation", "ResNet50 training", "batch inference", "notebook session"]
)
def test_token_generation_and_its_neighbors_are_as_recorded(job):
    clients = [client("h200-llm", one, LABELS.get(job, job)) for one in VARIANTS]
    slowdowns = figures([one["slowdown"]["mean"] for one in clients])
    assert cells(TOKENS, f"{job}, slowdown") == ["1", *slowdowns]
    work = figures([one["mean"] for one in stp("h200-llm")])
    assert cells(TOKENS, "work delivered (STP)") == ["1", *work]
    if job == "token generation":
        row = "token generation next to a training, batch inference and a notebook (H200)"
        assert cells("docs/modes.md", row)[:3] == slowdowns


def test_the_times_of_a_token_are_as_recorded():
    (alone,) = [one for one in section("h200-llm")["alone"] if one["label"] == "Token generation"]
    rows = [alone, *(client("h200-llm", one, "Token generation") for one in VARIANTS)]
    assert cells(TOKENS, "a token, p50; p99") == [
        f"{row['median_ms']['mean']:.1f}; {row['p99_ms']['mean']:.1f} ms" for row in rows
    ]
    assert cells(TOKENS, "the first token, p50") == [
        f"{row['apart_latency']['ttft']['median']:.0f} ms" for row in rows
    ]


def test_noisy_neighbors_are_as_recorded():
    names = {"hbm": "memory", "sm": "multiprocessors"}
    assert len(section("h200-noisy")["noisy"]) == 4
    for row in section("h200-noisy")["noisy"]:
        job = row["label"].replace("Token", "token")
        points = {point["variant"]: point["slowdown"]["mean"] for point in row["points"]}
        assert cells(TOKENS, job, names[row["kind"]]) == figures([points[one] for one in VARIANTS])


def test_pairs_are_as_recorded():
    restless, one_pauses, both_pause, shared = [], [], [], []
    for variant in ("time-slicing", "mps"):
        by_pauses = {0: [], 1: [], 2: []}
        for cell in pair_cells(variant):
            by_pauses[(cell["job"], cell["beside"]).count("Jupyter session")].append(cell)
        work = [spread([cell["stp"]["mean"] for cell in by_pauses[n]]) for n in (0, 1, 2)]
        restless.append(spread([cell["slowdown"]["mean"] for cell in by_pauses[0]]))
        shared.append(work[0])
        one_pauses.append(work[1])
        both_pause.append(work[2])
    worth = "GPUs' worth of work"
    assert cells(TOKENS, "slowdown of jobs that never pause, next to each other") == restless
    assert cells(TOKENS, f"{worth}, both of them") == shared
    assert cells(TOKENS, f"{worth}, one of them and a notebook") == one_pauses
    assert cells(TOKENS, f"{worth}, two notebooks, which pause") == both_pause
    choices = {tuple(one["jobs"]): one["best"] for one in section("h200-pairs")["pair_choices"]}
    assert {jobs for jobs, best in choices.items() if best != "mps"} == {("Batch inference",) * 2}


@pytest.mark.parametrize(("name", "variant"), [("time slicing", "time-slicing"), ("MPS", "mps")])
def test_tails_next_to_one_other_job_are_as_recorded(name, variant):
    tails = {cell["beside"]: cell["tail_slowdown"] for cell in pair_cells(variant)
             if cell["job"] == "Batch inference"}  # fmt: skip
    neighbors = ("ResNet50 training", "Batch inference", "Jupyter session", "BERT fine-tuning")
    shown = cells("docs/findings.md#tally-bench", name)
    assert shown == figures([tails[one] for one in neighbors])


def test_a_token_next_to_a_memory_hog_is_as_recorded():
    co_run = "noisy{}-llm_inference-hbm-r0"
    rows = {
        "alone": ("baseline", "baseline-llm_inference"),
        "time slicing": ("time-slicing", co_run.format("")),
        "MPS, 50 % each": ("mps-even", co_run.format("-mps-even")),
        "MPS, no limit": ("mps", co_run.format("")),
    }
    for row, (folder, name) in rows.items():
        run = run_folder.read_run(EXAMPLES / "h200-noisy" / folder)
        (record,) = [one for one in run.clients_of(name) if one.label == "Token generation"]
        ours = [statistics.fmean(record.latency_ms), record.slowdown]
        shown = cells("docs/findings.md#Token generation", row)[2:]
        for cell, value in zip(shown, ours, strict=True):
            assert cell == f"{value:.{len(cell.partition('.')[2])}f}"


@pytest.mark.parametrize("fault", ["assert", "oom"])
def test_blast_radii_are_as_recorded(fault):
    names = {"assert": "failed assertion in a kernel", "oom": "out of memory at its own cap"}
    reliability = page("docs/reliability.md")
    (rows,) = re.findall(rf"^\| {names[fault]} \| (time .*)\n\| \| (MPS .*)$", reliability, re.M)
    for row, mode in zip(rows, ("time-slicing", "mps"), strict=True):
        record = json.loads(
            (EXAMPLES / "h200-blast" / f"{mode}-{fault}" / "blast_radius.json").read_text()
        )
        neighbors = record["neighbors"]
        assert [cell.strip() for cell in row.strip("| ").split("|")[1:]] == [
            f"{sum(one['survived'] for one in neighbors)} of {len(neighbors)}",
            f"{max(one['longest_gap_ms'] for one in neighbors):.1f} ms",
            "none" if not any(one["lost_seconds"] for one in neighbors) else "some",
            f"{record['newcomer']['fault_cost_seconds']:.1f} s",
        ]


def test_the_latencies_of_single_images_are_as_recorded():
    runs = [
        run_folder.read_run(EXAMPLES / "h100-single-image" / m) for m in ("time-slicing", "mps")
    ]

    def mean_ms(run, clients):
        records = run.clients_of(f"single-image-{clients}-r0")
        return statistics.fmean(ms for record in records for ms in record.latency_ms)

    for clients in (1, 3, 5, 7):
        shown = cells("docs/findings.md#nos", str(clients))[1::2]
        for run, cell in zip(runs, shown, strict=True):
            mean = mean_ms(run, clients)
            ratio = f" ({mean / mean_ms(run, 1):.1f})" if clients > 1 else ""
            assert cell == f"{mean:.3f} ms{ratio}"
