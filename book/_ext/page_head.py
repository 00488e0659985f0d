"""What every page says of itself: a banner with the size behind it, and a description with title and picture for links.

The chapter on the claims writes banner and picture to `chapters/figures/` (`gstlib.book.front.write_head`).  The public
address is `html: baseurl` of `_config.yml`, or BOOK_URL in the environment of what publishes the book; Sphinx makes the
canonical address of a page from it, and launch buttons come from the repository's.
"""

import os
import re
import shutil
from html import escape, unescape
from pathlib import Path

LONGEST = 300  # characters of a description
CARD = "card.png"


def made(app, name: str) -> Path:
    """Where the chapters left the file `name`."""
    return Path(app.confdir) / "chapters" / "figures" / name


def publish(app, config):
    """Take the addresses from the environment, where they are there."""
    config.html_baseurl = os.environ.get("BOOK_URL") or config.html_baseurl
    options = config.html_theme_options = {**config.html_theme_options}
    options["repository_url"] = os.environ.get("BOOK_REPOSITORY") or options["repository_url"]
    if not options["repository_url"]:
        del options["launch_buttons"]  # there is nothing to launch from


def announce(app, config):
    """Put the banner above every page."""
    if made(app, "banner.html").exists() and (banner := made(app, "banner.html").read_text()):
        config.html_theme_options = {**config.html_theme_options, "announcement": banner}


def describe(app, pagename, templatename, context, doctree):
    """Describe a page by its first paragraph, which is a chapter's question and the front page's answer."""
    if not (first := re.search(r"<p\b[^>]*>(.+?)</p>", context.get("body") or "", re.S)):
        return
    words = " ".join(unescape(re.sub(r"<[^>]+>", "", first[1])).replace("The question. ", "").split())
    tags = {"og:type": "article", "og:title": unescape(re.sub(r"<[^>]+>", "", context["title"])),
            "og:description": words if len(words) <= LONGEST else words[:LONGEST].rpartition(" ")[0] + " …"}
    if base := app.config.html_baseurl:
        tags |= {"og:url": context["pageurl"]}
    if made(app, CARD).exists():  # those who show it ask for a whole address, which only a public book has
        tags["og:image"] = f"{base.rstrip('/')}/_static/{CARD}" if base else context["pathto"](f"_static/{CARD}", 1)
    lines = [f'<meta name="description" content="{escape(tags["og:description"])}">',
             *(f'<meta property="{name}" content="{escape(value)}">' for name, value in tags.items())]
    context["metatags"] = "\n".join([context.get("metatags") or "", *lines, ""])


def copy_card(app, exception):
    """Copy the picture beside the built pages."""
    if exception is None and app.builder.format == "html" and made(app, CARD).exists():
        shutil.copy2(made(app, CARD), Path(app.outdir) / "_static" / CARD)


def setup(app):
    """Sphinx's entry point."""
    app.connect("config-inited", publish)
    app.connect("config-inited", announce)
    app.connect("html-page-context", describe)
    app.connect("build-finished", copy_card)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
