"""Pages for everyone, in a browser: read aloud, by keyboard, on telephones, on paper, in the dark, and light to fetch."""

import re
from pathlib import Path

import pytest
from test_book import HTML, PAGES, WIDTHS, browser, built, pages, site, visit  # noqa: F401 (fixtures)
from test_moving import MOVING, drag, moving_pages, ready

pytestmark = pytest.mark.slow  # ten minutes, which continuous integration has not
HEAVIEST = 1.5e6  # bytes of what a page has of its own


@pytest.fixture(scope="module")
def axe() -> str:
    """The script of axe-core, the checker of accessibility, as its Python package holds it."""
    package = pytest.importorskip("axe_playwright_python", reason="axe-core is not installed: pip install -e '.[test]'")
    return Path(package.__file__).with_name("axe.min.js").read_text()


@pytest.mark.browser
@built
@pages
def test_axe_finds_nothing_serious(visit, axe, page):  # noqa: F811
    tab, found = visit(page, WIDTHS["desktop"]), set()
    tab.evaluate(axe)
    for name, width in WIDTHS.items():
        tab.set_viewport_size({"width": width, "height": 850})
        tab.wait_for_timeout(500)  # figures are drawn anew
        for theme in ("light", "dark"):
            tab.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
            tab.wait_for_timeout(300)  # colours fade into each other
            # without preload: it would look for style sheets where they are not
            violations = tab.evaluate("axe.run(document, {resultTypes: ['violations'], preload: false})")["violations"]
            assert tab.evaluate("document.documentElement.dataset.theme") == theme
            found |= {(name, theme, each["id"], node["html"][:120], node["failureSummary"][:200])
                      for each in violations if each["impact"] in ("serious", "critical") for node in each["nodes"]}
    assert not found


@pytest.mark.browser
@built
def test_axe_sees_what_is_wrong(browser, axe):  # noqa: F811
    tab = browser.new_page()
    try:
        tab.set_content("<html><body><img src='data:,'><p style='color: #aaa; background: #fff'>pale</p></body></html>")
        tab.evaluate(axe)
        assert {"image-alt", "color-contrast", "html-has-lang"} <= {
            each["id"] for each in tab.evaluate("axe.run()")["violations"]}
    finally:
        tab.close()


@pytest.mark.browser
@built
@pages
def test_a_page_is_light_and_holds_no_library(visit, site, page):  # noqa: F811
    tab = visit(page, WIDTHS["desktop"])
    # bytes by address, as they lie on the server
    weights = {address: int(tab.request.head(address).headers["content-length"]) for address in {site + page, *tab.evaluate(
        "performance.getEntriesByType('resource').map(e => e.name.split('#')[0]).filter(n => n.startsWith(location.origin))")}}
    own = sum(size for address, size in weights.items() if not address.startswith(f"{site}_static/"))
    print(f"{page}: {own / 1e6:.2f} MB of its own, {sum(weights.values()) / 1e6:.2f} MB with what all pages share")
    assert own < HEAVIEST
    assert all(size < HEAVIEST for size in weights.values()), weights
    text = (HTML / page).read_text()
    assert not re.search(r"data:(font|application/font)", text)
    assert max(map(len, re.findall(r"<script>.*?</script>", text, re.S)), default=0) < 100_000


@pytest.mark.browser
@built
@pages
def test_tables_head_their_columns_and_are_read_without_scrolling_on_a_telephone(visit, page):  # noqa: F811
    tab = visit(page, WIDTHS["telephone"])
    tables = "article table:not(.dataTable)"
    assert tab.locator(f"{tables} th:not([scope])").count() == 0
    assert tab.evaluate(f"""[...document.querySelectorAll("{tables}.cards")]
        .filter(table => table.offsetParent && (table.scrollWidth > table.parentElement.clientWidth + 1
                || getComputedStyle(table.querySelector('tbody tr')).display !== 'block'))
        .map(table => table.innerText.slice(0, 80))""") == []
    wide = tab.evaluate(f"""[...document.querySelectorAll("{tables}:not(.cards)")]
        .filter(t => t.tHead?.rows.length === 1 && t.rows[0].cells.length > 4).map(t => t.innerText.slice(0, 80))""")
    assert wide == [], "wide tables are cards"


