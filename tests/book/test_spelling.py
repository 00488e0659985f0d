"""Every word of the prose is in pyspellchecker's English dictionary or in words.txt beside this file."""

import re
from pathlib import Path

import pytest
from spellchecker import SpellChecker
from test_book import ROOT, texts

OUR_WORDS = frozenset((Path(__file__).parent / "words.txt").read_text().split())
# the dictionary knows both spellings; names of things may keep a z: generalization, batch normalization
AMERICAN = re.compile(r"(?i)(color|gray|behavior|center|favor|label(ed|ing)|modeling|neighbor|analyz).*|"
                      r"(general|normal|optim|random|initial|recogn|summar|visual|organ|minim|maxim)iz(e|es|ed|er|ing)")
NOT_PROSE = (
    r"(?ms)^( *)(`{3,}|:{3,}\{math\}).*?^\1(`{3,}|:{3,}) *$",  # code, formulas and directives between fences
    r"(?ms)^(:{3,}.*?|:\w+:.*?|\([\w-]+\)=)$",  # the fences of other directives, their options, labels
    r"(?s)\$\$.*?\$\$", r"\$[^$]+\$",
    r"(\{[\w:-]+\})?(`+)[^`]+\2",  # code, and roles such as citations
    r"(?s)<!--.*?-->", r"</?\w[^>]*>",
    r"https?://[^\s)>\]]+", r"(?<=\])\([^)]*\)",
    r"[\w/.-]*[\d_/][\w/.-]*",  # numbers, file names
)


def words(text: str) -> set[str]:
    """The words of a text in Markdown, without possessive endings."""
    for pattern in NOT_PROSE:
        text = re.sub(pattern, " ", text)
    found = re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text)
    return {re.sub(r"['’]s?$", "", word) for word in found}


def prose() -> dict[str, str]:
    """The README, the book's pages and the chapters' text by file name."""
    return texts() | {"README.md": (ROOT / "README.md").read_text()}


@pytest.fixture(scope="module")
def dictionary() -> SpellChecker:
    return SpellChecker()


def misspelt(found: set[str], dictionary: SpellChecker) -> list[str]:
    """Words that nobody knows; our own count as written, or with a capital at the beginning of a sentence."""
    ours = OUR_WORDS | {word.capitalize() for word in OUR_WORDS if word.islower()}
    unknown = dictionary.unknown(word.lower() for word in found - ours if len(word) > 1)
    return sorted(word for word in found - ours if word.lower() in unknown)


@pytest.mark.parametrize("name", sorted(prose()))
def test_every_word_is_known(name, dictionary):
    wrong = misspelt(words(prose()[name]), dictionary)
    assert not wrong, f"{name}: {', '.join(wrong)}; mend them, or add them to tests/book/words.txt if they are right"


@pytest.mark.parametrize("name", sorted(prose()))
def test_spelling_is_british(name):
    american = sorted(filter(AMERICAN.fullmatch, words(prose()[name])))
    assert not american, f"{name}: {', '.join(american)}"


def test_a_misspelt_word_is_found_and_what_is_no_prose_is_not(dictionary):
    text = """# A titel
The netwrok's `accuracyy` is $x_{abcd}$, see [here](ohter.md) or {cite:p}`qwertz` of 2x3 <b>teh</b>.

```python
qqqq = 3
```
:::{table}
:name: wxyz
colums
:::
"""
    assert misspelt(words(text), dictionary) == ["colums", "netwrok", "teh", "titel"]
    assert [bool(AMERICAN.fullmatch(word)) for word in ("Optimizer", "coloring", "optimiser", "generalization")] == [
        True, True, False, False]
