"""Figures that move and the first screen: their numbers are gstlib's own, their controls change what they should."""

import json
import math
import random
import re
from dataclasses import replace

import pytest
from made_up import FALLS, SMOKE, fill, noise, stock, write
from scipy import stats
from test_book import BOOK, HTML, PAGES, ROOT, WIDTHS, browser, built, site, toc_files, visit  # noqa: F401 (fixtures)

from gstlib import claims, experiments
from gstlib.book import front, moving
from gstlib.reading.study import study
from gstlib.store import Store

MOVING = {page: re.findall(r'class="moving" id="([\w-]+)"', (HTML / page).read_text()) for page in PAGES}
MOVING = {page: ids for page, ids in MOVING.items() if ids}
HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def figure1(tmp_path_factory):
    return study(fill(tmp_path_factory.mktemp("moving") / "results"), "figure1-vgg11")


# ---------------------------------------------------------------- what a chart holds

def test_the_linked_figure_holds_every_run_with_its_accuracy_instability_and_curve(figure1):
    rows = moving.linked(figure1).to_dict()["datasets"]["runs"]
    assert len(rows) == 15 and len({row["run"] for row in rows}) == 15
    found = {(row["way"], row["seed"]): row for row in rows}
    # as tests/made_up.py made the run: its events fall by 20 points and a tenth of one for each seed, its epochs stay at 50%
    row = found["prune L, E[BN], 17%", 2] if ("prune L, E[BN], 17%", 2) in found else next(
        row for (way, seed), row in found.items() if way.startswith("prune L") and seed == 2)
    assert row["instability"] == pytest.approx(20.2) and {round(a, 1) for a in row["accuracy"]} == {50.0, 29.8}
    run = figure1.runs[(figure1.runs["label"] == "L r=40") & (figure1.runs["seed"] == 2)].iloc[0]
    assert row["final"] == pytest.approx(100 * run["final_accuracy"], abs=0.005)
    assert {row["instability"] for row in rows if row["way"] == "no pruning"} == {0}


def test_a_filter_goes_dark_at_the_event_that_removed_it(figure1):
    pruned = figure1.restrict([label for label in figure1.labels if figure1.spec(label).pruning])
    data = moving.fall_and_recovery(pruned).to_dict()["datasets"]
    events = figure1.events[(figure1.events["label"] == "L r=40") & (figure1.events["seed"] == 0)]
    last = figure1.epochs["epoch"].max()
    for row in (row for row in data["filters"] if row["way"].startswith("prune L")):
        struck = events[events["layer"] == row["layer"]]
        assert len(row["gone"]) == struck["units"].iloc[0]
        for epoch in range(last + 1):
            assert sum(gone <= epoch for gone in row["gone"]) == struck.loc[struck["epoch"] <= epoch, "removed"].sum()
    changes = {tuple(row["change"]) for row in data["events"] if row["way"].startswith("prune L") and row["seed"] == 1}
    assert changes == {(-20.1,) * len(events)}


def test_a_way_of_pruning_is_a_mean_over_seeds_with_its_interval_and_stands_once(tmp_path):
    store = stock(tmp_path / "results", "figure1-vgg11", "figure4")
    rows = moving.doses([study(store, "figure1-vgg11"), study(store, "figure4")])
    assert rows["way"].is_unique and len(rows) == len(set(rows["way"]))
    row = rows.set_index("way").loc[[way for way in rows["way"] if way.startswith("prune L, E[BN]")][0]]
    assert row["figures"] == ["Figure 1 top", "Figure 4"] and row["seeds"] == 3
    runs = study(store, "figure4").runs
    values = 100 * runs.loc[runs["label"] == "L r=40", "final_accuracy"]
    low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    shown = rows[rows["accuracy"].sub(values.mean()).abs() < 1e-9].iloc[0]
    assert (shown["accuracy_low"], shown["accuracy_high"]) == pytest.approx((low, high))
    assert moving.dose(rows).to_dict()["datasets"]["ways"][0]["way"] == rows["way"][0]


