"""A comparison as people read it: page, Markdown and terminal, filled into the same sentences.

`draw` makes the charts, `render_html` and `render_markdown` the two reports, `render_terminal` the
decision for a terminal of some width. All take the comparison that `comparison.compare` describes.
Texts from records, cleaned when they were read, are escaped for each kind of reader. jinja2,
matplotlib and rich are imported where they are used.
"""

from __future__ import annotations

import copy
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarking.report import charts, evidence, tables, wording

if TYPE_CHECKING:
    import jinja2

Record = Mapping[str, Any]
Charts = Sequence[Mapping[str, Sequence[charts.Picture]]]

TEMPLATES = Path(__file__).parent / "templates"
TITLE = "GPU sharing: what was found"
NO_CHARTS: Mapping[str, Sequence[charts.Picture]] = {"compared": (), "pairs": (), "timelines": ()}


def draw(
    comparison: Record, clients: Any, samples_of: Callable[[str], Sequence[Record]], folder: Path
) -> list[dict[str, list[charts.Picture]]]:
    """Draw the charts of every section as PNG into a folder that is there, for the reports.

    `clients` is the comparison's table of clients, `samples_of(folder)` gives a run's GPU samples.
    Raises `OSError` where a file cannot be written.
    """
    sections = comparison["sections"]
    return [
        charts.draw_section(
            section,
            clients[clients["section"] == number] if len(clients) else clients,
            samples_of,
            folder,
            f"section{number}-" if len(sections) > 1 else "",
        )
        for number, section in enumerate(sections, start=1)
    ]


def render_html(comparison: Record, drawn: Charts = ()) -> str:
    """The report as one self-contained page: no script, no network, charts inside as SVG."""
    return render_page("html", "report.j2", TITLE, context(comparison, drawn))


def render_markdown(comparison: Record, drawn: Charts = ()) -> str:
    """The report as Markdown; what it would take for HTML or a link stays text."""
    return render_page("md", "report.j2", TITLE, context(comparison, drawn))


def render_page(kind: str, template: str, title: str, values: Record) -> str:
    """A template's body, made of `blocks.{kind}.j2`, in the frame of `page.{kind}.j2`."""
    from markupsafe import Markup

    made = environment(kind)
    page = made.get_template(f"blocks.{kind}.j2").module
    body = made.get_template(template).render(page=page, **values)
    text = made.get_template(f"page.{kind}.j2").render(title=title, body=Markup(body))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n" if kind == "md" else text


def render_terminal(comparison: Record, width: int) -> str:
    """The decision of each section, no wider than `width` columns: headline, table, facts."""
    say = sentences()
    parts: list[str | tables.Table] = []
    for section in context(comparison)["sections"]:
        error = section["own_error"]
        parts += [say.cpu_notice()] if section["cpu_demo"] else []
        parts += [say.error_notice(section)] if error and error["is_over_limit"] else []
        for mix in section["mixes"] or [None]:
            if mix:
                shown = first_table(mix, say.how_sure, "*{}")
                parts += [say.headline(mix), say.subject(section, mix), shown]
            else:
                parts += [say.other_headline(section), say.section_title(section)]
                parts += [tables.pair_matrix(section)] if section["pair_choices"] else []
                parts += [tables.noisy(section)] if section["noisy"] else []
            said = facts(section, mix, say)
            parts += [f"  {title}: {' '.join(texts)}" for title, texts in said.items()]
            parts.append("")
    return on_terminal(parts, width)


def on_terminal(parts: Sequence[str | tables.Table], width: int) -> str:
    """Lines, which keep their indentation where they are wrapped, and tables."""
    from rich import box
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table

    console = Console(width=width, no_color=True, markup=False, highlight=False, emoji=False)
    with console.capture() as captured:
        for part in parts:
            if isinstance(part, str):
                indent = len(part) - len(part.lstrip())
                console.print(Padding(part.strip(), (0, 0, 0, indent)))
                continue
            table = Table(*part.header, box=box.SIMPLE, pad_edge=False)
            for row in part.rows:
                table.add_row(*row)
            console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def sentences() -> Any:
    """Every sentence, as functions of what fills it, in plain text."""
    return environment("text").get_template("sentences.j2").module


def environment(kind: str) -> jinja2.Environment:
    """Templates for `html` (every text is escaped), `md` or `text`."""
    import jinja2
    from markupsafe import Markup

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=kind != "text",
        finalize=escaped_for_markdown if kind == "md" else None,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (
        wording.clients_text, wording.counted, wording.digits, wording.figure_text, wording.listed,
        wording.milliseconds, wording.mode_name, wording.number, wording.once,
        wording.sentence, wording.subject_text, tables.group_name,
    ):  # fmt: skip
        made.filters[function.__name__] = function
    made.filters["shell_words"] = shlex.join
    made.filters["drawing"] = Markup  # what matplotlib wrote
    made.filters["code"] = markdown_code
    made.tests["contains_item"] = lambda items, item: item in items
    made.globals |= {
        "tables": tables,
        "evidence": evidence,
        "first_table": first_table,
        "facts": facts,
    }
    return made


