"""The guide says the same in every language: the code, the commands and the links of the English page, in its order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "guide"
# A letter of the language's script, and a word that only this language has.
LANGUAGES = {
    "fa": r"[\u0600-\u06ff]",
    "hi": r"[\u0900-\u097f]",
    "sr": r"[\u0400-\u04ff]",
    "tr": r"[ğışçöüİ]",
    "vi": r"[ạảấầẩậắằặẹẻếềểệỉịọỏốồổộớờởợụủứừửựỳỷỹđ]",
}
# Numbers that a language writes in its own way.
WRITTEN = {"hi": ("13.5 करोड़", "135"), "sr": ("[седми корак]", "[7]")}
CODE = re.compile(r"^```\w*\n(?:.*\n)*?```$|(?:^ {4}\S.*\n)+", re.MULTILINE)


def page(language: str) -> str:
    return (GUIDE / f"{language}.md").read_text(encoding="utf-8")


def code_of(text: str) -> list[str]:
    return [block.strip("\n") for block in CODE.findall(text)]


def prose_of(text: str) -> str:
    return re.sub(r"`[^`]*`", "", CODE.sub("", text))


def links_of(text: str) -> set[str]:
    return {*re.findall(r"\]\(([^)]+)\)", text)}


@pytest.mark.parametrize("language", LANGUAGES)
def test_code_and_commands_are_those_that_run(language: str) -> None:
    assert code_of(page(language)) == code_of(page("en"))


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_section_and_every_name_is_there(language: str) -> None:
    here, english = page(language), page("en")
    for mark in (r"^# ", r"^## ", r'^<a id="data"></a>$'):
        assert len(re.findall(mark, here, re.MULTILINE)) == len(re.findall(mark, english, re.MULTILINE))
    names = re.findall(r"`([^`]+)`", CODE.sub("", english))
    assert not {name for name in names if name not in here}


def numbers_of(language: str) -> list[list[float]]:
    """The numbers in the prose of each section, whatever its digits."""
    text = prose_of(page(language)).replace(*WRITTEN.get(language, ("", ""))).replace("٫", ".")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    return [sorted(map(float, re.findall(r"\d+(?:\.\d+)?", section))) for section in sections]


@pytest.mark.parametrize("language", LANGUAGES)
def test_numbers_are_those_of_the_english_page(language: str) -> None:
    assert numbers_of(language) == numbers_of("en")


@pytest.mark.parametrize("language", LANGUAGES)
def test_links_are_those_of_the_english_page_and_of_all_other_languages(language: str) -> None:
    others = {f"{name}.md" for name in ("en", *LANGUAGES)} - {f"{language}.md"}
    here, english = links_of(page(language)), links_of(page("en"))
    assert here >= others and here - others == english - others - {f"{language}.md"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_paragraph_is_in_its_language(language: str) -> None:
    for paragraph in re.split(r"\n\s*\n", prose_of(page(language))):
        letters = re.findall(r"[^\W\d_]", re.sub(r"\([^)]*\)|<[^>]*>", "", paragraph))
        if len(letters) > 40 and ".md" not in paragraph:
            assert re.search(LANGUAGES[language], paragraph), paragraph


def test_right_to_left_text_holds_no_code_block() -> None:
    """Code between right-to-left paragraphs is left-to-right: it stands outside of them."""
    inside = re.findall(r'<div dir="rtl">(.*?)</div>', page("fa"), re.DOTALL)
    assert inside and not any(code_of(f"{part}\n") for part in inside)
    outside = re.sub(r'<div dir="rtl">.*?</div>', "", page("fa"), flags=re.DOTALL)
    assert not re.search(LANGUAGES["fa"], outside)


def test_names_that_begin_or_end_with_a_mark_keep_it_on_its_side_in_right_to_left_text() -> None:
    names = {f"`{name}`" for name in re.findall(r"`([^`]+)`", CODE.sub("", page("fa")))}
    marked = [name for name in names if not re.fullmatch(r"`[^\W_](?:.*[^\W_])?`", name)]
    assert marked and all(f'<span dir="ltr">{name}</span>' in page("fa") for name in marked)
