"""Tables that a page shows as a whole, as HTML: every stored run, and the claims with their verdicts.

What stands in a store may have come from anyone, so every text is escaped.  Reads stored runs only.
"""

import dataclasses
import functools
import math
from html import escape

import pandas as pd

from gstlib import experiments
from gstlib.claims import CLAIMS, CONTRADICTED, INCONCLUSIVE, NOT_RUN, SUPPORTED, VERDICTS, upheld
from gstlib.experiments import PROFILES
from gstlib.reading import text
from gstlib.reading.interval import LEVEL
from gstlib.reading.study import once
from gstlib.reading.text import NONE
from gstlib.spec import DataSpec, PruningSpec
from gstlib.store import Store

DECIDED = (SUPPORTED, CONTRADICTED)
_COUNTED = {claim.id: claim.counted for claim in CLAIMS}
_UNITS = {"filter": "filters", "weight": "single weights"}
_RUNS = ("run", "network", "seed", "accuracy, %", "profile", "r", "target", "score", "units", "effect", "data", "device",
         "finished", "figures", "configuration", "commit", "versions")

# the page that shows what a claim rests on, by the claim's `figure`
PAGES = {
    "figure1-vgg11": "chapters/figure1", "figure1-resnet18": "chapters/figure1", "figure2": "chapters/figure2",
    "figure3": "chapters/figure3", "figure4": "chapters/figure4", "figure5": "chapters/figure5",
    "figureA1": "chapters/ebn", "figureA2": "chapters/figure1-run", "bench": "chapters/engine",
    "final-figure2": "chapters/final", "final-figure3": "chapters/final", "final-figure4": "chapters/final",
    "final-figure5": "chapters/permanence", "C20": "chapters/flatness",
}


def runs(store: Store) -> pd.DataFrame:
    """A row a stored run: id, the figures that use it, its specification in short, final test accuracy, provenance.

    `r` is the number of epochs between events as it was run (a label states it as printed).  A run that no figure asks
    for has a dash there.
    """
    rows = []
    for run_id, found in store.runs():
        spec, about = found.spec, found.provenance
        data = dataclasses.replace(spec.data, augment=False, wrong_labels=0.0)
        users = _users(about["profile"], data, spec.seed).get(run_id, {})
        width = "" if spec.model.width == 1 else f", width {spec.model.width:g}"
        made_with = {"Python": about.get("python")} | about.get("versions", {})
        rows.append({
            "run": run_id, "figures": ", ".join(users) or NONE,
            "configuration": ", ".join(dict.fromkeys(users.values())) or NONE,
            "network": spec.model.name + width, "profile": about["profile"], **_pruning(spec.pruning),
            "seed": spec.seed, "accuracy, %": round(100 * found.tables["final"]["accuracy"].iloc[0], 2),
            "data": about["data_title"], "device": about["device"],
            "finished": about["finished"][:16].replace("T", " "), "commit": text.short_commit(about["commit"]),
            "versions": ", ".join(f"{name} {version}" for name, version in made_with.items() if version) or NONE,
        })
    table = pd.DataFrame(rows, columns=list(_RUNS))
    return table.sort_values(["profile", "figures", "configuration", "seed"], ignore_index=True)


@functools.lru_cache(maxsize=256)
def _users(profile: str, data: DataSpec, seed: int) -> dict[str, dict[str, str]]:
    """For each run id of this seed the figures that ask for it, with the configuration's label in each."""
    found: dict[str, dict[str, str]] = {}
    if profile in PROFILES:
        for figure in experiments.EXPERIMENTS.values():
            for label, spec in figure.runs(PROFILES[profile], data, [seed]):
                found.setdefault(spec.id, {})[figure.name] = label
    return found


def _pruning(p: PruningSpec | None) -> dict[str, str]:
    if p is None:
        return dict.fromkeys(("r", "target", "score", "units", "effect"), NONE)
    when = "before training" if p.scratch else "once" if once(p) else str(p.retrain)
    return {"r": when, "target": p.target, "score": p.score, "units": _UNITS[p.structure],
            "effect": f"{p.effect}, {p.batches} batches" if p.batches else p.effect}


def runs_html(table: pd.DataFrame) -> str:
    """What `runs` gives as a table that sorts by a click on a heading and shows the rows that match what is typed.

    It needs itables' script, which `itables.init_notebook_mode(connected=False)` puts into the page.
    """
    from itables import to_html_datatable

    return to_html_datatable(
        table, connected=False, allow_html=False, table_id="runs", showIndex=False, maxBytes=0, scrollX=True,
        display_logo_when_loading=False, text_in_header_can_be_selected=False, classes="display compact nowrap",
        style="width:100%", pageLength=25,
        lengthMenu=[10, 25, 100, {"label": "all", "value": -1}],
        # in another order than itables' own, which it would leave out where a page holds every row
        layout={"topStart": "search", "topEnd": "pageLength", "bottomStart": "info", "bottomEnd": "paging"},
        language={"search": "Filter:", "info": "_START_ to _END_ of _TOTAL_ runs", "infoEmpty": "no run",
                  "infoFiltered": "(of _MAX_)", "lengthMenu": "_MENU_ a page", "zeroRecords": "no run matches"})


