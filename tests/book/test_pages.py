"""The pages beside the figures: the front page's claims, the table of runs, the costs, and `Prune your own network`."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from IPython.display import HTML as Html
from IPython.display import Markdown
from made_up import ABOUT, DATA, SMOKE, fill
from test_book import BOOK, HTML, ROOT, WIDTHS, browser, built, site, toc_files, visit  # noqa: F401 (fixtures)

from gstlib import claims, data, experiments
from gstlib.bench import cost
from gstlib.book import tables
from gstlib.store import Store

HOSTILE = "</script><script>document.title = 'struck'</script><img src=x onerror=\"document.title = 'struck'\">"


def epochs(spec) -> dict:
    """As few rows as a run can have."""
    pruning, numbers = spec.pruning, range(spec.optimiser.epochs)
    return {"epoch": [{"epoch": number, "train_accuracy": 0.75, "test_accuracy": 0.4, "parameters": 1} for number in numbers],
            "event": [{"epoch": number, "layer": layer, "units": 1, "removed": 0, "removed_total": 0, "t_pre": 0.5, "t_post": 0.5}
                      for index, layer in enumerate(pruning.layers if pruning else ())
                      for number in pruning.schedule.event_epochs(index) if number in numbers],
            "final": [{"images": 9, "accuracy": 0.5, "loss": 1.0, "train_accuracy": 0.75, "train_loss": 0.1}]}


def code(name: str) -> list[str]:
    """The code cells of a chapter."""
    cells = json.loads((ROOT / "chapters" / f"{name}.ipynb").read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


class _Rows(HTMLParser):
    """The rows of an HTML table as texts, its links, and the names of all tags."""

    def __init__(self, text: str):
        super().__init__()
        self.rows, self.links, self.tags, self.classes, self._cell = [], [], set(), [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        known = dict(attributes)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self._cell = self._cell or tag in ("td", "th")
        if tag == "a":
            self.links.append(known["href"])
        if tag == "span":
            self.classes.append(known["class"])

    def handle_endtag(self, tag):
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, text):
        if self._cell:
            self.rows[-1][-1] += text


# ---------------------------------------------------------------- the front page

@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A store with three runs a configuration of Figure 1 (VGG11) at `quarter`, and what the claims say of it."""
    store = Store(tmp_path_factory.mktemp("judged") / "results")
    fill(store.path, "quarter")
    return store, claims.evaluate(store)


def test_the_table_of_claims_has_a_row_a_claim_with_its_verdict_and_a_link_to_its_page(judged):
    _, found = judged
    page = _Rows(tables.claims_html(found))
    assert [row[0].split()[0] for row in page.rows[1:]] == [claim.id for claim in claims.CLAIMS]
    by_id = {row[0].split()[0]: row for row in page.rows[1:]}
    c1 = found.set_index("id").loc["C1"]
    assert c1["verdict"] == "supported", "the made-up runs were made for this"
    estimate = f"{c1['estimate']:.2f} [{c1['low']:.2f}, {c1['high']:.2f}] points for a tenfold instability"
    assert by_id["C1"][1:5] == ["r = .84, p = 1.3e-11", estimate, "3 (quarter)",
                                f"supported Holm's p {c1['p_holm']:.2g}"]
    assert by_id["C2"][2:] == ["–", "0", "not run", "not run"]
    assert "verdict supported" in page.classes and "verdict not-run" in page.classes
    assert {link.removesuffix(".html") for link in page.links} <= set(toc_files())


def test_the_sentence_counts_verdicts_and_runs(judged):
    store, found = judged
    counts = found["verdict"].value_counts()
    text = tables.verdicts_sentence(found, store)
    assert text.startswith("From 15 stored runs, the last finished on 2026-01-02.")
    assert f"At full width: {counts['supported']} supported" in text and f"At small scale: {len(claims.CLAIMS)} not run." in text
    lost = found.assign(p_holm=found["p_holm"].where(found["id"] != "C1", 0.06))
    assert f"{counts['supported'] - 1} supported, 1 inconclusive" in tables.verdicts_sentence(lost, store)