def test_ways_of_one_network_are_means_over_the_same_seeds(tmp_path):
    store = stock(tmp_path / "results", "figure1-vgg11", "figure4")
    made = study(store, "figure4")
    for run in made.wanted:
        if run.label == "R r=40" and run.spec.seed:
            store.file(run.spec.id).unlink()
    rows = moving.doses([study(Store(store.path), "figure1-vgg11"), study(Store(store.path), "figure4")])
    assert set(rows["seeds"]) == {1}
    kept = made.runs[(made.runs["label"] == "L r=40") & (made.runs["seed"] == 0)]["final_accuracy"].iloc[0]
    assert (rows["accuracy"] - 100 * kept).abs().min() < 1e-9


def test_words_of_a_chart_stay_words_and_the_picture_has_them():
    page = moving.html(moving.schedule().properties(description=HOSTILE + '"'), "name").data
    assert "<img" not in page and page.count("</script>") == 1
    assert 'role="img" aria-label="&lt;/script&gt;' in page and "<figcaption>" not in page
    spec = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page, re.S)[1])
    assert spec["description"] == HOSTILE + '"'


def test_with_too_few_runs_a_figure_says_so_and_is_drawn(tmp_path):
    store = fill(tmp_path / "results")
    for run in study(store, "figure1-vgg11").wanted:
        if run.label != "L r=40" or run.spec.seed:
            store.file(run.spec.id).unlink()
    alone = study(store, "figure1-vgg11")
    for chart in (moving.linked(alone), moving.fall_and_recovery(alone.restrict(["L r=40"])),
                  moving.dose(moving.doses([alone]))):
        assert "<svg" in moving.html(chart, "name").data
    assert "too few" in moving.linked(alone).to_dict()["description"]


# ---------------------------------------------------------------- the first screen

@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    store = fill(tmp_path_factory.mktemp("front") / "results", "quarter")
    return store, claims.evaluate(store)


def test_the_answer_is_the_first_claim_s_with_its_interval(judged):
    _, table = judged
    row = table.set_index("id").loc["C1"]
    text = front.answer(table)
    assert text.startswith("As of today, at full width, less stable pruning left VGG11 more accurate.")
    assert f"{row['estimate']:.2f} points higher at full width (95% interval {row['low']:+.2f} to {row['high']:+.2f}, 3 seeds, " \
        "profile quarter)" in text and "small scale" not in text
    other = table.assign(verdict=table["verdict"].replace("supported", "contradicted"))
    assert "left VGG11 less accurate" in front.answer(other)
    none = table.assign(verdict="not run", small_scale="not run")
    assert "there is no answer" in front.answer(none)
    found = {"small_scale": "inconclusive", "small_estimate": -0.2, "small_low": -0.5, "small_high": 0.1, "small_n": 4}
    small = front.answer(none.assign(**found))
    assert small.startswith("As of today, at small scale, these runs cannot tell") and small.endswith("cannot judge the paper.")
    assert "0.20 points lower at small scale (95% interval −0.50 to +0.10, 4 seeds, profile mini)" in small
    both = front.answer(table.assign(**found))
    assert both.index("at full width, less stable") < both.index("higher at full width") < both.index("lower at small scale")


def test_sentence_and_tiles_change_when_a_stored_row_changes(tmp_path):
    store = fill(tmp_path / "results", "quarter")
    before = claims.evaluate(store)
    runs = study(store, "figure1-vgg11", "quarter").wanted
    for number, run in enumerate(runs):  # what falls most ends worst
        fall = FALLS.get(run.label, 0.0)
        write(store, run, 0.6 - fall + noise(number), fall + 0.001 * run.spec.seed, "quarter")
    after = claims.evaluate(store)
    assert "more accurate" in front.answer(before) and "less accurate" in front.answer(after)
    assert " higher at full width" in front.answer(before) and " lower at full width" in front.answer(after)
    assert front.tiles(before) != front.tiles(after)


