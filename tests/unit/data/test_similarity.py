"""The loose form in which texts are compared."""

from __future__ import annotations

import random
import time
import unicodedata

import pytest

from phlora.data.similarity import _CLOSING, _OPENING, _one_form, loose

_FORMS = {0x307: ""} | dict.fromkeys(map(ord, "‘’"), "'") | dict.fromkeys(map(ord, "“”„«»"), '"')


def _word_by_word(text):
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_FORMS)
    words = [word.lstrip(_OPENING).rstrip(_CLOSING) for word in folded.split()]
    return " ".join(filter(None, words)) or folded.strip()


def test_loose_form_is_what_words_are_without_marks_around_them():
    chance = random.Random(1)
    characters = f"{_OPENING}{_CLOSING}aB é\n\t\x1c\u3000\u2028İß(—-"
    for _ in range(20000):
        text = "".join(chance.choices(characters, k=chance.randrange(14)))
        assert loose(text) == _word_by_word(text)


@pytest.mark.parametrize(
    "text", ["." * 200_000 + "a", "'" * 200_000, "a" + "'" * 200_000 + "b", "a." * 100_000]
)
def test_loose_form_takes_a_time_that_grows_with_the_text_alone(text):
    start = time.process_time()
    loose(text)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "one, other",
    [
        ("\u200fمرحبا\u200e بك", "مرحبا بك"),
        ("\ufeffword\u200b", "word"),
        ("İstanbul", "istanbul"),
        ("IŞIK", "ışık"),
        ("علي كتاب", "علی کتاب"),
        ("می\u200cشود", "میشود"),
        ("مُحَمَّد", "محمد"),
        ("سال ۱۴۰۲", "سال 1402"),
        ("عام ١٤٠٢", "عام 1402"),
        ("don’t", "don't"),
        ("rock“n”roll", 'rock"n"roll'),
    ],
)
def test_what_is_written_in_two_ways_is_one_text(one, other):
    assert loose(one) == loose(other)


@pytest.mark.parametrize("one, other", [("سال ۱۴۰۲", "سال ۱۴۰۳"), ("kar", "kır"), ("-1", "1"), ("é", "e")])
def test_what_says_another_thing_is_another_text(one, other):
    assert loose(one) != loose(other)


def test_every_character_with_another_form_is_found():
    form, *patterns = _one_form()
    assert all(any(pattern.fullmatch(character) for pattern in patterns) for character in form)
    for character in "يكﻱ٣𝟛\u200f\U000e0041ı“”":
        plain = unicodedata.normalize("NFKC", character).casefold()
        assert loose(f"a{character}b") == f"a{form.get(plain, plain)}b"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("سلام، خوب", "سلام خوب"),
        ("سلام؛ خوب", "سلام, خوب"),
        ("ٹھیک ہے۔", "ٹھیک ہے"),
        ("Բարեւ։", "Բարեւ"),
        ("መልካም።", "መልካም"),
        ("I ❤\ufe0f you", "I ❤ you"),
        ("e\u2011mail", "e-mail"),
    ],
)
def test_marks_of_other_scripts_make_no_difference(one, other):
    assert loose(one) == loose(other)
