"""What the README says of the stored runs, and its moving picture: true, and no older than the runs."""

import re
import runpy

import pytest
from made_up import fill
from PIL import Image
from test_book import ROOT

from gstlib import claims
from gstlib.book import front, readme
from gstlib.store import Store


def written() -> str:
    """The README's part that `make readme` writes."""
    return re.search(f"{readme.BEGIN}\n(.*){readme.END}", (ROOT / readme.README).read_text(), re.S)[1].strip()


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    store = fill(tmp_path_factory.mktemp("readme") / "results", "quarter")
    return store, claims.evaluate(store)


def test_the_readme_is_what_the_committed_runs_say():
    store = Store(ROOT / "book/results")
    now = readme.words(claims.evaluate(store), readme.one_run(store))
    assert written() == now, "the README is older than book/results; write it with: make readme"


def test_the_committed_picture_moves_and_is_light():
    place = ROOT / readme.PICTURE
    assert place.stat().st_size < 1.5e6 and f"]({readme.PICTURE})" in written()
    with Image.open(place) as picture:
        assert picture.n_frames > 20 and min(picture.size) > 300


def test_the_table_has_a_row_a_claim_that_was_run_and_counts_the_others(judged):
    _, table = judged
    text = readme.short(table)
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:5]] for line in text.splitlines()[2:]
            if len(cells := line.split("|")) > 4}
    run = table[(table["verdict"] != "not run") | (table["small_scale"] != "not run")]
    assert list(rows) == list(run["id"]) and 1 < len(rows) < len(table)
    for row in run.itertuples():
        assert rows[row.id] == [row.statement, f"**{claims.upheld(table)[row.Index]}**", "not run"]
    assert f"Of {len(table)} claims {len(table) - len(run)} are not run yet." in text
    alone = table.assign(verdict=table["verdict"].where(table["id"] == "C1", "not run"), small_scale="inconclusive")
    assert f"All {len(table)} claims were run, {len(table) - 1} of them at small scale alone." in readme.short(alone)


def test_a_verdict_that_holm_does_not_uphold_is_inconclusive(judged):
    _, table = judged
    lost = table.assign(p_holm=table["p_holm"].where(table["id"] != "C1", 0.06))
    assert "**supported**" in readme.short(table).splitlines()[2] and readme.short(table).splitlines()[2].startswith("| C1 ")
    assert "**inconclusive**" in readme.short(lost).splitlines()[2]


def test_the_picture_is_of_the_least_stable_way_at_the_largest_profile(judged, tmp_path):
    store, _ = judged
    fill(tmp_path / "both", "smoke")
    both = fill(tmp_path / "both", "quarter")
    for shown in (readme.one_run(store), readme.one_run(both)):
        (run,) = shown.runs.itertuples()
        assert shown.profile.name == "quarter" and run.seed == 0 and run.label == "L r=40"
        fall = 100 * (shown.events["t_pre"] - shown.events["t_post"]).max()
        assert f"fell by {fall:.1f} points" in readme.caption(shown)
        assert f"ended at {100 * run.final_accuracy:.1f}%" in readme.caption(shown)
    assert readme.one_run(Store(tmp_path / "none")) is None
    assert "![" not in readme.words(claims.evaluate(Store(tmp_path / "none")), None)


@pytest.mark.slow
def test_a_run_is_animated_epoch_by_epoch(tmp_path):
    shown = readme.one_run(fill(tmp_path / "results", "smoke"))
    place = tmp_path / "moving.gif"
    readme.animate(shown, place)
    with Image.open(place) as picture:
        still = {bytes(picture.convert("RGB").tobytes()) for number in range(picture.n_frames) if not picture.seek(number)}
    assert len(still) >= shown.epochs["epoch"].nunique() - 1


def test_only_what_lies_between_the_markers_is_replaced():
    text = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter \\1"
    assert readme.replaced(text, "new \\1") == f"before\n{readme.BEGIN}\n\nnew \\1\n\n{readme.END}\nafter \\1"


@pytest.mark.parametrize("results, why", [("typo", "holds no run"), ("README.md", "is a file")])
def test_a_folder_without_runs_leaves_the_readme_as_it_is(results, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / readme.README).write_text(text := f"{readme.BEGIN}\nold\n{readme.END}")
    monkeypatch.setattr("sys.argv", ["readme", results])
    with pytest.raises(SystemExit, match=f"^gstlib: .*{why}"):
        runpy.run_path(readme.__file__, run_name="__main__")
    assert (tmp_path / readme.README).read_text() == text