def test_without_a_data_set_named_the_picture_is_of_the_one_that_is_stored(tmp_path):
    """Full-width runs may come from a folder of images, while their profile's own data set is torchvision's."""
    store, size = Store(tmp_path / "results"), experiments.profile("quarter")
    for run in experiments.figures.figure1_vgg11(size, experiments.data_spec(size, "cifar10-folder", "f" * 64), range(3)):
        write(store, run, 0.6 + noise(run.spec.seed), FALLS.get(run.label, 0.0), "quarter")
    assert len(front.figure1(claims.evaluate(store), store, "mini", None, None).runs) == 15


def test_tiles_count_by_the_adjusted_p_at_each_scale(judged):
    _, table = judged
    table = table.assign(verdict="not run", p=math.nan, p_holm=math.nan, small_scale="not run").set_index("id")
    for claim, verdict, p, holm in (("C1", "supported", 0.001, 0.02), ("C2", "supported", 0.03, 0.06),
                                    ("C3", "contradicted", 0.001, 0.05), ("C4", "inconclusive", 0.5, 1),
                                    ("C19", "supported", math.nan, math.nan)):
        table.loc[claim, ["verdict", "p", "p_holm"]] = verdict, p, holm
    full, small = re.findall(r'<p class="tiles">(.*?)</p>', front.tiles(table.reset_index()))
    count = dict((word, int(n)) for n, word in re.findall(r"<strong>(\d+)</strong> ([\w ]+)<", full))
    assert count == {"supported": 2, "contradicted": 0, "inconclusive": 3, "not run": len(table) - 5}
    assert f"<strong>{len(table)}</strong> not run" in small


def test_every_chapter_s_question_is_there_with_its_link():
    found = re.findall(r'<a href="(chapters/[\w-]+)\.html"[^>]*>([^<]+)</a>', front.questions(ROOT))
    assert [name for name, _ in found] == [name for name in toc_files() if name.startswith("chapters/")]
    assert all(question.endswith("?") and "**" not in question for _, question in found)


def test_a_chapter_outside_the_project_lists_no_other_chapters(tmp_path):
    assert front.questions(tmp_path) == ""


