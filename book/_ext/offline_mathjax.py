"""Serves MathJax from the book itself, so that its pages work without a network.

The script and its fonts come from the Python package django-static-mathjax,
which needs no Django and holds nothing but MathJax 3.2.2.  They are copied
beside the built pages, not under `book/_static/`, where jupyter-book would
add every script to every page.
"""

import shutil
from importlib.resources import as_file, files
from pathlib import Path

from sphinx.errors import ExtensionError

FOLDER = "mathjax"
SCRIPT = "tex-mml-chtml.js"
FONTS = "output/chtml/fonts/woff-v2"


def copy_mathjax(app):
    """Copy MathJax's script, its fonts and its licence to `_static/mathjax/` of the built book."""
    if app.builder.format != "html":
        return
    try:
        package = files("mathjax") / "static" / "mathjax"
    except ModuleNotFoundError as error:
        raise ExtensionError("MathJax is not installed; install the book's requirements: pip install -e '.[book]'") from error
    target = Path(app.outdir) / "_static" / FOLDER
    with as_file(package) as source:
        if not (source / "es5" / SCRIPT).is_file():
            raise ExtensionError(f"the installed package 'mathjax' has no es5/{SCRIPT}; it must be django-static-mathjax")
        shutil.copytree(source / "es5" / FONTS, target / FONTS, dirs_exist_ok=True)
        shutil.copy2(source / "es5" / SCRIPT, target / SCRIPT)
        shutil.copy2(source / "LICENSE", target / "LICENSE")


def setup(app):
    """Sphinx's entry point."""
    app.connect("config-inited", lambda app, config: setattr(config, "mathjax_path", f"{FOLDER}/{SCRIPT}"))
    app.connect("builder-inited", copy_mathjax)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