def number(row: dict, prefix: str = "") -> str:
    """A claim's estimate with interval and unit, or a dash where there is none; `prefix` "small_" for that scale."""
    return text.number(*(row[prefix + name] for name in ("estimate", "low", "high", "unit", "confidence")))


def seeds(row: dict) -> str:
    """How many seeds decide a claim at full width, and at which profile, for a column of that name; what else is counted says
    so."""
    other = _COUNTED[row["id"]].replace("seeds", "")
    return f"{row['n']} {other} ({row['profile']})".replace("  ", " ") if row["n"] else "0"


def aside(row: dict, prefix: str = "") -> str:
    """What stands beside a claim's verdict: its reservation, Holm's p over all claims; where it is open, what these seeds
    could find."""
    p, smallest, needed, unit = (row[prefix + name] for name in ("p_holm", "smallest_effect", "seeds_needed", "unit"))
    verdict = row["small_scale" if prefix else "verdict"]
    words = [row[prefix + "but"]] if row[prefix + "but"] else []
    words += [f"Holm's p {p:.2g}" + ", which does not uphold it" * bool(verdict in DECIDED and p >= LEVEL)] if p == p else []
    if verdict == INCONCLUSIVE and smallest == smallest:
        words.append(f"these {_COUNTED.get(row.get('id'), 'seeds')} would find {text.number(smallest, math.nan, math.nan, unit)} or more")
        words += [f"what was seen needs {float(f'{needed:.2g}'):.0f} seeds"] if needed < 1e6 else []
    return ", ".join(words)


def answers(table: pd.DataFrame) -> str:
    """Predictions with their rules and what the runs answer (`gstlib.claims.beyond.answers`), as Markdown."""
    blocks = []
    for row in table.to_dict("records"):
        if row["verdict"] == NOT_RUN:
            told = row["why"].partition("; make them")[0] or "no run"
        else:
            told = ", ".join(filter(None, [f"{number(row)}, n = {row['n']}", aside(row)]))
        parts = "".join(f"\n> - {part}" for part in filter(None, row["note"].split("; ")))
        blocks.append(f"> **{row['id']}, predicted on {row['day']}.** {row['statement']}\n>\n"
                      f"> *Rule:* {row['statistic']}; {row['test']}.\n>\n"
                      f"> *Answer:* **{row['verdict']}**: {told}.\n>{parts}")
    return "\n\n<!-- -->\n\n".join(blocks)


def claims_html(table: pd.DataFrame) -> str:
    """What `claims.evaluate` gives as the front page's table, each claim linked to the page of its figure."""
    headings = ("claim", "paper", "here, full width", "seeds", "verdict", "small scale (mini)")
    lines = ['<table class="table claims">', "<thead><tr>", *(f"<th>{name}</th>" for name in headings),
             "</tr></thead>", "<tbody>"]
    for row in table.to_dict("records"):
        full, small = (escape(number(row, prefix)) + _part(row, prefix) for prefix in ("", "small_"))
        cells = (f'{_link(row)} {escape(row["statement"])}', escape(row["published"]), NONE if row["verdict"] == NOT_RUN else full,
                 escape(seeds(row)), _badge(row), _badge(row, "small_", "" if small == NONE else f" {small}"))
        lines += ["<tr>", *(f"<td>{cell}</td>" for cell in cells), "</tr>"]
    return "\n".join([*lines, "</tbody>", "</table>"])


def conclusions(table: pd.DataFrame) -> str:
    """What was reproduced at full width, what was not, what stays open and what was not looked at, as an HTML list."""
    after, small = upheld(table), upheld(table, "small_")
    alone = table["verdict"].isin(DECIDED) & (after == INCONCLUSIVE)
    stated = (("Reproduced at full width", after == SUPPORTED), ("Contradicted at full width", after == CONTRADICTED),
              ("Seen at full width, but not upheld when all claims are tested together", alone),
              ("Open at full width", (after == INCONCLUSIVE) & ~alone))
    named = (("Looked at on a small scale alone, and decided there", (after == NOT_RUN) & small.isin(DECIDED)),
             ("Looked at on a small scale alone, and open there", (after == NOT_RUN) & (small == INCONCLUSIVE)),
             ("Not looked at yet", (after == NOT_RUN) & (small == NOT_RUN)))

    def told(row: dict) -> str:
        but = f", but {row['but']}" * bool(row["but"])
        return (f"<li>{_link(row)} {escape(row['statement'])} {escape(number(row))}{_part(row, '')}, "
                f"{row['n']} {_COUNTED[row['id']]}, profile {escape(row['profile'])}{escape(but)}.</li>")

    lines = [f"<li><strong>{name}:</strong><ul>{''.join(map(told, table[which].to_dict('records')))}</ul></li>"
             for name, which in stated if which.any()]
    lines += [f"<li><strong>{name}:</strong> {', '.join(map(_link, table[which].to_dict('records')))}.</li>"
              for name, which in named if which.any()]
    return f'<ul class="conclusions">{"".join(lines)}</ul>'