def test_the_first_screen_shows_the_runs_that_the_answer_speaks_of(judged, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    store, table = judged
    page = front.first_screen(table, store, "smoke").data
    places = [page.index(part) for part in ("more accurate", 'id="moving-first"', 'class="tiles"', "questions")]
    assert places == sorted(places)
    assert "Profile quarter" in page and page.count('"way":"no pruning"') == 4  # three runs and their mean
    assert re.search(r"Pruned networks end \d", page), "they were made to"
    empty = Store(tmp_path / "none")
    assert "no answer" in front.first_screen(claims.evaluate(empty), empty, "smoke").data
    assert 'class="moving"' not in front.first_screen(claims.evaluate(empty), empty, "smoke").data


# ---------------------------------------------------------------- in a browser: formulas

@pytest.fixture(scope="module")
def alone(browser):  # noqa: F811
    """alone(chart) draws a chart in a page of its own."""
    vl_convert = pytest.importorskip("vl_convert")
    bundle = f"(() => {{{vl_convert.javascript_bundle((BOOK / '_ext' / 'moving.js').read_text())}}})();"
    tabs = []

    def draw(chart):
        tabs.append(tab := browser.new_page())
        tab.set_content(f"<body>{moving.html(chart, 'figure').data}</body>")
        tab.add_script_tag(content=bundle)
        tab.wait_for_function("document.querySelector('figure.moving').view")
        return tab

    yield draw
    for tab in tabs:
        tab.close()


@pytest.mark.browser
def test_the_page_s_e_bn_is_gstlib_s(alone):
    import torch

    from gstlib.scores import ebn

    tab, draw = alone(moving.expected_activation()), random.Random(0)
    settings = [(draw.uniform(-2, 2), draw.uniform(-3, 3)) for _ in range(40)]
    settings += [(0, 1), (0, -1), (0, 0), (0.05, -3), (-0.05, 3)]
    for scale, shift in settings:
        shown = tab.evaluate("""([scale, shift]) => {
            const view = document.querySelector('figure.moving').view.signal('scale', scale).signal('shift', shift).run();
            const areas = Object.keys(view._runtime.data).map(name => view.data(name))
                .find(rows => rows && rows.length > 100 && 'part' in rows[0]);
            return [view.signal('ebn'), areas.reduce((sum, row) => sum + row.part * .05, 0), view.signal('norm')];
        }""", [scale, shift])
        wanted = float(ebn(torch.tensor([scale], dtype=torch.float64), torch.tensor([shift], dtype=torch.float64)))
        assert shown[0] == pytest.approx(wanted, abs=1e-7) and shown[2] == 1
        if abs(scale) > 0.3 and shift + 3 * abs(scale) < 6:  # where the grid resolves the density and holds it
            assert shown[1] == pytest.approx(wanted, abs=0.01)


@pytest.mark.browser
def test_the_page_s_schedule_is_gstlib_s(alone):
    from gstlib.pruning import Schedule

    tab, draw = alone(moving.schedule()), random.Random(1)
    settings = [(6, 275, 0.9, 40, 512), (6, 275, 0.9, 60, 512), (6, 275, 0.9, 100, 512), (3, 150, 0.3, 40, 512)]
    settings += [(draw.randint(0, 50), draw.randint(50, 320), draw.randint(0, 20) / 20, draw.randint(1, 150),
                  draw.choice([64, 128, 256, 512])) for _ in range(40)]
    rates = []
    for s, e, p, r, units in settings:
        rate, number, stairs, words = tab.evaluate("""([s, e, p, r, units]) => {
            const figure = document.querySelector('figure.moving'), view = figure.view;
            for (const [name, value] of Object.entries({s, e, p, r, units})) view.signal(name, value);
            view.run();
            const rows = Object.keys(view._runtime.data).map(name => view.data(name))
                .find(rows => rows && rows.length === 326 && 'removed' in rows[0]);
            return [view.signal('rate'), view.signal('events'), rows.map(row => row.removed), figure.textContent];
        }""", [s, e, p, r, units])
        wanted = Schedule(s, e, p, r)
        assert rate == pytest.approx(wanted.iterative_rate) and number == len(wanted.event_epochs(0))
        assert stairs == [wanted.removed([units], epoch)[0] for epoch in range(326)], (s, e, p, r, units)
        rates.append(round(100 * rate))
    assert rates[:3] == [13, 18, 30], "the paper's"


# ---------------------------------------------------------------- in a browser: the built book

def ready(tab):
    tab.wait_for_function("[...document.querySelectorAll('figure.moving')].every(figure => figure.view)", timeout=30_000)


moving_pages = pytest.mark.parametrize("page", MOVING or ["none"])


@pytest.mark.browser
@built
@moving_pages
@pytest.mark.parametrize("theme, width", [
    pytest.param(theme, width, id=f"{name}-{theme}", marks=[pytest.mark.slow] * ((name == "desktop") != (theme == "light")))
    for theme in ("light", "dark") for name, width in WIDTHS.items()])
def test_figures_are_drawn_quietly_and_every_control_changes_its_figure(visit, page, width, theme):  # noqa: F811
    tab = visit(page, width)
    tab.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
    ready(tab)
    assert tab.evaluate("document.scrollingElement.scrollWidth - window.innerWidth") <= 1
    for name in MOVING[page]:
        figure = tab.locator(f"#{name}")
        assert figure.locator(".still").count() == 0
        assert len(figure.locator(".stage [aria-label]").first.get_attribute("aria-label")) > 30
        ink, ground = tab.evaluate("""name => [getComputedStyle(document.querySelector(`#${name} svg text`)).fill,
                                               getComputedStyle(document.body).backgroundColor]""", name)
        dark = [sum(map(int, re.findall(r"\d+", colour)[:3])) < 384 for colour in (ink, ground)]
        assert dark == [theme == "light", theme == "dark"]
        for control in figure.locator(".controls :is(input, select)").all():
            kind = control.evaluate("e => e.tagName === 'SELECT' ? (e.options.length > 1 ? 'select' : 'single') : e.type")
            assert control.evaluate("e => e.labels.length === 1 && e.labels[0].innerText.trim().length > 0")
            if kind == "single":
                continue
            control.focus()
            before = figure.locator(".stage").inner_html()
            first = kind != "checkbox" and control.evaluate(
                "e => e.tagName === 'SELECT' ? e.selectedIndex === 0 : e.value === e.min")
            tab.keyboard.press("Space" if kind == "checkbox" else "End" if first else "Home")
            tab.wait_for_timeout(150)
            assert figure.locator(".stage").inner_html() != before, f"{name}: {control.get_attribute('name')} changes nothing"


def signal(tab, figure: str, name: str):
    return tab.evaluate("([figure, name]) => document.getElementById(figure).view.signal(name)", [figure, name])


def drag(tab, slider, share: float):
    """Move a slider's knob with the mouse to a share of its length."""
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    here = slider.evaluate("e => (e.value - e.min) / (e.max - e.min)")
    y = box["y"] + box["height"] / 2
    tab.mouse.move(box["x"] + 8 + here * (box["width"] - 16), y)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 8 + share * (box["width"] - 16), y, steps=5)
    tab.mouse.up()


