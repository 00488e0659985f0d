"""Figures that move: a study in, a Vega-Lite chart out, and the HTML that a page shows of it.

A chart's numbers come from stored runs, or from formulas that the tests compare with gstlib's own.  The page holds the
specification with its rows and a still picture; `book/_ext/moving.js` draws the one in the place of the other.  Colours
of text and axes are the page's own (`currentColor`), so that a figure follows its theme.
"""

import json
from collections.abc import Iterable, Mapping
from html import escape

import altair as alt
import numpy as np
import pandas as pd
import vl_convert
from IPython.display import HTML

from gstlib.reading import figures, text
from gstlib.reading.figures import BLUE, GREEN, ORANGE, PURPLE, VERMILION
from gstlib.reading.interval import FEWEST, Estimate, t_interval
from gstlib.reading.study import Study, same_seeds

_WIDTH, _GAP, _MARGIN = 700, 20, 74  # of the still picture, between two panels side by side, of an axis: as in moving.js
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_INK, _QUIET = "currentColor", 0.25
_LAYERS = (BLUE, ORANGE, GREEN, PURPLE)
_TARGETS = figures.COLOURS | {"D": PURPLE}
_CONFIG = {
    "background": "transparent", "font": _FONT, "view": {"stroke": None},
    "axis": {"labelColor": _INK, "titleColor": _INK, "domainColor": _INK, "tickColor": _INK, "gridColor": _INK,
             "gridOpacity": 0.12, "domainOpacity": 0.5, "tickOpacity": 0.5, "labelFontSize": 12, "titleFontSize": 12,
             "titleFontWeight": "normal"},
    "axisY": {"minExtent": 34, "maxExtent": 34, "tickCount": 5, "titlePadding": 6},
    "axisX": {"tickCount": 6, "labelFlush": False},
    "legend": {"labelColor": _INK, "titleColor": _INK, "labelFontSize": 12, "titleFontSize": 12, "labelLimit": 240,
               "titleFontWeight": "normal", "orient": "bottom", "columns": 3, "symbolOpacity": 1},
    "title": {"color": _INK, "fontSize": 13, "fontWeight": "normal", "anchor": "start"},
    "text": {"color": _INK, "fontSize": 13}, "rule": {"color": _INK},
}


def _panel(columns: int = 1) -> int:
    """The width of a panel's inside in the still picture."""
    return (_WIDTH - _GAP * (columns - 1)) // columns - _MARGIN


def _percent(values: Iterable[float], digits: int = 2) -> list[float]:
    return [round(100 * float(value), digits) for value in values]


def _ways(study: Study) -> dict[str, str]:
    """What readers call each configuration that has runs, with its colour; the unpruned one has that of the text."""
    return {figures.legend_name(study, label): figures.method_colour(study.printed[label])
            if study.spec(label).pruning else _INK for label in figures.drawn(study, study.labels)}


def _of_runs(study: Study) -> list[dict]:
    """A row a run: what was done, seed, and its test accuracy (per cent) over the epochs with the falls in between."""
    points = figures.traces(study)
    return [{"run": f"{figures.legend_name(study, label)}, seed {seed}", "way": figures.legend_name(study, label),
             "seed": int(seed), "epoch": [round(float(epoch), 2) for epoch in rows["epoch"]],
             "accuracy": _percent(rows["accuracy"])}
            for label in figures.drawn(study, study.labels)
            for seed, rows in points[points["label"] == label].groupby("seed")]


def _coloured(ways: Mapping[str, str], **more) -> alt.Color:
    return alt.Color("way:N", scale=alt.Scale(domain=[*ways], range=[*ways.values()]), title=None, **more)