@pytest.mark.browser
@built
@pages
def test_every_picture_says_what_it_shows_and_drawings_follow_the_page(visit, page):  # noqa: F811
    tab = visit(page, WIDTHS["desktop"])
    said = tab.evaluate("""[...document.querySelectorAll('article img, article svg.drawn')].map(
        e => e.getAttribute(e.tagName === 'IMG' ? 'alt' : 'aria-label'))""")
    assert all(words and len(words) > 20 and not re.search(r"\.png|\.svg", words) for words in said)
    for theme in ("light", "dark"):
        tab.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
        # on a map's fields, which keep their colours, words keep theirs
        of_page = r"!/^([+−][\d.]+|back: \d+%)$/.test(e.textContent.trim())" if "beyond-when" in str(page) else "true"
        inks, on_fields = (tab.evaluate(f"""[...document.querySelectorAll('svg.drawn text')].filter(
            e => ({of_page}) === {own}).map(e => getComputedStyle(e).fill)""") for own in ("true", "false"))
        assert set(on_fields) <= {"rgb(0, 0, 0)", "rgb(255, 255, 255)"}
        assert all((sum(map(int, re.findall(r"\d+", ink)[:3])) < 384) == (theme == "light") for ink in inks)


@pytest.mark.browser
@built
@moving_pages
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_every_control_answers_to_the_mouse(visit, page, width):  # noqa: F811
    tab = visit(page, width)
    ready(tab)
    for name in MOVING[page]:
        figure = tab.locator(f"#{name}")
        for control in figure.locator(".controls :is(input, select)").all():
            kind = control.evaluate("e => e.tagName === 'SELECT' ? e.options.length > 1 ? 'select' : 'single' : e.type")
            before = figure.locator(".stage").inner_html()
            if kind == "range":
                here = control.evaluate("e => (e.value - e.min) / (e.max - e.min)")
                drag(tab, control, 0.3 if here > 0.5 else 0.7)
            elif kind == "checkbox":
                control.click()
            elif kind == "select":
                control.select_option(index=control.evaluate("e => (e.selectedIndex + 1) % e.options.length"))
            else:
                continue
            tab.wait_for_timeout(200)
            assert figure.locator(".stage").inner_html() != before, f"{name}: {control.get_attribute('name')} changes nothing"


@pytest.mark.browser
@built
def test_what_scrolls_sideways_is_reached_with_the_keyboard(visit):  # noqa: F811
    tab = visit("chapters/ebn.html", WIDTHS["telephone"])
    tab.wait_for_function("document.querySelector('mjx-container')")
    tab.wait_for_timeout(500)
    found = tab.evaluate("""[...document.querySelectorAll("article mjx-container[display='true']")]
        .map(e => [e.scrollWidth > e.clientWidth, e.tabIndex === 0])""")
    assert found and all(scrolls == reached for scrolls, reached in found)


@pytest.mark.browser
@built
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_on_paper_a_page_is_its_text_and_figures_dark_on_white(visit, theme):  # noqa: F811
    tab = visit("chapters/figure1.html", WIDTHS["desktop"])
    tab.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
    tab.emulate_media(media="print")
    tab.wait_for_timeout(300)
    for hidden in (".bd-sidebar-primary", ".bd-header-article", ".controls", ".prev-next-footer"):
        assert all(not part.is_visible() for part in tab.locator(hidden).all()), hidden
    ink, ground = tab.evaluate("""[getComputedStyle(document.querySelector('article p')).color,
                                   getComputedStyle(document.body).backgroundColor]""")
    assert sum(map(int, re.findall(r"\d+", ink)[:3])) < 384
    assert sum(map(int, re.findall(r"\d+", ground)[:3])) > 700 or ground == "rgba(0, 0, 0, 0)"
    assert tab.locator("article details pre").first.is_visible(), "what is folded is unfolded"
