"""American spelling in every text of the repository: names, prose, messages and tests."""

from __future__ import annotations

import re
import subprocess
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BRITISH = {
    r"(general|equal|final|initial|local|maxim|minim|normal|optim|organ|quant|random|real|recogn"
    r"|regular|serial|special|standard|summar|synchron|token|util|visual)is(e|ed|er|es|ing|ation)":
        r"\1iz\2",
    r"(analy)s(e|ed|ing)": r"\1z\2",
    r"(arm|behavi|col|fav|harb|hon|lab|neighb)our": r"\1or",
    r"(label|model|cancel|travel)l(ed|er|ing)": r"\1\2",
    r"(cent|fib|met|theat)re": r"\1er",
    r"(cent)red": r"\1ered",
    r"(catal|dial)ogue": r"\1og",
    "grey": "gray",
    "learnt": "learned",
    "artefact": "artifact",
    "licence": "license",
}  # fmt: skip
"""British forms within words, and what stands in their place."""

PATTERN = re.compile("|".join(f"(?:{form})" for form in BRITISH), re.IGNORECASE)

TEXT = {".py", ".md", ".toml", ".txt", ".yml", ""}
"""Suffixes of files that people write."""

TYPOS = {"quantise"}
"""Names of no command and no function, in tests of mistakes."""


def written() -> list[Path]:
    """Tracked files that people write."""
    command = ["git", "ls-files"]
    git = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if git.returncode:
        pytest.skip("not a checkout")
    files = [ROOT / name for name in git.stdout.splitlines()]
    return [
        path
        for path in files
        if path.is_file()
        and path.suffix in TEXT
        and "LICENSE" not in path.name
        and path != Path(__file__)
    ]


def british(text: str) -> list[str]:
    """British forms in a text."""
    return [word for match in PATTERN.finditer(text) if (word := match.group()) not in TYPOS]


def american(text: str) -> str:
    """A text in American spelling, as which the files can be written."""
    for form, other in BRITISH.items():
        text = re.sub(form, partial(_replace, other), text, flags=re.IGNORECASE)
    return text


def _replace(form: str, match: re.Match[str]) -> str:
    """The American form of a match, in its case."""
    word, before = match.expand(form), match.group()
    if before.isupper():
        return word.upper()
    return word.capitalize() if before[0].isupper() else word


@pytest.mark.parametrize(
    ("text", "forms"),
    [
        ("normalised Colours, unlabelled_images, LabelledImages", 4),
        ("neighbours centred on the centre, grey, learnt", 5),
        ("noise is raised precisely; four hours; otherwise, parameters of metrics; realises", 1),
        ("normalized colors, unlabeled, labeled, neighbors, centers, gray, learned", 0),
    ],
)
def test_british_forms_are_told_from_other_words(text: str, forms: int) -> None:
    assert len(british(text)) == forms
    assert not british(american(text))


def test_case_is_kept() -> None:
    assert american("LabelledImages, Grey, GREY, colours") == "LabeledImages, Gray, GRAY, colors"


def test_spelling_is_american() -> None:
    assert {
        path.relative_to(ROOT).as_posix(): forms
        for path in written()
        if (forms := british(path.read_text(encoding="utf-8")))
    } == {}