def linked(study: Study) -> alt.HConcatChart:
    """Figure 1 with its runs linked: a point a run, instability against accuracy, and beside it every run's curve.

    Pointing at a run, or choosing it from the list, brings out its curve; a box keeps the last quarter of training.
    """
    ways, last = _ways(study), int(study.epochs["epoch"].max())
    found = {(figures.legend_name(study, row.label), row.seed): row for row in study.runs.itertuples()}
    rows = _of_runs(study)
    for row in rows:
        run = found[row["way"], row["seed"]]
        (row["final"],), (row["instability"],) = (
            _percent([run.final_accuracy]), _percent([0 if np.isnan(run.mean_instability) else run.mean_instability], 3))
    names = [row["run"] for row in rows]
    chosen = alt.selection_point("run", fields=["run"], on="pointerover", clear=False, nearest=True,
                                 bind=alt.binding_select(options=[None, *names], labels=["all", *names], name="Run"))
    quarter = alt.param("quarter", value=False, bind=alt.binding_checkbox(name="Last quarter of training only"))
    bright = alt.condition(chosen, alt.value(0.6), alt.value(0.1))
    points = alt.Chart(alt.NamedData("runs")).mark_point(filled=True, strokeWidth=1.5).encode(
        alt.X("instability:Q", title="mean instability (points)"),
        alt.Y("final:Q", title="final test accuracy (%)", scale=alt.Scale(zero=False)),
        _coloured(ways, legend=alt.Legend(title=None, symbolType="circle", symbolStrokeWidth=0, symbolSize=90)),
        opacity=alt.condition(chosen, alt.value(0.9), alt.value(_QUIET)),
        size=alt.condition(chosen, alt.value(230), alt.value(70), empty=False),
        tooltip=[alt.Tooltip("run:N"), alt.Tooltip("instability:Q", title="mean instability (points)"),
                 alt.Tooltip("final:Q", title="final test accuracy (%)")],
    ).add_params(chosen, quarter)
    curves = alt.Chart(alt.NamedData("runs")).transform_flatten(["epoch", "accuracy"]).transform_filter(
        f"!quarter || datum.epoch >= {last - last // 4}").mark_line(interpolate="linear", aria=False).encode(
        alt.X("epoch:Q", title="epoch", scale=alt.Scale(nice=False, zero=False)),
        alt.Y("accuracy:Q", title="test accuracy (%)", scale=alt.Scale(zero=False)),
        _coloured(ways), detail="run:N", opacity=bright,
        strokeWidth=alt.condition(chosen, alt.value(2.5), alt.value(1), empty=False),
    ).properties(width=_panel(2), height=230)
    means = []
    for way in ways:
        of = [row for row in rows if row["way"] == way]
        found = _shown(t_interval(row["final"] for row in of))
        means.append({"way": way, "instability": float(np.mean([row["instability"] for row in of])), "final": found.value,
                      "low": found.low, "high": found.high})
    mean = alt.Chart(alt.NamedData("means")).encode(alt.X("instability:Q"), _coloured(ways))
    return alt.hconcat(
        alt.layer(mean.mark_rule(strokeWidth=2, opacity=0.7, aria=False).encode(alt.Y("low:Q"), y2="high:Q"),
                  mean.mark_tick(orient="horizontal", thickness=3, size=16, opacity=1, aria=False).encode(alt.Y("final:Q")),
                  points).properties(width=_panel(2), height=230),
        curves, spacing=_GAP).properties(
            description=f"Final test accuracy against mean instability, {len(rows)} runs of {study.runs['model'].iloc[0]}, "
                        f"and each run's accuracy over training. {slope(study)}",
            datasets={"runs": rows, "means": _records(pd.DataFrame(means))})


def slope(study: Study) -> str:
    """In a sentence what Figure 1 asks: points of final accuracy that go with a tenfold instability, within seeds."""
    found = text.accuracy_slopes(study)
    return (f"A tenfold instability goes with {found:.2f} points of final test accuracy, a t interval over {found.n} seeds."
            if found.n > 1 else "There are too few seeds for a slope with its interval.")