def test_the_conclusions_name_every_claim_once_under_what_became_of_it(judged):
    _, found = judged

    def groups(table):
        parts = tables.conclusions(table).split("<li><strong>")[1:]
        return {part.partition(":</strong>")[0]: re.findall(r"<strong>(C\w+)</strong>", part) for part in parts}

    told = groups(found)
    assert sorted(sum(told.values(), [])) == sorted(claim.id for claim in claims.CLAIMS)
    assert "C1" in told["Reproduced at full width"] and "C2" in told["Not looked at yet"]
    c1 = found["id"] == "C1"
    assert groups(found.assign(verdict=found["verdict"].mask(c1, "contradicted")))["Contradicted at full width"] == ["C1"]
    assert groups(found.assign(verdict=found["verdict"].mask(c1, "inconclusive")))["Open at full width"] == ["C1"]
    lost = found.assign(p_holm=found["p_holm"].mask(c1, 0.06), but=found["but"].mask(c1, "by <worse> training"))
    assert groups(lost)["Seen at full width, but not upheld when all claims are tested together"] == ["C1"]
    page = tables.conclusions(lost)
    assert "3 seeds, profile quarter, but by &lt;worse&gt; training." in page and tables.number(found[c1].iloc[0].to_dict()) in page
    general = found.assign(verdict=found["verdict"].mask(found["id"] == "C1g", "supported"), n=found["n"].mask(found["id"] == "C1g", 26))
    assert ", 26 configurations, " in tables.conclusions(general) and "26 seeds" not in tables.conclusions(general)
    of = {row["id"]: tables.seeds(row) for row in general.to_dict("records")}
    assert of["C1"] == "3 (quarter)" and of["C1g"] == "26 configurations (quarter)" and of["C2"] == "0"
    small = found.assign(small_scale=found["small_scale"].mask(found["id"] == "C2", "supported").mask(found["id"] == "C4", "inconclusive"))
    told = groups(small)
    assert told["Looked at on a small scale alone, and decided there"] == ["C2"]
    assert told["Looked at on a small scale alone, and open there"] == ["C4"]
    hostile = _Rows(tables.conclusions(found.assign(statement=HOSTILE, unit=HOSTILE, but=HOSTILE)))
    assert {"script", "img"}.isdisjoint(hostile.tags)


def test_an_empty_store_s_sentence_names_no_date(tmp_path):
    store = Store(tmp_path / "none")
    text = tables.verdicts_sentence(claims.evaluate(store), store)
    assert text == "From 0 stored runs. At full width: 25 not run. At small scale: 25 not run."


def test_what_a_claim_says_is_escaped(judged):
    _, found = judged
    hostile = found.assign(statement=HOSTILE, published=HOSTILE, unit=HOSTILE)
    assert {"script", "img"}.isdisjoint(_Rows(tables.claims_html(hostile)).tags)


def test_beside_an_open_verdict_stands_what_the_seeds_could_have_found():
    row = {"verdict": "inconclusive", "small_scale": "supported", "p_holm": 0.4, "smallest_effect": 1.5, "seeds_needed": 14.0,
           "unit": "points", "but": ""}
    assert tables.aside(row) == "Holm's p 0.4, these seeds would find 1.50 points or more, what was seen needs 14 seeds"
    assert "needs 32000 seeds" in tables.aside(row | {"seeds_needed": 32137.0}), "as rough as such a number is"
    assert tables.aside(row | {"unit": "log10 ratio", "smallest_effect": 1.0, "seeds_needed": float("inf")}) == (
        "Holm's p 0.4, these seeds would find 10.00 times or more")
    assert "these configurations would find" in tables.aside(row | {"id": "C1g"}), "to whose number seeds add nothing"
    small = {f"small_{name}": value for name, value in row.items()} | {"small_scale": "supported", "small_p_holm": np.float64(0.4)}
    assert tables.aside(small, "small_") == "Holm's p 0.4, which does not uphold it"
    assert tables.aside(row | {"verdict": "not run", "p_holm": float("nan")}) == ""
    assert tables.aside(row | {"verdict": "supported", "but": "by worse training"}) == (
        "by worse training, Holm's p 0.4, which does not uphold it")


