"""Tables as a page, Markdown and the terminal show them: a header, and rows of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarking.report import claims, wording
from benchmarking.report.wording import UNKNOWN

if TYPE_CHECKING:
    import jinja2

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A table; the first `keys` columns say what a row is about, those in `code` are commands.

    `unknown` names the columns that are not there because no row knows them.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    keys: int = 1
    code: Sequence[int] = ()
    unknown: Sequence[str] = ()


def each(parents: Iterable[Record], name: str) -> list[Record]:
    """The items of a list that each parent has, with `of`: the parent."""
    return [{**child, "of": parent} for parent in parents for child in parent[name]]


def tabulate(
    environment: jinja2.Environment,
    records: Sequence[Record],
    columns: Mapping[str, str],
    keys: int = 1,
    code: Sequence[int] = (),
    only_known: bool = False,
    where: str = "true",
) -> Table:
    """A row a record, a column an expression of what the record holds; `r` is all of it.

    What is `none` is unknown; with `only_known` a column that no row knows is left out. `where` is
    an expression that a record has to meet.
    """

    def filled(expression: str) -> list[Any]:
        cell = environment.compile_expression(expression, undefined_to_none=False)
        return [cell(record, r=record) for record in records]

    records = [record for record, is_meant in zip(records, filled(where), strict=True) if is_meant]
    shown: dict[str, list[str]] = {}
    unknown = []
    for number, (title, expression) in enumerate(columns.items()):
        shown[title] = [UNKNOWN if one is None else str(one) for one in filled(expression)]
        if only_known and number >= keys and {*shown[title]} <= {UNKNOWN}:
            unknown.append(title)
            del shown[title]
    return Table(list(shown), list(zip(*shown.values(), strict=True)), keys, code, unknown)


# --- tables that are not a row a record -----------------------------------------------------------


def first_table(mix: Record, how_sure: Callable[[Record], str], best: str) -> Table:
    """Rows: the whole card and each job; columns: each mode; the best marked, and how sure.

    `best` is how a best value is written, as a format: `**{}**`.
    """
    rows = []
    for one in mix["rows"]:
        modes = {mode["variant"]: mode for mode in one["modes"]}
        cells = []
        for variant in mix["names"]:
            mode = modes.get(variant, {"estimate": None, "is_best": False})
            text = wording.figure_text(one, mode["estimate"])
            cells.append(best.format(text) if mode["is_best"] and mode["estimate"] else text)
        title = f"{wording.subject_text(one)}: {wording.figure_name(one)}"
        rows.append([title, *cells, how_sure(one)])
    return Table(["", *mix["names"].values(), "how sure"], rows)


def is_told_apart(choice: Record) -> bool:
    """Whether a pair's best mode stands out, be it seen once."""
    is_alike = choice["verdict"] in (claims.NO_DIFFERENCE, claims.CANNOT_TELL)
    return bool(choice["best"]) and not is_alike and not choice["near_best"]


def pair_matrix(section: Record) -> Table:
    """Which mode to choose for each pair of jobs."""
    cells = {}
    for choice in section["pair_choices"]:
        if choice["best"]:
            unsure = "? " if choice["verdict"] == claims.CANNOT_TELL else "either; "
            best = wording.variant_name(choice["best"], choice)
            cells[frozenset(choice["jobs"])] = best if is_told_apart(choice) else unsure + best
    jobs = list(dict.fromkeys(job for choice in section["pair_choices"] for job in choice["jobs"]))
    rows = [[job, *(cells.get(frozenset((job, other)), UNKNOWN) for other in jobs)] for job in jobs]
    return Table(["job, next to:", *jobs], rows)


def noisy(section: Record) -> Table:
    """What a neighbor that presses one resource does to each job: job x resource x mode.

    Where MIG was measured, a row says from which duty on a slice of its own pays.
    """
    points = each(section["noisy"], "points")
    names = {one["variant"]: wording.group_name(one) for one in points}
    rows = []
    for one in section["noisy"]:
        pressed = wording.PRESSED.get(one["kind"], one["kind"]).removeprefix("the card's ")
        for duty in dict.fromkeys(point["duty"] for point in one["points"]):
            felt = {point["variant"]: point["slowdown"] for point in one["points"]
                    if point["duty"] == duty and point["slowdown"]}  # fmt: skip
            cells = [wording.spread(felt.get(variant)) for variant in names]
            least = min(felt, key=lambda variant: felt[variant]["mean"], default=None)
            part = "" if duty == 1 else f", {100 * duty:g} % of the time"
            title = f"{one['label']}, {pressed}{part}"
            rows.append([title, *cells, names[least] if least else UNKNOWN])
        limits = {
            limit["variant"]: limit["reason"] or f"from {100 * limit['duty']:.0f} % on"
            for limit in one["break_even"] if limit["reason"] != wording.NO_SLICE
        }  # fmt: skip
        if limits:
            cells = [limits.get(variant, UNKNOWN) for variant in names]
            rows.append([f"{one['label']}, {pressed}: a slice of its own pays", *cells, ""])
    return Table(["job, what its neighbor presses", *names.values(), "least"], rows)


def environment(section: Record) -> Table:
    """Card, driver, versions, engines, host; what the runs have not in common, each once."""
    known = {name: [value] for name, value in section["environment"].items()}
    for run in section["runs"]:
        dirty = " (dirty tree)" if run["environment"]["git_dirty"] else ""
        commit = run["environment"]["git_commit"]
        told = {**run["environment"], "git_dirty": None, "git_commit": commit and commit + dirty}
        for name, value in told.items():
            known.setdefault(name, []).append(value)
    known["versions"] = [f"{name} {version}" for name, version in section["versions"].items()]
    known["engine, precision"] = [
        f"{workload}: {', '.join(str(part or 'unknown') for part in engine)}"
        for workload, engine in sorted(section["engines"].items())
    ]
    rows = [
        [name.replace("_", " "), "; ".join(dict.fromkeys(str(v) for v in values if v is not None))]
        for name, values in known.items()
    ]
    return Table(["what", "value"], [row for row in rows if row[1]])


def proofs(run: Record) -> Table:
    """What showed, before a run and for each client, that the mode was in force."""
    rows = [["before the run", "", wording.evidence_text(one)] for one in run["mode_evidence"]]
    for co_run in run["co_runs"]:
        rows += [
            [
                co_run["co_run"],
                f"{proof['client']}: {proof['label']}, {proof['verdict']}",
                "; ".join(map(wording.evidence_text, proof["evidence"])) or "no evidence recorded",
            ]
            for proof in co_run["proofs"]
        ]
        counts = Counter(proof["verdict"] for proof in co_run["proofs"])
        rows.append([co_run["co_run"], "all", ", ".join(f"{n} {v}" for v, n in counts.items())])
    return Table(["co-run", "client", "evidence"], rows, keys=2)