def needs(name):
    """Skip where the book was built from a store that has no run for the figure."""
    return pytest.mark.skipif(not any(name in ids for ids in MOVING.values()), reason=f"no runs for {name}")


@pytest.mark.browser
@built
@needs("moving-first")
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_pointing_at_a_run_shows_its_curve(visit, width):  # noqa: F811
    tab = visit("index.html", width)
    ready(tab)
    figure = tab.locator("#moving-first")
    chosen = figure.locator("select")
    dots = figure.locator(".mark-symbol.role-mark path")
    assert dots.count() >= 1 and chosen.evaluate("e => e.value") in ("all", "null", "")
    for dot in (dots.first, dots.nth(dots.count() - 1)):
        dot.scroll_into_view_if_needed()
        box = dot.bounding_box()
        tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        tab.wait_for_timeout(200)
        run = chosen.evaluate("e => e.options[e.selectedIndex].text")
        assert run in dot.get_attribute("aria-label") or "seed" in run
        thick = figure.locator(".mark-line path[stroke-width='2.5']")
        assert thick.count() == 1
    figure.locator("input[type=checkbox]").click()
    tab.wait_for_timeout(200)
    assert signal(tab, "moving-first", "quarter") is True


@pytest.mark.browser
@built
@needs("moving-run")
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_a_run_is_played_and_scrubbed(visit, width):  # noqa: F811
    tab = visit("chapters/figure1-run.html", width)
    ready(tab)
    figure = tab.locator("#moving-run")
    cells = figure.locator(".mark-rect.role-mark path:not([opacity='0.3'])")
    slider, button = figure.locator("input[type=range]").first, figure.locator("button")
    left = cells.count()
    drag(tab, slider, 0.02)
    tab.wait_for_timeout(200)
    start = signal(tab, "moving-run", "epoch")
    assert start <= 0.2 * int(slider.get_attribute("max")) and cells.count() > left
    button.click()
    tab.wait_for_timeout(900)
    button.click()
    played = signal(tab, "moving-run", "epoch")
    assert played > start and slider.input_value() == str(played) and "Play" in button.inner_text()
    tab.wait_for_timeout(400)
    assert signal(tab, "moving-run", "epoch") == played, "paused"


@pytest.mark.browser
@built
@needs("moving-ebn")
def test_scale_and_shift_move_the_score_and_never_the_norm(visit):  # noqa: F811
    tab = visit("chapters/ebn.html", WIDTHS["desktop"])
    ready(tab)
    scale, shift, times = tab.locator("#moving-ebn input[type=range]").all()
    seen = [signal(tab, "moving-ebn", "ebn")]
    for slider, share in ((scale, 0.95), (shift, 0.8)):
        drag(tab, slider, share)
        seen.append(signal(tab, "moving-ebn", "ebn"))
        assert signal(tab, "moving-ebn", "norm") == 1
    assert seen[0] < seen[1] < seen[2]
    drag(tab, times, 0.9)
    assert signal(tab, "moving-ebn", "norm") > 2 and signal(tab, "moving-ebn", "ebn") == seen[2]


