"""The book: its sources belong together, and every built page works in a browser without a network."""

import functools
import http.server
import json
import re
import shutil
import threading
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

from gstlib import experiments

ROOT = Path(__file__).resolve().parents[2]
BOOK, HTML = ROOT / "book", ROOT / "book" / "_build" / "html"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]
PAGES = sorted(p.relative_to(HTML).as_posix() for p in HTML.rglob("*.html") if "_static" not in p.parts)
WIDTHS = {"desktop": 1280, "telephone": 390}


# ---------------------------------------------------------------- sources

def toc_files() -> list[str]:
    yaml = pytest.importorskip("yaml")
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text())
    return [toc["root"], *(entry["file"] for part in toc["parts"] for entry in part["chapters"])]


def texts() -> dict[str, str]:
    """Markdown by file name: the book's pages, and the chapters' cells that are prose."""
    found = {p.name: p.read_text() for p in BOOK.glob("*.md")}
    for place in (ROOT / "chapters").glob("*.ipynb"):
        cells = json.loads(place.read_text())["cells"]
        found[place.name] = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return found


def test_every_file_of_the_table_of_contents_exists():
    # a chapter's source lies in chapters/; what the book reads is made from it
    missing = [f for f in toc_files() if not (BOOK / f"{f}.md").exists() and not (ROOT / f"{f}.ipynb").exists()]
    assert not missing


def test_every_page_and_chapter_is_in_the_table_of_contents():
    there = {p.stem for p in BOOK.glob("*.md")} | {f"chapters/{p.stem}" for p in (ROOT / "chapters").glob("*.ipynb")}
    assert there == set(toc_files())


def test_citations_have_entries_and_no_entry_is_there_twice():
    keys = re.findall(r"^@\w+\{([^,\s]+),", (BOOK / "references.bib").read_text(), re.MULTILINE)
    assert len(keys) == len(set(keys))
    for name, text in texts().items():
        for cited in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text):
            for key in cited.split(","):
                assert key.strip() in keys, f"{name} cites {key.strip()}"


def test_the_table_of_profiles_states_what_the_profiles_are():
    rows = {cells[0]: cells[1:] for line in (BOOK / "how-to-read.md").read_text().splitlines() if line.startswith("|")
            for cells in [[cell.strip() for cell in line.strip("|").split("|")]]}
    for column, name in enumerate(rows[""]):
        profile = experiments.PROFILES[name]
        size, conv4 = profile.size, profile.of("conv4")
        data = experiments.data_spec(profile, profile.data, "0" * 64)
        runs = {run.label: run.spec for run in experiments.figures.figure1_vgg11(profile, data, [0])}
        plain = runs["none"].optimiser
        stated = {row: cells[column] for row, cells in rows.items()}
        assert stated["Training images"] == str(size.train_size or "all")
        assert stated["Training images, Figure 2"] == str(conv4.train_size or "all")
        assert stated["Test images"] == str(profile.test_size or "all")
        assert Fraction(stated["Channels, times"]) == size.width == conv4.width
        assert float(stated["Epochs, divided by"]) == size.divisor
        assert float(stated["Epochs, Figure 2, divided by"]) == conv4.divisor
        assert int(stated["Epochs of Figure 1"]) == plain.epochs
        assert stated["Rate falls at"] == ", ".join(map(str, plain.milestones))
        assert stated["Rate is then divided by"] == {0.1: "10", 0.1**0.5: "√10"}[plain.decay]
        assert int(stated["$r = 4$ becomes"]) == runs["S r=4"].pruning.retrain
        assert int(stated["$r = 40$ becomes"]) == runs["S r=40"].pruning.retrain
        assert int(stated["Batch"]) == size.batch_size
        assert int(stated["Batch, Figure 2"]) == conv4.batch_size
        assert int(stated["Tested every (epochs)"]) == profile.test_every
        assert int(stated["Seeds"]) == profile.seeds
        assert int(stated["First seed"]) == profile.first_seed
        assert stated["Precision"] == profile.precision
    assert set(rows[""]) == set(experiments.PROFILES)


# ---------------------------------------------------------------- built pages

built = pytest.mark.skipif(not PAGES, reason="book/_build/html is not there; build the book first: make smoke")
pages = pytest.mark.parametrize("page", PAGES or ["none"])