def test_an_interval_of_another_confidence_says_so():
    row = {"estimate": 1.0, "low": 0.5, "high": 2.0, "unit": "points", "confidence": 0.9}
    assert tables.number(row) == "1.00 [0.50, 2.00] points (90% interval)"
    assert tables.number(row | {"confidence": 0.95}) == "1.00 [0.50, 2.00] points"
    assert tables.number({f"small_{name}": value for name, value in row.items()}, "small_").startswith("1.00")
    assert tables.number(row | {"estimate": float("nan")}) == "–"


def test_every_claim_has_a_page_and_the_front_page_takes_its_table_from_the_claims():
    assert {claim.figure for claim in claims.CLAIMS} <= tables.PAGES.keys()
    assert set(tables.PAGES.values()) <= set(toc_files())
    front, glued = (BOOK / "index.md").read_text(), "\n".join(code("claims"))
    for key in ("claims-table", "claims-verdicts", "claims-conclusions"):
        assert key in front and f'glue("{key}"' in glued
    assert not re.search(r"supported|contradicted|inconclusive", front), "a verdict typed by hand would go stale"


# ---------------------------------------------------------------- the runs

def test_a_row_a_run_with_its_figures_and_its_accuracy(tmp_path):
    store = fill(tmp_path / "results")
    found = tables.runs(store).set_index("run")
    wanted = {run.spec.id: run for run in experiments.figures.figure1_vgg11(SMOKE, DATA, range(3))}
    assert set(found.index) == set(wanted) == set(store.ids())
    for run_id, run in wanted.items():
        row, p = found.loc[run_id], run.spec.pruning
        assert run.label in row["configuration"].split(", ")
        assert {"figure1-vgg11", "figureA2"} <= set(row["figures"].split(", "))
        assert row["network"] == "vgg11, width 0.125" and row["seed"] == run.spec.seed and row["profile"] == "smoke"
        assert (row["r"], row["target"], row["score"], row["units"]) == \
            ((str(p.retrain), p.target, p.score, "filters") if p else ("–",) * 4)
        accuracy = store.read(run_id).tables["final"]["accuracy"].iloc[0]
        assert row["accuracy, %"] == pytest.approx(100 * accuracy, abs=0.005)
        assert row["data"] == "scikit-learn digits" and row["commit"] == "c" * 10
        assert row["finished"] == "2026-01-02 03:04"


def test_a_shared_run_stands_once_and_names_every_figure_that_uses_it(tmp_path):
    found = tables.runs(fill(tmp_path / "results"))
    assert found["run"].is_unique
    plain = found[found["configuration"] == "none"]
    users = [set(figures.split(", ")) for figures in plain["figures"]]
    assert len(users) == 3 and all({"figure1-vgg11", "figure4", "figure5"} <= names for names in users)


def hostile_store(path) -> Store:
    """A store whose provenance was written by someone who means harm."""
    store = fill(path)
    run = experiments.figures.figure1_vgg11(SMOKE, DATA, [7])[1]
    tables_of = store.read(experiments.figures.figure1_vgg11(SMOKE, DATA, [0])[1].spec.id).tables
    about = ABOUT | {"versions": {HOSTILE: HOSTILE}} | dict.fromkeys(
        ("device", "data_title", "commit", "finished", "python", "profile"), HOSTILE)
    store.write(run.spec, about, {name: rows.to_dict("records") for name, rows in tables_of.items()})
    return store


