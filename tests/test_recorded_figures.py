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


def cells_of(page_name: str) -> list[list[str]]:
    """The rows of a page's tables, headings and rules among them."""
    return [
        [cell.strip().replace("*", "") for cell in line.strip()[1:-1].split("|")]
        for line in page(page_name).splitlines() if line.startswith("|")
    ]  # fmt: skip


def cells(page_name: str, *begin: str) -> list[str]:
    """The further cells of the one row of a page's tables that begins with these."""
    (row,) = [row for row in cells_of(page_name) if tuple(row[: len(begin)]) == begin]
    return row[len(begin) :]


def figures(values: list[float]) -> list[str]:
    return [f"{value:.2f}" for value in values]


def significant(value: float, digits: int) -> str:
    """A figure rounded to so many digits, the zeros at its end shown."""
    return f"{value:#.{digits}g}".rstrip(".")


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
        row = "token generation next to a training, batch inference and a notebook"
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


def mean_ms(example: str, mode: str, co_run: str) -> float:
    records = run_folder.read_run(EXAMPLES / example / mode).clients_of(co_run)
    return statistics.fmean(ms for record in records for ms in record.latency_ms)


def test_the_latencies_of_single_images_are_as_recorded():
    modes = ("time-slicing", "mps")
    first, *_, last = rows = [
        [mean_ms("h200-single-image", mode, f"single-image-{clients}-r0") for mode in modes]
        for clients in (1, 3, 5, 7)
    ]
    for clients, means in zip((1, 3, 5, 7), rows, strict=True):
        ratios = [f" ({mean / one:.1f})" if clients > 1 else ""
                  for mean, one in zip(means, first, strict=True)]  # fmt: skip
        assert cells("docs/findings.md#nos", str(clients))[1::2] == [
            f"{mean:.3f} ms{ratio}" for mean, ratio in zip(means, ratios, strict=True)
        ]
    alone = mean_ms("h200-single-image", "time-slicing", "baseline-batch_inference")
    row = f"seven services of single images ({alone:.1f} ms alone)"
    assert cells("docs/modes.md", row)[:2] == [f"{mean:.1f} ms" for mean in last]


def test_batches_that_fill_the_card_are_as_recorded():
    means = [
        f"{mean_ms('h200-batches', mode, 'inference-7-r0'):.1f} ms"
        for mode in ("time-slicing", "mps")
    ]
    alone = f"{mean_ms('h200-batches', 'time-slicing', 'baseline-batch_inference'):.1f} ms"
    row = f"seven with batches of 32 ({alone} alone), which fill the card"
    assert cells("docs/modes.md", row)[:2] == means
    text = "with seven clients {} under time slicing, {} under MPS, alone {} "
    assert text.format(*means, alone) in page("docs/findings.md")


def test_work_delivered_by_single_images_is_as_recorded():
    work = {"mps": [], "time-slicing": []}
    for group in sorted(section("h200-single-image")["groups"], key=lambda one: one["clients"]):
        work[group["variant"]].append(f"{group['stp']['mean']:.2f}")
    shown = re.search(
        r"1, 3, 5 and 7 delivered (.*?) under MPS.*?and ([0-9., and]+) under time slicing",
        page("docs/sweeps.md").replace("\n", " "),
    )
    assert [re.findall(r"\d\.\d+", one) for one in shown.groups()] == [*work.values()]


def test_shares_of_the_multiprocessors_are_as_recorded():
    groups = {one["variant"]: one for one in section("h200-mps-percentage")["groups"]}
    variants = ("mps:100", "mps:50", "mps:even")
    work = [f"{groups[one]['stp']['mean']:.2f}" for one in variants]
    active = [f"{groups[one]['gpu']['sm_activity_percent']:.0f}" for one in variants]
    text = page("docs/modes.md").replace("\n", " ").replace("*", "")
    assert "{} with 100 % each, {} with 50 % and {} with 25 %".format(*work) in text
    assert "({}, {} and {} % of the multiprocessors active)".format(*active) in text


def test_a_service_next_to_trainings_is_as_recorded():
    modes = ("time-slicing", "mps")
    (alone,) = [one for one in section("h200-serving")["alone"] if "service" in one["label"]]
    services = [alone, *(client("h200-serving", one, "Inference service") for one in modes)]
    groups = {one["variant"]: one for one in section("h200-serving")["groups"]}
    tails = [one["p99_ms"]["mean"] for one in services]
    serving = "docs/serving.md#A service next to trainings"
    assert cells(serving, "a request, p50; p99") == [
        f"{one['median_ms']['mean']:.1f}; {tail:.1f} ms"
        for one, tail in zip(services, tails, strict=True)
    ]
    slowdowns = figures([groups[one]["antt"]["mean"] for one in modes])
    assert cells(serving, "ResNet50 training, slowdown") == ["1", *slowdowns]
    work = figures([groups[one]["stp"]["mean"] for one in modes])
    assert cells(serving, "work delivered by the trainings (STP)") == ["1", *work]
    row = f"a server's p99 next to three trainings ({tails[0]:.1f} ms alone)"
    assert cells("docs/modes.md", row)[:2] == [f"{tail:.1f} ms" for tail in tails[1:]]


@pytest.mark.parametrize(
    ("program", "told"),
    [
        (
            "resnet_training",
            "{mean_epoch_seconds:.2f} s an epoch ({samples_per_second:,.0f} img/s)",
        ),
        ("resnet_training", "{final_test_accuracy_percent:.1f} % test accuracy"),
        ("bert_training", "{mean_epoch_seconds:.3f} s an epoch ({samples_per_second:,.0f} samples"),
        ("bert_training", "{held_out_accuracy_percent:.0f} % on training and held-out sentences"),
        ("batch_inference", "{latency_mean_ms:.2f} ms a batch"),
        ("batch_inference", "(the GPU's part {device_mean_ms:.2f}), {samples_per_second:,.0f} img"),
        ("load_test", "{qps:,.0f} QPS, p50 {p50_latency_ms:.1f} ms, p99 {p99_latency_ms:.1f} ms"),
        ("load_test", "{failed_requests} of {total_requests:,} failed"),
        ("jupyter_simulation", "{session_seconds:.0f} s, {active_percent:.0f} % active"),
    ],
)
def test_the_guides_experiments_are_as_recorded(program, told):
    result = json.loads((EXAMPLES / f"h200-experiments/{program}.json").read_text())
    (row,) = [one for one in cells_of("docs/experiments.md") if f"/{program}.py" in one[1]]
    assert told.format(**result["figures"]) in row[2]


def test_the_speed_table_is_as_recorded():
    table = json.loads(gzip.decompress((EXAMPLES / "h200-speed/speed_table.json.gz").read_bytes()))
    rows = [one for one in cells_of("docs/speed.md") if len(one) == 6][2:]
    for shown, row in zip(rows, table["rows"], strict=True):
        scale, unit = (1, "s") if row["unit"] == "epoch" else (1e3, "ms")
        figure = f"{significant(scale * row['seconds'], 3)} {unit}"
        fraction = f"{100 * row['floor_fraction']:.0f} %"
        startup = f"{row['startup_seconds']:.1f} s"
        if row["is_reference"]:
            figure += {"epoch": " an epoch", "batch": " a batch"}[row["unit"]]
            fraction += f" of {significant(scale * row['floor_seconds'], 2)} {unit}"
        engine = f"{row['engine']} {row['precision']}"
        speedup = "1" if row["is_reference"] else f"{row['speedup']:.1f}"
        assert shown[1:] == [engine, figure, speedup, fraction, startup]