class _Page(HTMLParser):
    """What a page links to, and the anchors that it has."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if value and (name == "id" or (name == "name" and tag == "a")):
                self.anchors.add(value)
            if value and name in ("href", "src") and tag != "base":
                self.links.append(value)


@functools.cache
def parsed(place: Path) -> _Page:
    return _Page(place.read_text())


@pytest.fixture(scope="module")
def site():
    """Address of a server of the built book on this machine."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(HTML)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[test]'")
    with sync_api.sync_playwright() as playwright:
        program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                       playwright.chromium.executable_path)
        if not Path(program).exists():
            pytest.skip("there is no Chromium on this machine")
        chromium = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, site):
    """visit(page, width) opens a page; when the test is over nothing may have gone wrong on any page it opened."""
    troubles, opened = [], []

    def go(path: str, width: int):
        page = browser.new_page(viewport={"width": width, "height": 850})
        opened.append(page)
        page.on("console", lambda m: troubles.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: troubles.append(f"page error: {error}"))
        page.on("requestfailed", lambda request: troubles.append(f"failed: {request.url} {request.failure}"))
        page.on("response", lambda r: troubles.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
        page.on("request", lambda request: None if request.url.startswith((site, "data:", "blob:"))
                else troubles.append(f"another host: {request.url}"))
        page.goto(site + path, wait_until="networkidle")
        return page

    yield go
    for page in opened:
        page.close()
    assert not troubles


@pytest.mark.browser
@built
@pages
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_a_page_opens_whole_and_quietly(visit, page, width):
    tab = visit(page, width)
    # MathJax draws every formula, and understands it
    tab.wait_for_function("[...document.querySelectorAll('.math')].every(e => e.querySelector('mjx-container'))", timeout=10_000)
    assert tab.locator("mjx-merror, [data-mjx-error]").count() == 0
    undrawn = tab.evaluate("""async () => {
        const images = [...document.images];
        await Promise.all(images.map(i => { i.loading = 'eager'; return i.decode().catch(() => null); }));
        return images.filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.src);
    }""")
    assert undrawn == []
    overflow = "document.scrollingElement.scrollWidth - window.innerWidth"
    assert tab.evaluate(overflow) <= 1, "the page is wider than the window"
    if page.startswith("chapters/"):
        shown = tab.locator("article img, article svg.drawn, article table").count()
        said = re.search("no (run|benchmark|record of it) is stored", tab.locator("article").inner_text().lower())
        assert shown > 0 or said, "a chapter shows neither a figure or table, nor says what is missing"


@pytest.mark.browser
@built
@pages
def test_links_within_the_book_lead_somewhere(page):
    place = HTML / page
    for link in parsed(place).links:
        address, anchor = urldefrag(link)
        parts = urlsplit(address)
        if parts.scheme or parts.netloc:
            assert parts.scheme in ("https", "mailto", "data"), link
            continue
        target = place if not parts.path else place.parent / unquote(parts.path)
        assert target.is_file(), f"{page} links to {link}"
        if anchor and target.suffix == ".html":
            assert unquote(anchor) in parsed(target.resolve()).anchors, f"{page} links to {link}"


@pytest.mark.browser
@built
def test_every_page_of_the_table_of_contents_was_built():
    assert {f"{name}.html" for name in toc_files()} <= set(PAGES)


@pytest.mark.browser
@built
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_the_search_finds_a_word(visit, width):
    tab = visit("search.html?q=instability", width)
    results = tab.locator("#search-results li a")
    results.first.wait_for(timeout=10_000)
    assert results.count() >= 2
    results.first.click()
    tab.wait_for_load_state("networkidle")
    assert "instability" in tab.inner_text("article").lower()


@pytest.mark.browser
@built
def test_the_menu_opens_on_a_telephone_and_leads_to_a_chapter(visit):
    tab = visit("index.html", WIDTHS["telephone"])
    tab.locator("button.primary-toggle").first.click()
    link = tab.locator("nav.bd-links a", has_text="Figure 1").first
    link.wait_for(state="visible", timeout=5_000)
    link.click()
    tab.wait_for_load_state("networkidle")
    assert tab.url.endswith("chapters/figure1.html")