def test_no_text_of_a_store_becomes_part_of_the_page_s_html(tmp_path):
    pytest.importorskip("itables")
    found = tables.runs(hostile_store(tmp_path / "results"))
    assert (found["device"] == HOSTILE).sum() == 1, "the store holds it"
    page = tables.runs_html(found)
    harmless = tables.runs_html(found.replace({HOSTILE: "-"}, regex=False))
    assert "document.title" in page, "the page shows it"
    for piece in ("<script", "</script", "<img"):
        assert page.count(piece) == harmless.count(piece)


def test_an_empty_store_has_no_runs_and_all_columns(tmp_path):
    found = tables.runs(Store(tmp_path / "none"))
    assert found.empty and list(found) == list(tables.runs(fill(tmp_path / "results")))


def test_a_run_that_no_figure_asks_for_is_listed_all_the_same(tmp_path, tiny_spec):
    store = Store(tmp_path / "results")
    spec = tiny_spec(seed=5)
    # as little as a foreign store may say
    about = {name: ABOUT[name] for name in ("profile", "data_title", "device", "finished", "commit")}
    store.write(spec, about, epochs(spec))
    (row,) = tables.runs(store).to_dict("records")
    assert row["figures"] == row["configuration"] == row["versions"] == "–" and row["accuracy, %"] == 50 and row["seed"] == 5


@pytest.mark.browser
def test_hostile_text_is_shown_as_text_and_does_nothing(browser, tmp_path):  # noqa: F811
    itables = pytest.importorskip("itables.javascript")
    found = tables.runs(hostile_store(tmp_path / "results"))
    tab = browser.new_page()
    try:
        tab.set_content("<title>calm</title>" + itables.generate_init_offline_itables_html(itables.opt.dt_bundle)
                        + tables.runs_html(found))
        tab.locator("table.dataTable tbody tr").first.wait_for(timeout=20_000)
        assert tab.locator("table.dataTable tbody tr").count() == len(found)
        assert HOSTILE in tab.locator("table.dataTable tbody").inner_text()
        assert tab.title() == "calm" and tab.locator("table.dataTable img").count() == 0
    finally:
        tab.close()


@pytest.mark.browser
@built
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_the_table_of_runs_filters_and_sorts(visit, width):  # noqa: F811
    from playwright.sync_api import expect

    tab = visit("chapters/runs.html", width)
    if "No run is stored" in tab.locator("article").inner_text():
        pytest.skip("the book was built from an empty store")
    rows = tab.locator("table.dataTable tbody tr")
    rows.first.wait_for(timeout=20_000)
    every = rows.count()
    run_id = rows.last.locator("td").first.inner_text()
    box = tab.locator(".dt-search input")
    box.fill(run_id)
    expect(rows).to_have_count(1)
    assert every > 1 and rows.first.locator("td").first.inner_text() == run_id
    box.fill("no such word")
    expect(tab.locator("table.dataTable tbody")).to_contain_text("no run matches")
    box.fill("")
    expect(rows).to_have_count(every)
    column = tab.locator("table.dataTable thead th", has_text="accuracy").first
    place = column.evaluate("cell => cell.cellIndex")
    for order in (1, -1):  # upward, then downward; the table is drawn anew some time after the click
        column.click()
        tab.wait_for_function("""([place, order]) => {
            const rows = [...document.querySelectorAll("table.dataTable tbody tr")];
            const values = rows.map(row => order * parseFloat(row.cells[place].innerText));
            return values.length > 1 && values.every((value, i) => i == 0 || values[i - 1] <= value);
        }""", arg=[place, order], timeout=20_000)


@pytest.mark.browser
@built
def test_the_front_page_shows_the_claims_that_their_own_page_shows(visit):  # noqa: F811
    tab = visit("index.html", WIDTHS["desktop"])
    front = [row.locator("td").all_inner_texts() for row in tab.locator("table.claims tbody tr").all()]
    page = visit("chapters/claims.html", WIDTHS["desktop"])
    rows = page.locator("article table").first.locator("tbody tr")
    there = [row.locator("td").all_inner_texts() for row in rows.all()]
    # a page's own Markdown has typographic apostrophes
    assert [(row[0].split()[0], row[4].replace("'", "’")) for row in front] == [
        (row[0].strip(), row[5].strip().replace("'", "’")) for row in there]
    assert len(front) == 25  # C1 to C24, and C1 in general


