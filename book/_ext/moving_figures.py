"""Serves what figures that move need from the book itself: Vega, Vega-Lite, Vega-Embed and `moving.js`, as one file.

The Python package vl-convert-python bundles them.  The file lies beside the built pages, once for the whole book, and
only pages that have such a figure (`gstlib.book.moving`) load it.
"""

from pathlib import Path

from sphinx.errors import ExtensionError

SCRIPT = "moving/moving.js"


def write_bundle(app):
    """Write the bundle to `_static/moving/` of the built book, as one function, so that it leaves no names behind."""
    if app.builder.format != "html":
        return
    try:
        import vl_convert
    except ModuleNotFoundError as error:
        raise ExtensionError("vl-convert is missing; install the book's requirements: pip install -e '.[book]'") from error
    target = Path(app.outdir) / "_static" / SCRIPT
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f"(() => {{{vl_convert.javascript_bundle(Path(__file__).with_name('moving.js').read_text())}}})();\n")


def load(app, pagename, templatename, context, doctree):
    """Let a page load the bundle when it has a figure that moves."""
    if 'class="moving"' in context.get("body", ""):
        app.add_js_file(SCRIPT, loading_method="defer")


def setup(app):
    """Sphinx's entry point."""
    app.connect("builder-inited", write_bundle)
    app.connect("html-page-context", load)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