def fall_and_recovery(study: Study) -> alt.VConcatChart:
    """One run of a study, whose runs are all pruned, through its epochs: accuracy, the fall at each event, filters that go.

    Method, seed and epoch are chosen; the epoch also plays.  A filter is a cell of its layer's strip, in the order of
    removal, and goes grey at its event.
    """
    ways, last = _ways(study), int(study.epochs["epoch"].max())
    rows, events, filters = _of_runs(study), [], []
    layers = list(dict.fromkeys(study.events["layer"]))
    for label in figures.drawn(study, study.labels):
        way, part = figures.legend_name(study, label), study.events[study.events["label"] == label]
        for seed, struck in part.groupby("seed"):
            events.append({"way": way, "seed": int(seed), "epoch": struck["epoch"].tolist(),
                           "layer": struck["layer"].tolist(), "change": _percent(struck["t_post"] - struck["t_pre"])})
        for layer, struck in part[part["seed"] == part["seed"].min()].groupby("layer", sort=False):
            gone = struck["epoch"].repeat(struck["removed"]).tolist()
            left = int(struck["units"].iloc[0]) - len(gone)
            filters.append({"way": way, "layer": layer, "gone": gone + [last + 1] * left})
    best = max(ways, key=lambda way: max((abs(c) for e in events if e["way"] == way for c in e["change"]), default=0))
    way = alt.param("way", value=best, bind=alt.binding_select(options=[*ways], name="Method"))
    seeds = sorted({row["seed"] for row in rows})
    first = min(e["seed"] for e in events if e["way"] == best)
    seed = alt.param("seed", value=first, bind=alt.binding_select(options=seeds, name="Seed"))
    now = alt.param("epoch", value=last, bind=alt.binding_range(min=0, max=last, step=1, name="Epoch"))
    deepest = min(min(e["change"]) for e in events if (e["way"], e["seed"]) == (best, first))
    this = "datum.way == way && datum.seed == seed"
    x = alt.X("epoch:Q", title=None, scale=alt.Scale(domain=[0, last], nice=False, padding=0))
    # one scale for all runs: they compare, and an epoch before the first test or a run that is not stored leaves it whole
    accuracies, changes = ([value for row in some for value in row[name]]
                           for some, name in ((rows, "accuracy"), (events, "change")))
    y = alt.Y("accuracy:Q", title="test accuracy (%)",
              scale=alt.Scale(domain=[min(accuracies), max(accuracies)], zero=False))
    whole = alt.Chart(alt.NamedData("runs")).transform_filter(this).transform_flatten(["epoch", "accuracy"])
    till = whole.transform_filter("floor(datum.epoch) <= epoch")
    line = alt.layer(
        whole.mark_line(opacity=_QUIET, strokeWidth=1, aria=False).encode(x, y, _coloured(ways, legend=None)),
        till.mark_line(strokeWidth=2, aria=False).encode(x, y, _coloured(ways, legend=None)),
        alt.Chart(alt.InlineData([{}])).mark_rule(opacity=0.4, strokeDash=[3, 3], aria=False).encode(
            x=alt.datum(alt.expr("epoch"), type="quantitative")),
        till.transform_joinaggregate(latest="max(epoch)").transform_filter("datum.epoch == datum.latest").mark_text(
            align="right", fontSize=14, fontWeight=600, x="width", y="height", dy=-6, dx=-4).transform_calculate(
            words="'epoch ' + epoch + ': ' + format(datum.accuracy, '.1f') + '%'").encode(text="words:N"),
    ).add_params(way, seed, now).properties(width=_panel(), height=220)
    shade = alt.condition("datum.epoch <= epoch", alt.value(1), alt.value(_QUIET))
    colours = alt.Scale(domain=layers, range=_LAYERS[:len(layers)])
    struck = alt.Chart(alt.NamedData("events")).transform_filter(this)
    falls = struck.transform_flatten(["epoch", "layer", "change"]).mark_bar(
        width=3, aria=False).encode(
        x, alt.Y("change:Q", title="change (points)", axis=alt.Axis(values=[-50, -20, -5, -1, 0, 1, 5, 20]), scale=alt.Scale(
            type="symlog", constant=0.3, domain=[min(changes + [-1]), max(changes + [0])], padding=6, nice=False)),
        opacity=shade, color=alt.Color("layer:N", scale=colours, legend=None),
        tooltip=["epoch:Q", "layer:N", alt.Tooltip("change:Q", title="change at the event (points)")],
    ).properties(width=_panel(), height=90)
    deep = 4  # filters in a column of a strip
    strip = alt.Chart(alt.NamedData("filters")).transform_filter("datum.way == way").transform_calculate(
        number="sequence(length(datum.gone))").transform_flatten(["number", "gone"]).transform_calculate(
        column=f"floor(datum.number / {deep})", row=f"datum.number % {deep}").mark_rect(aria=False).encode(
        alt.X("column:O", axis=None, scale=alt.Scale(paddingInner=0.25)),
        alt.Y("layer:N", sort=layers, title=None, scale=alt.Scale(paddingInner=0.3)),
        alt.YOffset("row:O", scale=alt.Scale(paddingInner=0.25)), color=alt.condition(
            "datum.gone <= epoch", alt.value("#666"), alt.Color("layer:N", scale=colours, legend=None)),
        opacity=alt.condition("datum.gone <= epoch", alt.value(0.3), alt.value(1)),
    ).properties(width=_panel(), height=160, title="filters, grey once they are removed")
    return alt.vconcat(line, falls, strip, spacing=8).resolve_scale(color="independent").properties(
        description="Test accuracy over the epochs, the change at each event and the filters that are left, for the run "
                    f"that is chosen; at first {best}, seed {first}, whose deepest fall is {-deepest:.1f} points.",
        datasets={"runs": rows, "events": events, "filters": filters}, usermeta={"play": "epoch"})


