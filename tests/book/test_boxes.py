"""Boxes: the verdict on a claim follows the stored rows, and what has no runs is one box that says what it takes."""

import re
import shutil
from html import unescape

import pandas as pd
import pytest
from made_up import FALLS, fill, noise, stock, write
from test_book import ROOT

from gstlib import claims, experiments
from gstlib.book import boxes, notebook, tables
from gstlib.claims import CLAIMS
from gstlib.errors import InputError
from gstlib.reading import figures
from gstlib.reading.study import study
from gstlib.store import Store

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def chapter(tmp_path, monkeypatch):
    """chapter(store, profile, *figures): a `Chapter` and the list of what it displays."""
    monkeypatch.chdir(ROOT)

    def make(store, profile, *names):
        displayed = []
        monkeypatch.setattr(notebook, "display", displayed.append)
        return notebook.Chapter("figure1", [*names], profile=profile, data=None, seeds=None, device="auto", train=False,
                                results=str(store.path), executor=None, output=str(tmp_path / "figures")), displayed

    return make


def facts(html: str) -> dict[str, dict[str, str]]:
    """Of each box, by its label, what it says under each heading, as text."""
    def text(part):
        return " ".join(unescape(re.sub(r"<[^>]+>", " ", part)).split()).replace(" :", ":").replace(" ,", ",")

    return {unescape(label): {text(name): text(words) for name, words in re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", body)}
            for label, body in re.findall(r'<section class="box" aria-label="([^"]+)">(.*?)</section>', html)}


def verdicts(made, *ids):
    there, displayed = made
    there.verdicts(*ids)
    return facts(displayed[-1].data)


# ---------------------------------------------------------------- verdicts

def test_a_box_says_what_claims_and_store_say_full_width_and_small_scale_apart(tmp_path, chapter):
    store = fill(tmp_path / "results", "quarter")
    fill(store.path, "mini")
    row = claims.evaluate(store).set_index("id").loc["C1"]
    box = verdicts(chapter(store, "mini", "figure1-vgg11"), "C1")["Verdict on claim C1"]
    claim = next(claim for claim in CLAIMS if claim.id == "C1")
    assert box["The paper"] == claim.published
    for heading, prefix in (("Here, full width (quarter)", ""), ("Here, small scale (mini)", "small_")):
        estimate, low, high = (f"{row[prefix + name]:.2f}" for name in ("estimate", "low", "high"))
        assert "supported, 3 seeds" in box[heading] and f"slope: {estimate} [{low}, {high}] points" in box[heading]
    assert "81 epochs instead of 325" in box["Why it may differ"]
    full, small = box["Why it may differ"].split("small scale: ")
    assert "width" not in full.removeprefix("full width: ") and "0.5 times the width instead of 1" in small
    assert "1,024 training images instead of all" in small and "scikit-learn digits" in full
    assert claim.test in box["What would change it"] and "no longer holds" in box["What would change it"]
    assert box["What it takes"].count("--profile") == 2, "two of five seeds are missing at either size"


def test_a_box_changes_when_a_stored_row_changes(tmp_path, chapter):
    store = fill(tmp_path / "results", "quarter")
    before = verdicts(chapter(store, "quarter", "figure1-vgg11"), "C1", "C3")
    run = next(run for run in study(store, "figure1-vgg11", "quarter").wanted if run.label == "L r=40")
    write(store, run, 0.1, FALLS["L r=40"], "quarter")
    after = verdicts(chapter(store, "quarter", "figure1-vgg11"), "C1", "C3")
    for label in before:
        here = "Here, full width (quarter)"
        assert "supported" in before[label][here] and after[label][here].startswith("inconclusive")
    takes = after["Verdict on claim C1"]["What it takes"]
    needed = claims.evaluate(store).set_index("id").loc["C1", "seeds_needed"]
    assert f"what was seen needs {float(f'{needed:.2g}'):.0f} seeds" in takes


def test_fewer_than_three_seeds_have_no_estimate(tmp_path, chapter):
    store = fill(tmp_path / "results", "quarter")
    gone = next(run for run in study(store, "figure1-vgg11", "quarter").wanted if run.label == "S r=4")
    store.file(gone.spec.id).unlink()
    box = verdicts(chapter(store, "quarter", "figure1-vgg11"), "C1")["Verdict on claim C1"]
    assert "not run: 3 complete seeds are needed, there are 2" in box["Here, full width (quarter)"]
    assert "[" not in box["Here, full width (quarter)"] and "Why it may differ" not in box
    assert "3 complete seeds at least; python -m gstlib run figure1-vgg11 --profile quarter" in box["What it takes"]


def test_an_open_claim_whose_runs_are_all_there_asks_for_the_seeds_that_its_effect_needs(tmp_path):
    store, size = Store(tmp_path / "results"), experiments.profile("mini")
    data = experiments.data_spec(size, size.data, "f" * 64)
    for number, run in enumerate(experiments.figures.figure1_vgg11(size, data, range(10, 15))):
        fall = FALLS.get(run.label, 0.0)
        write(store, run, 0.6 + 0.1 * fall + 4 * noise(number), fall, "mini")
    row = claims.evaluate(store).set_index("id").loc["C1"]
    assert row["small_scale"] == "inconclusive" and row["small_why"] == ""
    seeds = int(row["small_seeds_needed"])
    assert 5 < seeds <= 100 and f"--seeds {seeds} " in row["small_command"]
    assert f"needs {seeds} seeds; <code>python -m gstlib run figure1-vgg11" in boxes.verdict(CLAIMS[0], row, {})


def test_where_configurations_are_counted_no_more_seeds_are_asked_for(tmp_path):
    claim = next(claim for claim in CLAIMS if claim.counted == "configurations")
    row = claims.evaluate(Store(tmp_path)).set_index("id", drop=False).loc[claim.id]
    row = row.to_dict() | {"small_scale": "supported", "small_p_holm": 0.7, "small_n": 26, "small_confidence": 0.95}
    assert "does not uphold it: more configurations" in boxes.verdict(claim, row, {})


def test_what_needs_no_run_has_no_small_scale_and_counts_networks(tmp_path):
    row = claims.evaluate(Store(ROOT / "book/results")).set_index("id").loc["C19"]
    claim = next(claim for claim in CLAIMS if claim.id == "C19")
    (box,) = facts(boxes.verdict(claim, row, {})).values()
    assert not any("small scale" in heading for heading in box)
    assert f"{row['n']:.0f} networks" in box["Here, full width (paper)"] and "More networks" in box["What would change it"]


def test_nothing_of_a_store_becomes_part_of_a_box_s_html(tmp_path):
    row = claims.evaluate(fill(tmp_path / "results", "quarter")).set_index("id").loc["C1"]
    hostile = pd.concat([row, pd.Series({"note": HOSTILE, "command": HOSTILE})]).groupby(level=0).last()
    box = boxes.verdict(CLAIMS[0], hostile, {"quarter": [HOSTILE]})
    assert "<img" not in box and box.count("&lt;img") == 3


def test_an_unknown_claim_is_refused(tmp_path, chapter):
    there, _ = chapter(fill(tmp_path / "results"), "smoke", "figure1-vgg11")
    with pytest.raises(InputError, match="unknown claim 'C99'; choose from C1, C1g"):
        there.verdicts("C99")


# ---------------------------------------------------------------- where no run is stored

def test_a_figure_without_runs_is_one_box_for_all_its_panels(tmp_path, chapter):
    there, displayed = chapter(fill(tmp_path / "results"), "smoke", "figure3")
    (empty,) = there.studies
    for name in ("one", "two"):
        there.show(empty, figures.accuracy_by_epoch, name, "never seen")
    there.state(empty, lambda _: "never said")
    there.move(empty, lambda _: None, "moving", "never moved")
    (box,) = displayed
    (said,) = facts(box.data).values()
    claim = next(claim for claim in CLAIMS if claim.figure == "figure3")
    assert said[f"The paper ({claim.published})"].endswith(claim.statement)
    assert said["What it takes"].startswith(f"{len({run.spec.id for run in empty.missing})} runs")
    assert said["The command"] == empty.command and "no run is stored at profile smoke" in box.data


def test_the_hours_are_those_that_the_cost_page_knows(tmp_path, chapter):
    store = Store(shutil.copytree(ROOT / "book/results", tmp_path / "results", ignore=shutil.ignore_patterns(".*")))
    for run in study(store, "figure4", "mini").wanted:
        if run.label.startswith("R "):
            store.file(run.spec.id).unlink(missing_ok=True)
    there, displayed = chapter(store, "mini", "figure4", "beyond-dose")
    part = there.studies[0].restrict([label for label in there.studies[0].labels if label.startswith("R ")])
    there.show(part, figures.accuracy_by_epoch, "figure4", "never seen")
    (said,) = facts(displayed[-1].data).values()
    assert re.search(r"^\d+ runs, [\d.]+\s(min|h) on 2 cores of a CPU \(measured: see ", said["What it takes"])


def test_a_panel_of_which_the_unpruned_network_or_one_way_alone_is_there_is_not_drawn(tmp_path, chapter):
    store = fill(tmp_path / "results")
    wanted = study(store, "figure1-vgg11").wanted
    for run in wanted:
        if run.label not in ("none", "S r=4"):
            store.file(run.spec.id).unlink()
    there, displayed = chapter(store, "smoke", "figure1-vgg11")
    there.show(there.studies[0], figures.accuracy_by_instability, "panel", "never seen")
    assert "shows except of <code>none</code>, <code>S r=4</code>;" in displayed[-1].data
    # alone it is what a panel of one way is about
    there.show(there.studies[0].restrict(["none", "S r=4"]), figures.accuracy_by_instability, "panel", "Seen.")
    assert displayed[-2].alt.startswith("Seen. Final test accuracy: no pruning ") and "**Panel 1.**" in displayed[-1].data


def test_a_comparison_is_over_all_seeds_that_both_have_though_a_third_lacks_some(tmp_path, chapter):
    store = fill(tmp_path / "results")
    lost = next(run for run in study(store, "figure1-vgg11").wanted if run.label == "S r=4")
    store.file(lost.spec.id).unlink()
    there, displayed = chapter(store, "smoke", "figure1-vgg11")
    assert there.studies[0].runs["seed"].nunique() == 2 and there.whole[0].runs["seed"].nunique() == 3
    there.compare(there.studies[0], [("L r=40", "none"), ("S r=4", "none")])
    three, two = displayed[-1].data.splitlines()[2:]
    assert three.rstrip("| ").endswith("3") and two.rstrip("| ").endswith("2")


# ---------------------------------------------------------------- the largest profile

def test_the_larger_study_is_at_the_largest_profile_with_three_seeds_of_every_configuration(tmp_path, chapter):
    store = fill(tmp_path / "results")
    there, displayed = chapter(store, "smoke", "figure1-vgg11")
    assert there.larger(there.studies[0]) is None
    (said,) = facts(displayed[-1].data).values()
    assert "--profile quarter" in said["The command"] and said["What it takes"].startswith("25 runs")
    fill(store.path, "mini")
    fill(store.path, "quarter")
    assert there.larger(there.studies[0]).profile.name == "quarter"
    gone = study(store, "figure1-vgg11", "quarter").wanted[0]
    store.file(gone.spec.id).unlink()
    assert there.larger(there.studies[0]).profile.name == "mini"
    at_mini, displayed = chapter(store, "mini", "figure1-vgg11")
    assert at_mini.larger(at_mini.studies[0]).runs["seed"].nunique() == 2 and not displayed, "the seeds that are whole"
    for run in study(store, "figure1-vgg11", "quarter").wanted:
        if run.label == "none":
            store.file(run.spec.id).unlink(missing_ok=True)
    assert at_mini.larger(at_mini.studies[0]) is None
    (said,) = facts(displayed[-1].data).values()
    assert said["What it takes"].startswith("13 runs"), "three of fifteen are gone, and two more seeds are asked for"
    at_mini.show(None, figures.accuracy_by_epoch, "none", "never seen")
    at_mini.state(None, lambda _: "never said")
    assert len(displayed) == 1


def test_every_box_and_the_table_can_be_made_of_the_committed_runs():
    table = claims.evaluate(Store(ROOT / "book/results"))
    page, rows = tables.claims_html(table), table.set_index("id")
    for claim in CLAIMS:
        assert f"<strong>{claim.id}</strong>" in boxes.verdict(claim, rows.loc[claim.id], {}) and claim.id in page