@pytest.mark.browser
@built
@pytest.mark.parametrize("page", ["index.html", "chapters/runs.html", "chapters/figure1.html"])
def test_text_can_be_read_on_dark_pages(visit, page):  # noqa: F811
    tab = visit(page, WIDTHS["desktop"])
    tab.evaluate("document.documentElement.dataset.theme = 'dark'")
    tab.wait_for_timeout(300)
    # the luminance of a text's colour against that of the first ground beneath it which is not transparent
    contrasts = tab.evaluate("""() => {
        const parse = colour => (colour.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
        const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
            .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
        const ground = element => {
            for (let e = element; e; e = e.parentElement) {
                const c = parse(getComputedStyle(e).backgroundColor);
                if (c.length === 3 || c[3] > .5) return c;
            }
            return [255, 255, 255];
        };
        return [...document.querySelectorAll('article p, article td, article th, article li, .dt-search, .dt-info')]
            .filter(e => e.offsetParent && e.innerText.trim()).map(e => {
                const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))];
                return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.innerText.slice(0, 40)];
            }).filter(([contrast]) => contrast < 4.5);
    }""")
    assert contrasts == []


# ---------------------------------------------------------------- deviations

def test_the_time_between_events_is_as_stated():
    lines = map(str.strip, (BOOK / "deviations.md").read_text().splitlines())
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    names, stated = lines[0][1:], {row[0]: row[1:] for row in lines[2:]}
    for column, name in enumerate(names):
        profile = experiments.PROFILES[name]
        known = experiments.data_spec(profile, profile.data, "0" * 64)
        (spec,) = [run.spec for run in experiments.figures.figure1_vgg11(profile, known, [0]) if run.label == "L r=40"]
        steps = -(-data.sizes(spec.data)[0] // spec.optimiser.batch_size)
        assert int(stated["Epochs"][column]) == spec.pruning.retrain
        assert int(stated["Batches"][column]) == spec.pruning.retrain * steps
        assert int(stated["Images in a batch"][column]) == spec.optimiser.batch_size


# ---------------------------------------------------------------- prune your own network

@pytest.mark.slow
def test_the_page_on_pruning_prints_the_same_every_time(tmp_path):
    place = tmp_path / "prune.ipynb"
    subprocess.run([sys.executable, "-m", "papermill", "--no-progress-bar", "-k", "python3",
                    str(ROOT / "chapters/prune.ipynb"), str(place)], cwd=ROOT, check=True, capture_output=True)
    cells = json.loads(place.read_text())["cells"]
    outputs = [out for cell in cells for out in cell.get("outputs", [])]
    printed = "\n".join("".join(out["text"]) for out in outputs if "text" in out)
    listed = [_Rows("".join(out["data"]["text/html"])).rows for out in outputs if "text/html" in out.get("data", {})]
    # a table's first two rows are its headings
    events = pd.DataFrame([row[1:] for rows in listed if rows and "removed_total" in rows[0] for row in rows[2:]],
                          columns=["layer", "units", "removed", "total", "t_pre", "t_post"])
    events[["units", "removed", "total"]] = events[["units", "removed", "total"]].astype(int)
    assert {"features.11.block.3.0", "features.12.0", "classifier.0"} == set(events["layer"])
    for (_, units), rows in events.groupby(["layer", "units"]):
        assert list(rows["removed"].cumsum()) == list(rows["total"]) and rows["total"].max() <= units
    removed = events.groupby("units")["removed"].sum()
    assert removed[576] == int(0.9 * 576) and removed[589824] == int(0.9 * 589824)
    assert "mean instability: 0." in printed and "parameters removed:" in printed
    checked = subprocess.run([sys.executable, "-m", "pytest", "--nbval", "-p", "no:cacheprovider", "-q", str(place)],
                             cwd=tmp_path, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_the_engine_page_shows_what_was_measured_and_escapes_it(tmp_path):
    row = {"model": "vgg11", "replicas": 2, "steps_per_s": 2.5, "plain_steps_per_s": 1.0, "ratio_to_plain_loop": 2.5,
           "seconds_per_epoch": 156.4, "compute_floor_ms": 300.0, "memory_floor_ms": 20.0, "gap": 1.33,
           "peak_memory_bytes": 2**31}
    machine = {"device": "<b>chip</b>", "cores": 2, "versions": {"torch": "2.12.1"}, "finished": "2026-01-02T03:04:05",
               "commit": "abc", "quick": True, "peak_operations_per_s": 3e11, "peak_bytes_per_s": 7e9}
    result = {"machine": machine, "rows": [row], "costs": [{"model": "vgg11", "cost": "<i>step</i>", "ms": 1, "training_steps": 1}],
              "techniques": []}
    (tmp_path / "bench.json").write_text(json.dumps(result))
    found, = Store(tmp_path).benchmarks("rows", "costs")
    text = tables.bench_machine(found)
    assert "&lt;b&gt;chip" in text and "2026-01-02" in text and "a few steps" in text and "0.3 TFLOP/s" in text
    shown = dict(tables.bench_html(found))
    assert list(shown) == ["Speed", "What events, tests and scores cost"]  # no technique was measured
    assert "<td>2.5</td>" in shown["Speed"] and "<td>156</td>" in shown["Speed"] and "<td>2</td>" in shown["Speed"]
    assert "&lt;i&gt;step" in shown["What events, tests and scores cost"]


@pytest.mark.parametrize("chapter", ["engine", "faults"])
def test_what_a_stranger_says_of_a_machine_stays_text(tmp_path, monkeypatch, chapter):
    link = "[here](javascript:alert(1))"
    about = {"device": HOSTILE + link, "device_type": HOSTILE, "versions": {"torch": HOSTILE + link}, "cores": HOSTILE,
             "finished": "<script>" + link, "commit": "<img>" + link, "quick": False, "seconds": 60.0,
             "peak_operations_per_s": 1e12, "peak_bytes_per_s": 1e10}
    (tmp_path / "bench.json").write_text(json.dumps({
        "machine": about, "rows": [{"model": HOSTILE, "peak_memory_bytes": None}], "techniques": [{"technique": HOSTILE}],
        "costs": [{"cost": HOSTILE}]}))
    (tmp_path / "faults.json").write_text(json.dumps({
        "about": about, "faults": [{"fault": HOSTILE, "expected": HOSTILE, "seen": HOSTILE, "held": True}]}))
    displayed = []
    monkeypatch.setattr("IPython.display.display", lambda *objects: displayed.extend(objects))
    monkeypatch.chdir(ROOT)
    names: dict = {}
    for cell in code(chapter):
        exec(cell, names)
        names["results"] = str(tmp_path)
    pages = "".join(shown.data for shown in displayed if isinstance(shown, Html))
    assert "&lt;script&gt;" in pages and not {"script", "img", "b"} & _Rows(pages).tags
    assert not any("javascript" in shown.data or "script>" in shown.data for shown in displayed if isinstance(shown, Markdown))


def test_of_several_parts_the_one_that_the_number_is_of_is_named(judged):
    _, found = judged
    by_id = {cells[0][:2]: cells for cells in _Rows(tables.claims_html(found)).rows}
    part = found.set_index("id").loc["C3", "part"]
    assert part in by_id["C3"][2] and "slope" not in by_id["C1"][2]


def test_a_claim_whose_figure_has_no_page_of_its_own_links_to_the_claims(judged):
    _, found = judged
    page = tables.claims_html(found.assign(figure=found["figure"].where(found["id"] != "C1", "peaks")))
    assert re.search('<a href="chapters/claims.html" [^>]*><strong>C1</strong></a>', page)
