"""What is made of pages when the book is built and published, on a small book with the same extensions."""

import json
import re
from base64 import b64encode
from io import BytesIO

import pytest
import yaml
from test_book import BOOK, ROOT

from gstlib.reading.figures import axes

WORKFLOW = ROOT / ".github/workflows/book.yml"
CONFIG = yaml.safe_load((BOOK / "_config.yml").read_text())
ADDRESS, REPOSITORY = "https://example.org/book", "https://github.com/someone/replication"


def notebook(*outputs) -> str:
    cells = [{"cell_type": "markdown", "metadata": {}, "source": "# A chapter\n\n**The question.** Does it *hold*?"},
             {"cell_type": "code", "execution_count": 1, "metadata": {}, "source": "show()", "outputs": list(outputs)}]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return json.dumps({"nbformat": 4, "nbformat_minor": 4, "metadata": kernel, "cells": cells})


def shown(data: dict, metadata: dict | None = None) -> dict:
    return {"output_type": "display_data", "data": data, "metadata": metadata or {}}


@pytest.fixture(scope="module")
def sphinx_build(tmp_path_factory):
    """sphinx_build(**environment) builds a book of a page and a chapter, which has a figure, a table, a long script."""
    pytest.importorskip("sphinx_book_theme")
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    def build(**environment):
        place = tmp_path_factory.mktemp("book")
        source, figures = place / "book", place / "book/chapters/figures"
        figures.mkdir(parents=True)
        ax, png = axes("x", "y"), BytesIO()
        ax.plot([0, 1], color="#0072b2")
        figure = ax.figure
        figure.savefig(png, format="png")
        (figures / "line.png").write_bytes(png.getvalue())
        figure.savefig(figures / "line.svg")
        (figures / "banner.html").write_text("A banner")
        wide = "<table><thead><tr><th></th>" + "".join(f"<th>name {n}</th>" for n in range(5)) + (
            "</tr></thead><tbody><tr><th>row</th>" + "<td>1 &lt; 2</td>" * 5 + "</tr></tbody></table>")
        script = f"<script>const long = '{'x' * 200_000}';</script><script>'<table><th>kept</th></table>'</script>"
        (source / "chapters/a.ipynb").write_text(notebook(
            shown({"image/png": b64encode(png.getvalue()).decode()}, {"image/png": {"alt": 'It "rises"', "width": 600}}),
            shown({"text/html": wide}), shown({"text/html": script})))
        (source / "index.md").write_text("# A book\n\nThe answer.\n\n```{toctree}\nchapters/a\n```\n")
        options = {"launch_buttons": CONFIG["launch_buttons"], "path_to_docs": CONFIG["repository"]["path_to_book"],
                   "repository_branch": CONFIG["repository"]["branch"], "repository_url": CONFIG["repository"]["url"]}
        given = {"extensions": ["myst_nb", "sphinx_book_theme", "page_head", "page_body"], "nb_execution_mode": "off",
                 "html_theme": "sphinx_book_theme", "html_theme_options": options, "html_baseurl": CONFIG["html"]["baseurl"],
                 "html_use_index": CONFIG["sphinx"]["config"]["html_use_index"], "html_title": "A book"}
        with pytest.MonkeyPatch.context() as patch, docutils_namespace(), patch_docutils(source):
            patch.syspath_prepend(BOOK / "_ext")
            for name in ("BOOK_URL", "BOOK_REPOSITORY"):
                patch.delenv(name, raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            Sphinx(source, None, place / "html", place / "doctrees", "html", given, status=None, warning=None).build()
        return place / "html"

    return build


@pytest.fixture(scope="module")
def local(sphinx_build):
    return sphinx_build()


def test_one_address_feeds_canonical_links_open_graph_and_launch_buttons(sphinx_build, local):
    public = sphinx_build(BOOK_URL=ADDRESS, BOOK_REPOSITORY=REPOSITORY)
    for page in ("index.html", "chapters/a.html"):
        text = (public / page).read_text()
        assert re.findall(r'<link rel="canonical" href="([^"]+)"', text) == [f"{ADDRESS}/{page}"]
        assert re.findall(r'<meta property="og:url" content="([^"]+)"', text) == [f"{ADDRESS}/{page}"]
        assert not re.search("canonical|og:url|mybinder", (local / page).read_text()), "there is no address to name"
    launch, = set(re.findall(r'href="(https://mybinder[^"]+)"', (public / "chapters/a.html").read_text()))
    assert launch.endswith("/v2/gh/someone/replication/main?urlpath=lab/tree/chapters/a.ipynb")
    assert (ROOT / "chapters/claims.ipynb").exists(), "a chapter's notebook lies where the button leads"


def test_a_figure_stands_in_the_page_in_its_colours_with_its_text(local):
    text = (local / "chapters/a.html").read_text()
    (svg,) = re.findall(r'<svg class="drawn".*?</svg>', text, re.S)
    assert 'role="img" aria-label="It &quot;rises&quot;"' in svg and "max-width: 600px" in svg
    assert "currentColor" in svg and "#0072b2" in svg and not re.search("#262626|#ffffff|<style", svg)
    assert not re.search(r"<img[^>]*[0-9a-f]{64}\.png", text)
    ids, used = set(re.findall(r'\bid="([^"]+)"', svg)), set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    assert used and used <= ids and all(name.startswith("line-") for name in ids)


def test_headings_have_a_scope_and_wide_cells_their_column_s_name(local):
    (table,) = re.findall(r"<table\b[^>]*>.*?<td.*?</table>", (local / "chapters/a.html").read_text(), re.S)
    assert re.findall(r'<th scope="(\w+)">([^<]+)</th>', table.replace(' data-label=""', "")) == [
        *(("col", f"name {n}") for n in range(5)), ("row", "row")]
    assert "<th>" not in table and 'class="cards"' in table
    assert re.findall(r'<td data-label="([^"]*)">1 &lt; 2</td>', table) == [f"name {n}" for n in range(5)]


def test_what_weighs_lies_beside_the_pages(local):
    text = (local / "chapters/a.html").read_text()
    assert "x" * 1000 not in text and "<table><th>kept</th></table>" in text, "scripts are left as they are"
    (script,) = re.findall(r'<script src="../(_static/scripts/\w+\.js)"></script>', text)
    assert (local / script).read_text() == f"const long = '{'x' * 200_000}';"
    assert not re.search(r"fontawesome[^>]*\.js", text) and re.search(r"fontawesome[^>]*\.css", text)


def test_no_index_page_is_built_that_would_be_empty(local):
    assert not (local / "genindex.html").exists() and "genindex" not in (local / "index.html").read_text()


def test_the_workflow_builds_the_book_with_targets_that_there_are_and_publishes_it():
    flow = yaml.safe_load(WORKFLOW.read_text())
    (job,) = flow["jobs"].values()
    steps = job["steps"]
    targets = {word for step in steps for line in step.get("run", "").splitlines()
               for word in re.findall(r"^make (\w+)", line)}
    there = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"book"} <= targets <= there
    (folder,) = [step["with"]["path"] for step in steps if "upload-pages" in step.get("uses", "")]
    assert f"{folder}/index.html" in (ROOT / "Makefile").read_text(), "where make leaves the book"
    head = (BOOK / "_ext/page_head.py").read_text()
    assert all(f'"{name}"' in head for step in steps for name in step.get("env", {}))
    assert flow["permissions"]["pages"] == "write" and any("deploy-pages" in step.get("uses", "") for step in steps)
    known = {step["id"] for step in steps if "id" in step}
    assert set(re.findall(r"steps\.(\w+)\.", WORKFLOW.read_text())) <= known


def test_every_reference_leads_to_its_text():
    entries = re.findall(r"^@\w+\{([^,]+),(.*?)^\}", (BOOK / "references.bib").read_text(), re.M | re.S)
    assert len(entries) > 20
    for key, fields in entries:
        assert re.search(r"^  (doi|eprint|url) *= \{[^}]{6,}\}", fields, re.M), f"{key} has no DOI, e-print or address"