def expected_activation() -> alt.HConcatChart:
    """E[BN] with its scale and shift on sliders: the density behind batch normalisation, cut at 0, and the area."""
    scale, shift, weights = (
        alt.param(name, value=value, bind=alt.binding_range(min=low, max=high, step=step, name=words))
        for name, value, low, high, step, words in (
            ("scale", 1, -2, 2, 0.05, "Scale γ"), ("shift", -0.3, -3, 3, 0.05, "Shift β"),
            ("times", 1, 0.1, 3, 0.1, "All weights times")))
    g = alt.param("g", expr="abs(scale)")
    z = alt.param("z", expr="g > 0 ? shift / g : 0")
    ebn = alt.param("ebn", expr="g > 0 ? g * densityNormal(z, 0, 1) + shift * cumulativeNormal(z, 0, 1) : max(shift, 0)")
    norm = alt.param("norm", expr="times")
    grid = alt.Chart(alt.sequence(-6, 6.001, 0.05, as_="value")).transform_calculate(
        side="datum.value < 0 ? 'cut to 0 by the ReLU' : 'passes the ReLU'",
        density="g > 0 ? densityNormal(datum.value, shift, g) : 0", part="max(datum.value, 0) * datum.density")
    x = alt.X("value:Q", title="output of batch normalisation", scale=alt.Scale(domain=[-6, 6], nice=False))
    colour = alt.Color("side:N", legend=alt.Legend(title=None, columns=2), scale=alt.Scale(
        domain=["cut to 0 by the ReLU", "passes the ReLU"], range=["#8c8c8c", BLUE]))
    density = alt.layer(
        grid.mark_area(opacity=0.45, aria=False).encode(x, alt.Y("density:Q", title="density", stack=None), colour),
        grid.mark_line(strokeWidth=1.5, color=_INK, aria=False).encode(x, alt.Y("density:Q")),
        alt.Chart(alt.InlineData([{}])).mark_rule(strokeDash=[4, 3], aria=False).encode(x=alt.datum(0, type="quantitative")),
    ).add_params(scale, shift, weights, g, z, ebn, norm).properties(width=_panel(2), height=190, title="density, cut at 0")
    area = grid.mark_area(opacity=0.45, color=VERMILION, aria=False).encode(
        x, alt.Y("part:Q", title="value × density", stack=None)).properties(width=_panel(2), height=190, title=alt.Title(
            text=alt.expr("'what passes: area = E[BN] = ' + format(ebn, '.4f')")))
    bars = alt.Chart(alt.InlineData([{"score": "E[BN]"}, {"score": "l2 norm"}])).transform_calculate(
        size="datum.score == 'E[BN]' ? ebn : norm").mark_bar(height=16).encode(
        alt.X("size:Q", title="score (the norm: 1 at the start)", scale=alt.Scale(domain=[0, 3], clamp=True)),
        alt.Y("score:N", title=None),
        alt.Color("score:N", legend=None, scale=alt.Scale(domain=["E[BN]", "l2 norm"], range=[VERMILION, PURPLE])))
    return ((density | area) & bars.properties(width=_panel(), height=60)).resolve_scale(color="independent").properties(
        description="A normal density that is cut at 0, and the area behind it: the expected activation E[BN], "
                    "which follows scale and shift. The norm of the weights follows neither, and E[BN] does not "
                    "follow the weights.")