@pytest.mark.browser
@built
@moving_pages
def test_without_scripts_the_still_pictures_stay(browser, site, page):  # noqa: F811
    context = browser.new_context(java_script_enabled=False)
    try:
        tab = context.new_page()
        tab.goto(site + page)
        for name in MOVING[page]:
            picture = tab.locator(f"#{name} .still svg")
            box = picture.bounding_box()
            assert picture.is_visible() and box["width"] > 200 and box["height"] > 100
            assert picture.get_attribute("role") == "img" and len(picture.get_attribute("aria-label")) > 30
            assert tab.locator(f"#{name} .controls").count() == 0
    finally:
        context.close()


@pytest.mark.browser
@built
def test_only_pages_with_a_moving_figure_load_the_bundle():
    assert all(("moving/moving.js" in (HTML / page).read_text()) == (page in MOVING) for page in PAGES)


# ---------------------------------------------------------------- what every page says of itself

def test_a_banner_says_what_size_a_build_is_and_stays_text(tmp_path, judged):
    from made_up import ABOUT

    store, _ = judged
    assert front.banner(store, "quarter") == "Not the paper's own scale: profile quarter; scikit-learn digits; a processor"
    assert front.banner(store, "paper") == "", "no run, nothing to say"
    both = fill(tmp_path / "both", "mini")
    fill(both.path, "quarter")
    assert front.banner(both, "mini").startswith("Not the paper's own scale unless a caption names another: profile mini")
    smoke = fill(tmp_path / "smoke")
    assert "proves that the machinery works, and nothing about the paper" in front.banner(smoke, "smoke")
    (spec, tables), = [(run.spec, smoke.read(run.spec.id).tables) for run in study(smoke, "figure1-vgg11").wanted[:1]]
    smoke.file(spec.id).unlink()
    smoke.write(spec, ABOUT | {"device": HOSTILE}, {name: rows.to_dict("records") for name, rows in tables.items()})
    assert "<img" not in front.banner(smoke, "smoke") and "&lt;img" in front.banner(smoke, "smoke")


@pytest.mark.browser
@built
def test_every_page_describes_itself_and_names_its_size():
    for page in (f"{name}.html" for name in toc_files()):
        text = (HTML / page).read_text()
        (said,) = re.findall(r'<meta name="description" content="([^"]{10,310})"', text)
        (title,) = re.findall(r'<meta property="og:title" content="([^"]+)"', text)
        assert "<" not in said + title and "The question." not in said, page
        assert ('class="bd-header-announcement' in text) == bool((BOOK / "chapters/figures/banner.html").read_text())
    card = re.search(r'og:image" content="([^"]+)"', (HTML / "index.html").read_text())
    assert card is None or (HTML / card[1]).is_file()


def test_without_unpruned_runs_the_picture_says_nothing_of_the_gain(judged):
    store, _ = judged
    runs = study(store, "figure1-vgg11", "quarter")
    assert front.pruned_or_not(runs).startswith("Pruned networks end ")
    assert front.pruned_or_not(runs.restrict([label for label in runs.labels if label != "none"])) == ""


def test_a_run_is_shown_of_the_method_though_its_seed_is_not_everyone_s_first(judged):
    store, _ = judged
    runs = study(store, "figure1-vgg11", "quarter").restrict(["L r=40", "S r=4"])
    part = runs.events[(runs.events["label"] == "L r=40") == (runs.events["seed"] == 2)]
    epochs = runs.epochs[(runs.epochs["label"] == "L r=40") == (runs.epochs["seed"] == 2)]
    chart = moving.fall_and_recovery(replace(runs, events=part, epochs=epochs)).to_dict()
    assert next(param["value"] for param in chart["params"] if param["name"] == "seed") == 2
    assert ", seed 2, whose deepest fall" in chart["description"]
