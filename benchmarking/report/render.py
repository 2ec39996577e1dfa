"""A comparison as people read it: page, Markdown and terminal, filled into the same sentences.

`render_html` and `render_markdown` make the two reports, `render_terminal` the decision for a
terminal of some width. All take the comparison that `report/comparison.py` describes. Texts from
records, cleaned when they were read, are escaped for each kind of reader. jinja2 and rich are
imported where they are used.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from benchmarking.report import claims, tables, wording
from benchmarking.report.charts import Charts

if TYPE_CHECKING:
    import jinja2

Record = Mapping[str, Any]

TEMPLATES = Path(__file__).parent / "templates"
TITLE = "GPU sharing: what was found"
NO_CHARTS: Charts = {"compared": (), "pairs": (), "timelines": ()}


def render_html(comparison: Record, drawn: Sequence[Charts] = ()) -> str:
    """The report as one self-contained page: no script, no network, charts inside as SVG."""
    return render_page("html", "report.j2", TITLE, context(comparison, drawn))


def render_markdown(comparison: Record, drawn: Sequence[Charts] = ()) -> str:
    """The report as Markdown; what it would take for HTML or a link stays text."""
    return render_page("md", "report.j2", TITLE, context(comparison, drawn))


def render_page(kind: str, template: str, title: str, values: Record) -> str:
    """A template's body, made of `blocks.{kind}.j2`, in the frame of `page.{kind}.j2`."""
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
        parts += say.notices(section).splitlines()
        for mix in section["mixes"] or [None]:
            parts += [say.headline(section, mix), say.subject(section, mix)]
            if mix:
                parts.append(tables.first_table(mix, say.how_sure, "*{}"))
            else:
                if section["pair_choices"]:
                    parts += [say.choices_title, tables.pair_matrix(section)]
                parts += [tables.noisy(section)] if section["noisy"] else []
            said = facts(section, mix, say)
            parts += [f"  {title}: {' '.join(texts)}" for title, texts in said.items()]
            parts.append("")
    if len(comparison["sections"]) > 1:
        parts.append(say.sections_note(comparison["sections"], comparison["differences"]))
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
            columns = list(zip(part.header, *part.rows, strict=True))
            room = max(1, (width - 10) // 8)
            # What has no room goes on below: narrower columns break figures, and then are empty.
            for first in range(part.keys, max(len(columns), part.keys + 1), room):
                table = Table(box=box.SIMPLE, pad_edge=False)
                shown = [*columns[: part.keys], *columns[first : first + room]]
                for name, *_ in shown:
                    table.add_column(name, overflow="fold")
                for row in list(zip(*shown, strict=True))[1:]:
                    table.add_row(*row)
                console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def sentences() -> Any:
    """Every sentence, as functions of what fills it, in plain text."""
    return environment("text").get_template("sentences.j2").module


def environment(kind: str) -> jinja2.Environment:
    """Templates for `html` (every text is escaped), `md` or `text`."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=kind != "text",
        finalize=escaped_for_markdown if kind == "md" else None,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {function.__name__: function for function in wording.FILTERS}
    made.filters |= {
        "each": tables.each,
        "tabulate": jinja2.pass_environment(tables.tabulate),
        "drawing": Markup,  # what matplotlib wrote
        "cell": markdown_cell,
        "code": markdown_code,
    }
    made.tests["contains_item"] = lambda items, item: item in items
    made.globals |= {"tables": tables, "facts": facts}
    return made


# What Markdown takes for HTML, a link (whose place may follow its text, or stand elsewhere under a
# name), emphasis or an entity. A bracket before a number begins an interval, `_` in a word is none.
MARKDOWN_SIGNS = re.compile(
    r"[\\<*]|~(?!/)|\[(?!-?[\d∞])|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)"
)


def escaped_for_markdown(value: Any) -> Any:
    """Text in which Markdown sees nothing but text; made of escaped parts, as it is."""
    if hasattr(value, "__html__"):
        return value
    return Markup(MARKDOWN_SIGNS.sub(r"\\\g<0>", str(value).replace("`", "’")))


def markdown_cell(value: Any) -> Markup:
    """A cell of a table, which a bar does not end."""
    return Markup(str(escaped_for_markdown(value)).replace("|", r"\|"))


def markdown_code(text: str) -> Any:
    """A text as code in a cell, whatever it holds; backslashes before a bar stand twice there."""
    safe = re.sub(r"(\\*)\|", r"\1\1\\|", text.replace("`", "’"))
    return Markup(f"`{safe}`") if text else text


# --- what the templates are filled with -----------------------------------------------------------


def context(comparison: Record, drawn: Sequence[Charts] = ()) -> dict[str, Any]:
    """The comparison, its sections with their charts, mixes, and what headlines count."""
    sections = []
    for number, section in enumerate(comparison["sections"]):
        made = {**section, "charts": drawn[number] if drawn else NO_CHARTS}
        for name in ("conclusions", "pair_choices"):
            made[name] = [
                {**one, "near_best": near_best(one, comparison["matters_percent"])}
                for one in section[name]
            ]
        made |= {"mixes": mixes_of(made), "noisy_worst": noisy_worst_of(made), **pairs_of(made),
                 "proofs": proofs_of(tables.each(section["runs"], "co_runs"))}  # fmt: skip
        sections.append(made)
    return {**comparison, "sections": sections}


def near_best(conclusion: Record, matters_percent: float) -> list[str]:
    """The variants that too few rounds for a claim show as good as the best one."""
    if conclusion["verdict"] != claims.TOO_FEW or not conclusion["best"]:
        return []
    means = {one["variant"]: one["estimate"]["mean"] for one in conclusion["modes"]
             if one["estimate"]}  # fmt: skip
    best = means.pop(conclusion["best"])
    return [one for one, mean in means.items() if abs(mean - best) * 100 <= matters_percent * best]


def pairs_of(section: Record) -> dict[str, Any]:
    """The pairs of several modes, in how many each is the one to choose, and of how many rounds."""
    choices = [one for one in section["pair_choices"] if len(one["modes"]) > 1]
    best = (
        wording.variant_name(one["best"], one) if tables.is_told_apart(one) else None
        for one in choices
    )  # fmt: skip
    found = (mode["estimate"] for mode in tables.each(choices, "modes"))
    rounds = min((len(one["values"]) for one in found if one), default=0)
    counts = Counter(best).most_common()
    return {"pair_choices": choices, "pair_counts": counts, "pair_rounds": rounds}


def noisy_worst_of(section: Record) -> dict[str, Any] | None:
    """The job that a noisy neighbor slows most, and how much the same does under other modes."""
    points = [point for point in tables.each(section["noisy"], "points") if point["slowdown"]]
    if not points:
        return None
    points.sort(key=lambda point: point["slowdown"]["mean"], reverse=True)
    worst = points[0]
    # A neighbor that presses as long and the same, under the other modes.
    others = [one for one in points[1:] if (one["of"], one["duty"]) == (worst["of"], worst["duty"])]
    return {**worst, "others": others, "resource": wording.PRESSED.get(worst["of"]["kind"], "it")}


def pairs_worst_of(section: Record) -> dict[str, Any] | None:
    """The job that the one next to it slows most, as `worst_slowdowns` has it for a mix."""
    cells = [one for one in tables.each(section["interference"], "cells") if one["slowdown"]]
    if not cells:
        return None
    worst = max(cells, key=lambda cell: cell["slowdown"]["mean"])
    matrix, slowdown = worst["of"], worst["slowdown"]
    return {"label": worst["job"], "slowdown": slowdown, "caused_by": worst["beside"],
            "source": "pairs", "mode": matrix["mode"], "settings": matrix["settings"]}  # fmt: skip


def proofs_of(co_runs: Sequence[Record]) -> Counter[str]:
    """How many clients of these co-runs were proved to run under their mode, by verdict."""
    measured = [one for one in co_runs if one["phase"] == "co_run"]
    return Counter(proof["verdict"] for one in measured for proof in one["proofs"])


def mixes_of(section: Record) -> list[dict[str, Any]]:
    """One entry a mix at the count where most modes were measured: what its first screen shows.

    `rows` are the conclusions that stand in its table, the whole card first; `names` the modes'
    names by variant, in the order of columns; `whole` the conclusion on work delivered.
    """
    found = dict.fromkeys((one["mix"], one["clients"]) for one in section["conclusions"])
    mixes = [mix_of(section, *key) for key in found]
    # The one that says most comes first.
    mixes.sort(key=lambda mix: (len(mix["names"]), mix["rounds"] or 0), reverse=True)
    return [{**mix, "is_only": len(mixes) == 1, "is_first": mix is mixes[0]} for mix in mixes]


def mix_of(section: Record, mix: str, clients: int) -> dict[str, Any]:
    """What one mix's first screen shows."""

    def its_own(name: str) -> list[Record]:
        return [one for one in section[name] if (one["mix"], one["clients"]) == (mix, clients)]

    rows = [one for one in its_own("conclusions") if one["is_claim"]]
    whole = next((one for one in rows if one["figure"] == "work"), None)
    modes = tables.each(rows, "modes")
    modes.sort(key=lambda mode: (wording.mode_order(mode["mode"]), mode["settings"]))
    names = {mode["variant"]: wording.group_name(mode) for mode in modes}
    of_whole = whole["modes"] if whole else []
    measured = [mode for mode in of_whole if mode["estimate"]]
    best = next((mode for mode in measured if mode["is_best"] or len(measured) == 1), None)
    other: dict[str, list[str]] = {}
    for one in rows:
        is_another = one is not whole and one["best"] != (whole["best"] if whole else None)
        if one["verdict"] == "sure" and is_another:
            other.setdefault(names[one["best"]], []).append(one["subject"])
    unknown = {names[mode["variant"]]: mode["reason"] for mode in of_whole
               if not mode["estimate"] and mode["reason"]}  # fmt: skip
    broken = [names[one["variant"]] for one in its_own("groups")
              if one["outcome"] != "ok" and one["variant"] in names]  # fmt: skip
    against_alone = [
        pair
        for pair in (whole["pairs"] if whole else ())
        if best and {pair["one"], pair["other"]} == {best["variant"], "alone"}
    ]
    # Jobs that pause deliver less than 1 one after another, too.
    is_less = not any(
        best["estimate"]["mean"] >= one["stp_alone"]["mean"]
        for one in its_own("groups")
        if best and one["variant"] == best["variant"] and one["stp_alone"]
    )
    services = max(
        (clients - one["throughput_clients"] for one in its_own("groups")
         if one["throughput_clients"] is not None), default=0
    )  # fmt: skip
    return {
        "mix": mix,
        "clients": clients,
        "services": services,
        "rows": [_row(one, names, section["cpu_demo"]) for one in rows],
        "names": names,
        "whole": whole,
        "best": best,
        "rounds": min((one["rounds"] for one in rows), default=None),
        "tied": [names[mode["variant"]] for mode in measured
                 if mode["is_tied"] and not mode["is_best"]],
        "near_best": [names[variant] for variant in (whole["near_best"] if whole else ())],
        "other_best": other,
        # A service goes on whether or not the jobs next to it take turns.
        "is_alone_faster": is_less and not services and any(
            pair["verdict"] == "sure" and pair["better"] == "alone" for pair in against_alone
        ),
        "has_one_mode": len(measured) == 1,
        "failed": {name: why for name, why in unknown.items() if name in broken},
        "void": {name: why for name, why in unknown.items() if name not in broken},
        "worst": next(iter(its_own("worst_slowdowns")), None),
        "expectations": its_own("expectations"),
        "priced": [one for one in its_own("groups") if one["cost_per_1000_work"] is not None
                   or one["energy_cost_per_1000_work"] is not None],
        "proofs": proofs_of([one for one in tables.each(section["runs"], "co_runs")
                             if (one["of"]["mix"], one["clients"]) == (mix, clients)]),
        "pictures": [one for one in section["charts"]["compared"] if one.mix == mix],
        "ramps": _ramps_of(section, mix),
        "is_cpu_demo": section["cpu_demo"],
    }  # fmt: skip


def _ramps_of(section: Record, mix: str) -> list[Record]:
    """The modes' ramps of a mix where they answer one question: how many clients fit.

    At further counts the jobs may have other shares, and something may have broken there, too.
    """
    ramps = [one for one in section["ramps"] if one["mix"] == mix]
    further = [
        group
        for one in ramps
        for group in section["groups"]
        if (group["mix"], group["variant"]) == (mix, one["variant"])
        and one["clients"][0] < group["clients"] not in one["clients"]
    ]
    is_asked = any(one["bounds"] or one["breaking_point"]["clients"] for one in ramps)
    is_alike = all(one["bounds"] == ramps[0]["bounds"] for one in ramps)
    return ramps if is_asked and is_alike and not further else []


def _row(one: Record, names: Mapping[str, str], is_cpu_demo: bool) -> dict[str, Any]:
    """A conclusion as a row of the first table: one mode alone is not the best of any."""
    modes = [{**mode, "is_best": mode["is_best"] and len(names) > 1} for mode in one["modes"]]
    if is_cpu_demo:  # the notice over all says once that nothing is sure
        subject = "all jobs" if one["figure"] == "work" else one["subject"]
        return {**one, "modes": modes, "verdict": None, "subject": subject}
    return {**one, "modes": modes}


def facts(section: Record, mix: Record | None, say: Any) -> dict[str, list[str]]:
    """What stands under a mix's table: sentences of the module `say` by what they are about.

    What is said of the whole section stands under the first mix, or where there is none.
    """
    found: dict[str, list[str]] = {}
    worst = mix["worst"] if mix else pairs_worst_of(section)
    if worst:
        found["Worst slowdown"] = [say.worst(worst)]
    if mix:
        for title, reasons in (("Did not work", mix["failed"]), ("Without figures", mix["void"])):
            found[title] = [f"{name}: {why}." for name, why in reasons.items()]
    if mix is None or mix["is_first"]:
        found["How many fit"] = [say.ramp_line(ramp) for ramp in section["ramps"]]
        if not section["cpu_demo"]:
            found["Not measured"] = [say.not_measured(one) for one in section["not_measured"]]
        limits = tables.each(section["noisy"], "break_even")
        if limits and all(one["reason"] == wording.NO_SLICE for one in limits):
            found["From when a slice of its own pays"] = ["Not measured: no MIG."]
        if section["groups"] and not section["cpu_demo"]:
            found["The method's own error"] = [say.own_error(section)]
    for one in mix["expectations"] if mix and not section["cpu_demo"] else ():
        title = {"guide": "The guide expects", "vendor": "Rule of thumb"}[one["source"]]
        found.setdefault(title, []).append(say.expectation(one, mix))
    if mix and mix["priced"]:
        found["Cost of 1,000 s of work"] = ["; ".join(map(say.price, mix["priced"]))]
    return {title: texts for title, texts in found.items() if texts}