def schedule() -> alt.VConcatChart:
    """One layer's schedule with s, e, p and r on sliders: its events as a strip, the units removed as a staircase.

    Begins with the last of Figure 1's layers at r = 40, whose 13% are the figure's largest rate.
    """
    sliders = [alt.param(name, value=value, bind=alt.binding_range(min=low, max=high, step=step, name=words))
               for name, value, low, high, step, words in (
                   ("s", 6, 0, 50, 1, "First epoch s"), ("e", 275, 50, 320, 1, "Last epoch e"),
                   ("p", 0.9, 0, 1, 0.05, "Share in all p"), ("r", 40, 1, 150, 1, "Epochs between r"))]
    units = alt.param("units", value=512, bind=alt.binding_select(options=[64, 128, 256, 512], name="Units of the layer"))
    events = alt.param("events", expr="floor((e - s) / r) + 1")
    total = alt.param("total", expr="floor(round(p * units * 1e9) / 1e9)")
    rate = alt.param("rate", expr="p / events")
    epochs = alt.Chart(alt.sequence(0, 326, 1, as_="epoch")).transform_calculate(
        done="datum.epoch < s ? 0 : min(events, floor((datum.epoch - s) / r) + 1)").transform_calculate(
        removed="floor(total * datum.done / events)")
    scale = alt.Scale(domain=[0, 325], nice=False)
    strip = alt.layer(
        alt.Chart(alt.InlineData([{}])).mark_rule(opacity=0.5, aria=False).encode(
            alt.XDatum(alt.expr("s"), type="quantitative", axis=None, scale=scale), alt.X2Datum(alt.expr("e"))),
        epochs.transform_filter("datum.epoch >= s && datum.epoch <= e && (datum.epoch - s) % r == 0").mark_tick(
            thickness=2, height=26, color=VERMILION, aria=False).encode(alt.X("epoch:Q", axis=None, scale=scale)),
    ).properties(width=_panel(), height=28, title=alt.Title(text=alt.expr(
        "events + (events > 1 ? ' events' : ' event') + ', the rate is ' + format(rate, '.1%') + ' of the layer'")))
    stairs = epochs.mark_area(interpolate="step-after", line={"color": BLUE, "strokeWidth": 2}, color=BLUE,
                              opacity=0.3, aria=False).encode(
        alt.X("epoch:Q", title="epoch", scale=scale),
        alt.Y("removed:Q", title="units removed", stack=None, scale=alt.Scale(domain=[0, alt.expr("units")], nice=False)))
    return alt.vconcat(strip, stairs.properties(width=_panel(), height=200), spacing=4).add_params(
        *sliders, units, events, total, rate).properties(
            description="Pruning events over the epochs and the number of units that are gone, by first and last "
                        "epoch, share and period. Figure 1's last layer has 7 events at r = 40, a rate of 13%; 18% at "
                        "60, 30% at 100.")


def _shown(found: Estimate) -> Estimate:
    """The estimate, without width where there are too few runs for an interval: a rule of no length is not seen."""
    return found if found.n >= FEWEST else found._replace(low=found.value, high=found.value)


def doses(studies: Iterable[Study]) -> pd.DataFrame:
    """A row a way of pruning in training, on true labels, of the studies: its means with 95% intervals over the seeds that
    all ways of its network have, and the figures that show it.

    instability (points, the mean of logarithms raised again) and accuracy (per cent), each with low and high (see
    `_shown`), rate (per cent), target ("D" for every decile), score, network, seeds, figures (a list).
    """
    found: dict[str, dict] = {}
    frames = []
    for study in studies:
        for label in figures.drawn(study, study.labels):
            if (spec := study.spec(label)).pruning is None or spec.pruning.scratch or spec.data.wrong_labels:
                continue
            if spec.id not in found:
                frames.append(study.runs[study.runs["label"] == label].assign(way=spec.id))
                found[spec.id] = {
                    "way": figures.legend_name(study, label), "network": spec.model.name, "target": spec.pruning.target[0],
                    "rate": round(100 * spec.pruning.schedule.iterative_rate, 2), "figures": []}
            found[spec.id]["figures"].append(study.experiment.title.partition(":")[0])
    for _, part in pd.concat(frames).groupby("model") if frames else ():
        for way, runs in same_seeds(part, "way").groupby("way"):
            fall, accuracy = map(_shown, (t_interval(runs["log_instability"]), t_interval(100 * runs["final_accuracy"])))
            found[way] |= {
                "seeds": fall.n, **{f"instability{end}": float(100 * 10**value)
                                    for end, value in zip(("", "_low", "_high"), fall)},
                **{f"accuracy{end}": value for end, value in zip(("", "_low", "_high"), accuracy)}}
    return pd.DataFrame(found.values())