def escaped_for_markdown(value: Any) -> Any:
    """Text in which Markdown sees no HTML, no link and no code; made of escaped parts, as it is."""
    from markupsafe import Markup

    if hasattr(value, "__html__"):
        return value
    return Markup(re.sub(r"<|\](?=\()", r"\\\g<0>", str(value).replace("`", "’")))


def markdown_code(text: str) -> Any:
    """A text as code, whatever it holds."""
    from markupsafe import Markup

    return Markup("`" + text.replace("`", "’").replace("|", "\\|") + "`") if text else text


# --- what the templates are filled with -----------------------------------------------------------


def context(comparison: Record, drawn: Charts = ()) -> dict[str, Any]:
    """The comparison's sections with their charts, mixes and counts of chosen pairs."""
    made = copy.deepcopy(comparison)
    for number, section in enumerate(made["sections"]):
        section["charts"] = drawn[number] if drawn else NO_CHARTS
        for group in section["groups"]:
            costs = (group["cost_per_1000_work"], group["energy_cost_per_1000_work"])
            group["has_price"] = costs != (None, None)
        section["mixes"] = mixes_of(section)
        section["noisy_worst"] = noisy_worst_of(section)
        section["service_limits"] = [
            f"{row['label']}, {row['where']}: {row['service']['limit']}"
            for row in tables.service_rows(section)
            if row["service"]["limit"]
        ]
        best = [choice["best"] if choice["verdict"] != "cannot tell" else None
                for choice in section["pair_choices"]]  # fmt: skip
        names = {mode["variant"]: tables.group_name(mode)
                 for choice in section["pair_choices"] for mode in choice["modes"]}  # fmt: skip
        section["pair_counts"] = [
            (names.get(variant), count) for variant, count in Counter(best).most_common()
        ]
        section["pair_rounds"] = min(
            (len(mode["estimate"]["values"]) for choice in section["pair_choices"]
             for mode in choice["modes"] if mode["estimate"]), default=0,
        )  # fmt: skip
    return made


PRESSED = {"hbm": "the card's memory", "sm": "the card's multiprocessors", "pcie": "the bus"}


def noisy_worst_of(section: Record) -> dict[str, Any] | None:
    """The job that a noisy neighbor slows most, and the mode in which the same slows it least."""
    points = [
        {**point, "label": one["label"], "resource": PRESSED.get(one["kind"], one["kind"])}
        for one in section["noisy"] for point in one["points"] if point["slowdown"]
    ]  # fmt: skip
    if not points:
        return None
    points.sort(key=lambda point: point["slowdown"]["mean"])
    worst = points[-1]
    place = ("label", "resource", "duty")
    least = next(point for point in points if all(point[key] == worst[key] for key in place))
    names = [wording.mode_name(*point["variant"].partition(":")[::2]) for point in (worst, least)]
    return {
        **worst,
        "slowdown": worst["slowdown"]["mean"],
        "rounds": len(worst["slowdown"]["values"]),
        "mode_name": names[0],
        "least": least["slowdown"]["mean"],
        "least_name": names[1] if least is not worst else None,
    }


def mixes_of(section: Record) -> list[dict[str, Any]]:
    """One entry a mix at the count where most modes were measured: what its first screen shows.

    `rows` are the conclusions that stand in its table, the whole card first; `names` the modes'
    names by variant, in the order of columns; `whole` the conclusion on work delivered.
    """
    found: dict[tuple[str, int], list[Record]] = {}
    for one in section["conclusions"]:
        found.setdefault((one["mix"], one["clients"]), []).append(one)
    mixes = [mix_of(section, *key, members) for key, members in found.items()]
    # The one that says most comes first.
    mixes.sort(key=lambda mix: (len(mix["names"]), mix["rounds"] or 0), reverse=True)
    return [{**mix, "is_only": len(mixes) == 1, "is_first": mix is mixes[0]} for mix in mixes]


