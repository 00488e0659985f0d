"""What every page is made of, once Sphinx has built it: its figures, its tables, and nothing that weighs.

- A figure that a chapter drew stands in the page as SVG in the page's own colours, with the text that describes it;
  the chapter left PNG and SVG side by side in `chapters/figures/`.
- A table's headings say what they head; a wide one can be read as cards on a telephone (`book.css`).
- A long script within a page becomes a file beside the pages, and the theme's icons come as fonts alone.
"""

import json
import re
from base64 import b64decode
from functools import cache
from hashlib import sha256
from html import escape
from pathlib import Path

from bs4 import BeautifulSoup

WIDE = 4  # columns from which on a table is cards on a telephone
LONG = 100_000  # characters of a script
ICONS = re.compile(r'<(script|link)[^>]*fontawesome/[^>]*\.js[^>]*>(</script>)?')  # 1.5 MB that do what the fonts do
INK = {"#262626": "currentColor", "#4d4d4d": "currentColor", "#e6e6e6": "color-mix(in srgb, currentColor 15%, transparent)",
       "#ffffff": "none"}


@cache
def drawn(figures: Path) -> dict[str, Path]:
    """The SVG of every figure by the digest of its PNG, which is the name that myst-nb gives the picture."""
    return {sha256(png.read_bytes()).hexdigest(): png.with_suffix(".svg") for png in figures.glob("*.png")
            if png.with_suffix(".svg").exists()}


def described(notebook: Path) -> dict[str, str]:
    """The text that describes each picture of an executed notebook, by the picture's digest."""
    outputs = [output for cell in json.loads(notebook.read_text())["cells"] for output in cell.get("outputs", [])
               if "image/png" in output.get("data", {})]
    return {sha256(b64decode(output["data"]["image/png"])).hexdigest(): output["metadata"]["image/png"]["alt"]
            for output in outputs if "alt" in output["metadata"].get("image/png", {})}


def in_page(svg: str, name: str, alt: str, width: str) -> str:
    """An SVG of matplotlib's as a part of a page: in the page's colours, with ids that no other figure has."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style\b.*?</style>", "", svg[svg.index("<svg"):], flags=re.S)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    # words in white stand on a field of a map, which keeps its colour
    svg = re.sub("|".join(["<text[^>]*#ffffff[^>]*>", *INK]), lambda found: INK.get(found[0], found[0]), svg)
    svg = svg.replace("'DejaVu Sans'", "inherit")
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    return svg.replace("<svg", f'<svg class="drawn" role="img" aria-label="{escape(alt)}" style="max-width: {width}; '
                               'stroke-linejoin: round"', 1)


def draw(body: str, app, pagename: str) -> str:
    """The page with its figures as SVG, and with the text of every other picture that has one."""
    notebook = Path(app.srcdir) / f"{pagename}.ipynb"
    if not notebook.exists():
        return body
    alts, svgs = described(notebook), drawn(Path(app.srcdir) / "chapters" / "figures")

    def shown(found: re.Match) -> str:
        digest = found["digest"]
        if digest not in alts:
            return found[0]
        width = re.search(r"width: (\d+px)", found[0])[1]
        if digest in svgs:
            return in_page(svgs[digest].read_text(), svgs[digest].stem, alts[digest], width)
        return re.sub(r'alt="[^"]*"', lambda _: f'alt="{escape(alts[digest])}"', found[0])

    return re.sub(r'<img [^>]*src="[^"]*/(?P<digest>[0-9a-f]{64})\.png"[^>]*>', shown, body)


def table(found: re.Match) -> str:
    """A table whose headings have a scope; where it is wide each cell carries its column's name, for a telephone."""
    soup = BeautifulSoup(found[0], "html.parser")
    for heading in soup.find_all("th"):
        if heading.get_text(strip=True):
            heading["scope"] = "col" if heading.find_parent("thead") else "row"
        else:
            heading.name = "td"
    head = soup.thead.find_all("tr") if soup.thead else []
    if len(head) == 1 and len(names := [cell.get_text(" ", strip=True) for cell in head[0].find_all(["th", "td"])]) > WIDE:
        soup.table["class"] = [*soup.table.get("class", []), "cards"]
        for row in soup.table.find_all("tr")[1:]:
            for cell, name in zip(row.find_all(["td", "th"]), names):
                cell["data-label"] = name
    return str(soup)


def outside(script: re.Match, app) -> str:
    """A script as a file beside the pages."""
    name = f"scripts/{sha256(script[1].encode()).hexdigest()[:16]}.js"
    place = Path(app.outdir) / "_static" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(script[1])
    return name


def improve(app, pagename, templatename, context, doctree):
    """All of it, for one page."""
    if "body" not in context:
        return
    parts = re.split(r"(<script\b.*?</script>)", draw(context["body"], app, pagename), flags=re.S)
    for number, part in enumerate(parts):
        if not part.startswith("<script"):
            parts[number] = re.sub(r"<table\b.*?</table>", table, part, flags=re.S)
        elif len(part) > LONG and (script := re.fullmatch(r"<script>(.*)</script>", part, flags=re.S)):
            parts[number] = f'<script src="{context["pathto"]("_static/" + outside(script, app), 1)}"></script>'
    # the items of the list of references, whose own role a list does not know
    context["body"] = "".join(parts).replace('role="doc-biblioentry"', 'role="listitem"')


def lighten(app, exception):
    """Take the icons' script out of the built pages."""
    if exception is None and app.builder.format == "html":
        for page in Path(app.outdir).rglob("*.html"):
            page.write_text(ICONS.sub("", page.read_text()))


def setup(app):
    """Sphinx's entry point."""
    app.connect("html-page-context", improve)
    app.connect("build-finished", lighten)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