def dose(rows: pd.DataFrame) -> alt.LayerChart:
    """Every way of pruning as a point with its intervals, instability against accuracy; `rows` as `doses` gives them.

    Colour is the target, size the iterative rate, shape the network; the figure is chosen.
    """
    # few seeds have intervals beyond what an accuracy can fall, and what JSON and the axis can hold
    rows = rows.assign(**{f"{what}_{end}": rows[f"{what}_{end}"].clip(least, 100)
                          for what, least in (("instability", 1e-3), ("accuracy", 0)) for end in ("low", "high")})
    every = list(dict.fromkeys(name for names in rows["figures"] for name in names))
    chosen = alt.param("figure", value="Figure 4" if "Figure 4" in every else "every figure",
                       bind=alt.binding_select(options=["every figure", *every], name="Figure"))
    targets = {t: colour for t, colour in _TARGETS.items() if t in set(rows["target"])}
    base = alt.Chart(alt.NamedData("ways")).transform_filter(
        "figure == 'every figure' || indexof(datum.figures, figure) >= 0").encode(
        color=alt.Color("target:N", scale=alt.Scale(domain=[*targets], range=[*targets.values()])))
    across = {"title": "mean instability (points)", "scale": alt.Scale(type="log", nice=False, padding=16),
              "axis": alt.Axis(values=[digit * 10.0**power for power in range(-4, 2) for digit in (1, 2, 5)])}
    up = {"title": "final test accuracy (%)", "scale": alt.Scale(zero=False, padding=10)}
    x, y = alt.X("instability:Q", **across), alt.Y("accuracy:Q", **up)
    tooltip = [alt.Tooltip("way:N"), alt.Tooltip("network:N"), alt.Tooltip("seeds:Q"),
               alt.Tooltip("rate:Q", title="rate (% of a layer)"),
               alt.Tooltip("instability:Q", title="mean instability (points)", format=".3f"),
               alt.Tooltip("accuracy:Q", title="final test accuracy (%)", format=".2f")]
    points = base.mark_point(filled=True, opacity=0.85).encode(
        x, y, size=alt.Size("rate:Q", title="rate (%)", scale=alt.Scale(range=[40, 420], domainMin=0),
                                          legend=alt.Legend(symbolFillColor=_INK, tickCount=3)),
        shape=alt.Shape("network:N", title="network", legend=alt.Legend(symbolFillColor=_INK)), tooltip=tooltip)
    return alt.layer(
        base.mark_rule(opacity=0.6, aria=False).encode(alt.X("instability_low:Q", **across), y, x2="instability_high:Q"),
        base.mark_rule(opacity=0.6, aria=False).encode(x, alt.Y("accuracy_low:Q", **up), y2="accuracy_high:Q"),
        points,
    ).add_params(chosen).properties(
        description=f"{len(rows)} ways of pruning by mean instability, {rows['instability'].min():.2g} to "
                    f"{rows['instability'].max():.2g} points, and final test accuracy, {rows['accuracy'].min():.1f} to "
                    f"{rows['accuracy'].max():.1f}%.",
        width=_panel(), height=320, datasets={"ways": _records(rows)})


def _records(rows: pd.DataFrame) -> list[dict]:
    """Rows as JSON takes them, numbers rounded, null for what is not there."""
    return json.loads(rows.to_json(orient="records", double_precision=4))


def html(chart: alt.TopLevelMixin, name: str, caption: str = "") -> HTML:
    """A chart as a page shows it: a still picture, and the specification from which a script draws what moves.

    `name` is the figure's id; the chart's description becomes the picture's alternative text; `caption` (HTML) is set
    beneath it.
    """
    spec = chart.to_dict() | {"config": _CONFIG}
    # one picture alone until the script has drawn; ids of its parts are named for it, since a page may hold several
    still = vl_convert.vegalite_to_svg(spec).replace("clip", f"{name}-clip").replace(
        "<svg ", f'<svg role="img" aria-label="{escape(spec["description"])}" ', 1)
    data = json.dumps(spec, separators=(",", ":")).replace("<", "\\u003c")
    return HTML(f'<figure class="moving" id="{name}"><div class="still">{still}</div>'
                f'<script type="application/json">{data}</script>'
                + (f"<figcaption>{caption}</figcaption>" if caption else "") + "</figure>")


def png(chart: alt.TopLevelMixin) -> bytes:
    """A chart as a picture on white, in PNG."""
    still = vl_convert.vegalite_to_svg(chart.to_dict() | {"config": _CONFIG | {"background": "white"}})
    return vl_convert.svg_to_png(still.replace(_INK, "#222"), scale=1.6)