def mix_of(section: Record, mix: str, clients: int, members: Sequence[Record]) -> dict[str, Any]:
    """What one mix's first screen shows."""
    rows = [one for one in members if one["is_claim"]]
    whole = next((one for one in rows if one["figure"] == "work"), None)
    modes = [mode for one in rows for mode in one["modes"]]
    modes.sort(key=lambda mode: (wording.mode_order(mode["mode"]), mode["settings"]))
    names = {mode["variant"]: tables.group_name(mode) for mode in modes}
    measured = [mode for mode in whole["modes"] if mode["estimate"]] if whole else []
    best = next((mode for mode in measured if mode["is_best"]), None)
    best = best or (measured[0] if len(measured) == 1 else None)
    other: dict[str, list[str]] = {}
    for one in rows:
        is_another = one["best"] != (whole or {}).get("best")
        if one["verdict"] == "sure" and one is not whole and is_another:
            other.setdefault(names[one["best"]], []).append(one["subject"])
    worst = next((one for one in section["worst_slowdowns"]
                  if (one["mix"], one["clients"]) == (mix, clients)), None)  # fmt: skip
    against_alone = [
        pair for pair in (whole["pairs"] if whole else ())
        if best and {pair["one"], pair["other"]} == {best["variant"], "alone"}
    ]  # fmt: skip
    return {
        "mix": mix,
        "clients": clients,
        "rows": [row_of(one, names, section["cpu_demo"]) for one in rows],
        "names": names,
        "whole": whole,
        "best": best,
        "rounds": min((one["rounds"] for one in rows), default=None),
        "best_name": best and names[best["variant"]],
        "tied": [names[mode["variant"]] for mode in measured
                 if mode["is_tied"] and not mode["is_best"]],
        "other_best": other,
        "is_alone_faster": any(
            pair["verdict"] == "sure" and pair["better"] == "alone" for pair in against_alone
        ),
        "has_one_mode": len(measured) == 1,
        "failed": {
            names[mode["variant"]]: mode["reason"] for mode in (whole["modes"] if whole else ())
            if not mode["estimate"] and mode["reason"]
        },
        "worst": worst and {**worst, "mode_name": names.get(worst["variant"], worst["variant"])},
        "expectations": [
            {**one, "mode_name": names.get(one["mode"], wording.mode_name(one["mode"])),
             "found_name": names.get(one["found"], one["found"])}
            for one in section["expectations"] if (one["mix"], one["clients"]) == (mix, clients)
        ],
        "groups": [group for group in section["groups"]
                   if (group["mix"], group["clients"]) == (mix, clients)],
        "proofs": proofs_of(section, mix, clients),
        "pictures": [one for one in section["charts"]["compared"] if one.mix == mix],
        "is_cpu_demo": section["cpu_demo"],
    }  # fmt: skip


def proofs_of(section: Record, mix: str, clients: int) -> Counter[str]:
    """How many clients were measured under a mode, by what their proof says."""
    return Counter(
        proof["verdict"] or "unverified"
        for run in section["runs"] if run["mix"] == mix
        for co_run in run["co_runs"]
        if co_run["phase"] == "co_run" and co_run["clients"] == clients
        for proof in co_run["proofs"]
    )  # fmt: skip


def row_of(one: Record, names: Record, is_cpu_demo: bool) -> dict[str, Any]:
    """A conclusion as a row of the first table: one mode alone is not the best of any."""
    modes = [{**mode, "is_best": mode["is_best"] and len(names) > 1} for mode in one["modes"]]
    verdict = None if is_cpu_demo else one["verdict"]  # the notice over all says it once
    runner_up_name = names.get(one["runner_up"])
    return {**one, "modes": modes, "verdict": verdict, "runner_up_name": runner_up_name}


def first_table(mix: Record, how_sure: Callable[[Record], str], best: str) -> tables.Table:
    """Rows: the whole card and each job; columns: each mode; the best marked, and how sure.

    `best` is how a best value is written, as a format: `**{}**`.
    """
    rows = []
    for one in mix["rows"]:
        modes = {mode["variant"]: mode for mode in one["modes"]}
        cells = []
        for variant in mix["names"]:
            mode = modes.get(variant) or {"estimate": None, "is_best": False}
            text = wording.figure_text(one, mode["estimate"])
            cells.append(best.format(text) if mode["is_best"] and mode["estimate"] else text)
        rows.append(
            [f"{wording.subject_text(one)}: {wording.figure_name(one)}", *cells, how_sure(one)]
        )
    return tables.Table(["", *mix["names"].values(), "how sure"], rows)


def facts(section: Record, mix: Record | None, say: Any) -> dict[str, list[str]]:
    """What stands under a mix's table: sentences of the module `say` by what they are about.

    What is said of the whole section stands under the first mix, or where there is none.
    """
    found: dict[str, list[str]] = {}
    if mix and mix["worst"]:
        found["Worst slowdown"] = [say.worst(mix["worst"])]
    if mix and mix["failed"]:
        found["Did not work"] = [f"{name}: {why}." for name, why in mix["failed"].items()]
    if mix is None or mix["is_first"]:
        found["How many fit"] = [say.ramp_line(ramp) for ramp in section["ramps"]]
        if not section["cpu_demo"]:
            found["Not measured"] = [say.not_measured(one) for one in section["not_measured"]]
        if section["groups"] and not section["cpu_demo"]:
            found["The method's own error"] = [say.own_error(section)]
    for one in mix["expectations"] if mix and not section["cpu_demo"] else ():
        title = {"guide": "The guide expects", "vendor": "Rule of thumb"}[one["source"]]
        found.setdefault(title, []).append(say.expectation(one))
    priced = [say.price(group) for group in mix["groups"] if group["has_price"]] if mix else []
    found["Cost of 1,000 s of work"] = ["; ".join(priced)] if priced else []
    return {title: texts for title, texts in found.items() if texts}