def _link(row: dict) -> str:
    page = PAGES.get(row["id"], PAGES.get(row["figure"], "chapters/claims"))
    return f'<a href="{page}.html" title="{escape(row["statement"])}"><strong>{row["id"]}</strong></a>'


def _part(row: dict, prefix: str) -> str:
    """Of a claim of several parts the one that its number is of."""
    several = sum(part.endswith(VERDICTS) for part in row[prefix + "note"].split("; ")) > 1
    return f" <small>{escape(row[prefix + 'part'])}</small>" * several


def _badge(row: dict, prefix: str = "", estimate: str = "") -> str:
    """A verdict, its estimate where there is no column for it, and what stands beside it."""
    verdict, words = row["small_scale" if prefix else "verdict"], aside(row, prefix)
    return (f'<span class="verdict {verdict.replace(" ", "-")}">{verdict}</span>{estimate}'
            + (f" <small>{escape(words)}</small>" if words else ""))


def verdicts_sentence(table: pd.DataFrame, store: Store) -> str:
    """How many claims have which verdict, as `claims.upheld` gives them, from how many runs, in words."""
    def counted(prefix: str = "") -> str:
        counts = upheld(table, prefix).value_counts()
        return ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if verdict in counts)

    days = [about["finished"][:10] for _, _, about in store.about()]
    made = f"{len(days)} stored run{'s' * (len(days) != 1)}" + (f", the last finished on {max(days)}" if days else "")
    return (f"From {made}. At full width: {counted()}. At small scale: {counted('small_')}."
            + " What Holm's p over all claims that were run does not uphold counts as inconclusive." * bool(days))


def made_on(about: dict) -> str:
    """Where, with what and when something was made, in words (HTML; every text escaped)."""
    device, torch, finished, commit = (escape(str(value)) for value in (
        about["device"], about["versions"]["torch"], str(about["finished"])[:10], text.short_commit(str(about["commit"]))))
    return f"{device}, torch {torch}, {finished}, commit <code>{commit}</code>"


def _digits(value: float) -> str:
    """Three digits, of thousands all."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def bench_machine(result: dict) -> str:
    """Where and when a benchmark was made, in words (HTML)."""
    machine = result["machine"]
    return (f"<p>Measured on {made_on(machine)}, {escape(str(machine['cores']))} cores, full-width networks, batch 128"
            + (", a few steps of each" if machine["quick"] else "")
            + f". Peaks in that session: {_digits(machine['peak_operations_per_s'] / 1e12)} TFLOP/s, "
              f"{_digits(machine['peak_bytes_per_s'] / 1e9)} GB/s.</p>")


def bench_html(result: dict) -> list[tuple[str, str]]:
    """(heading, table) of a benchmark's speeds, of what each technique gives, and of what events and scores cost."""
    rows, techniques, costs = (pd.DataFrame(result[name]) for name in ("rows", "techniques", "costs"))
    if not rows.empty:
        rows["memory"] = rows["peak_memory_bytes"].astype(float) / 2**30
    shown = (("Speed", rows, {
        "model": "network", "replicas": "runs", "steps_per_s": "steps/s", "plain_steps_per_s": "plain loop, steps/s",
        "ratio_to_plain_loop": "ratio", "seconds_per_epoch": "s an epoch", "compute_floor_ms": "floor, ms (operations)",
        "memory_floor_ms": "floor, ms (memory)", "gap": "gap", "memory": "GiB"}),
        ("What each technique gives", techniques, {
            "model": "network", "replicas": "runs", "technique": "technique", "steps_per_s": "steps/s with it",
            "steps_per_s_without": "without", "gain": "gain"}),
        ("What events, tests and scores cost", costs, {
            "model": "network", "cost": "what", "ms": "ms", "training_steps": "in training steps"}))
    return [(heading, frame.reindex(columns=list(names)).rename(columns=names).to_html(
        index=False, border=0, classes="table", escape=True, na_rep=NONE, float_format=_digits))
        for heading, frame, names in shown if not frame.empty]
