"""What the book says of a claim is written by the table of verdicts: prose of its own explains verdicts and gives none."""

import re

import pytest
from test_spelling import prose

from gstlib.book import readme

WORDS = re.compile(r"\b(supported|contradicted|inconclusive|not run|(?:could|did) not be (?:reproduced|replicated)"
                   r"|(?:was|were|is|are) (?:not )?(?:reproduced|replicated|confirmed|refuted)|we (?:confirm|refute|reproduce))\b")
# pages that say what the words mean, how often a rule errs, and what the first edition got wrong
EXPLAIN = {"how-to-read.md", "glossary.md", "errata.md", "claims.ipynb", "sure.ipynb"}


def own(text: str) -> str:
    """A text without what is generated from the results, the README's part between its markers."""
    return readme.replaced(text, "")


@pytest.mark.parametrize("name", sorted(prose()))
def test_no_page_gives_a_verdict_that_is_not_the_table_s(name):
    found = WORDS.findall(own(prose()[name]))
    assert not found or name in EXPLAIN, f"{name} says {found}; take the word from the table, by glue"


def test_a_verdict_in_prose_would_be_seen():
    assert WORDS.search(own("C1 is supported.")) and WORDS.search(own("The claim was not reproduced at this size."))
    assert not WORDS.search(own(f"{readme.BEGIN}\n| C1 | supported |\n{readme.END}\nTwo processes were not tried."))
