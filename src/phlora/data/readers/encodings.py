"""Which encoding the bytes of a text are in, when they are not UTF-8.

charset-normalizer tells scripts apart (Arabic, Cyrillic, Thai, Chinese, …). The Latin code pages differ in a few
letters only, so they are told apart by alphabets: bytes that spell Turkish letters in cp1254 spell, in cp1250,
letters that no single language has. Where two readings remain, nothing is chosen: a wrong one would train mojibake.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass

from phlora.errors import ConfigError, DataError, did_you_mean

SAMPLE_CHARACTERS = 40
_ALPHABETS = {
    "cp1252": (
        "äöüß",  # German
        "àâæçéèêëîïôœùûüÿ",  # French
        "áéíñóúü¿¡ªº",  # Spanish
        "áâãàçéêíóôõúüªº",  # Portuguese
        "àèéìíîòóùú",  # Italian
        "æøåéèêóôàüö",  # Danish, Norwegian
        "åäöéàü",  # Swedish, Finnish
        "áéëèêïíóöüú",  # Dutch
        "áðéíóúýþæö",  # Icelandic
        "àçéèíïòóúü·",  # Catalan
    ),
    "cp1250": (
        "ąćęłńóśźż",  # Polish
        "áčďéěíňóřšťúůýž",  # Czech
        "áäčďéíĺľňóôŕšťúýž",  # Slovak
        "áéíóöőúüű",  # Hungarian
        "čćđšžáéíóú",  # Serbian, Croatian, Bosnian, Slovenian
        "ăâîşţ",  # Romanian
        "çë",  # Albanian
    ),
    "cp1254": ("çğıöşüâîû",),  # Turkish
    "cp1257": ("ąčęėįšųūž", "āčēģīķļņšūž", "äöõüšž"),  # Lithuanian, Latvian, Estonian
    "cp1258": (
        "àáâãăèéêìíĩòóôõơùúũưýđ\u0300\u0301\u0303\u0309\u0323",
    ),  # Vietnamese: tones are combining marks
}
_SCRIPTS = tuple("cp1251 koi8_r cp1253 cp1255 cp1256 cp874 shift_jis euc_jp gb18030 big5 euc_kr".split())
# Of DOS and old Macintoshes: offered, never guessed.
_OLD = ("cp850", "mac_roman", "cp437")
# Letters outside an alphabet: names and quotations of other languages.
_MAX_FOREIGN = 0.02


@dataclass(frozen=True)
class Guess:
    """An encoding, and a piece of the text that it gives."""

    encoding: str
    sample: str


def lookup(encoding: str) -> str:
    """Python's name of a text encoding.

    Raises:
        ConfigError: there is none of this name.
    """
    try:
        info = codecs.lookup(encoding)
        "".encode(info.name)
    except (LookupError, ValueError):
        known = [*_ALPHABETS, *_SCRIPTS, "utf-8", "utf-16", "latin-1", "iso8859-2", "iso8859-9", "mac-roman"]
        raise ConfigError(
            f"`{encoding}` is no text encoding", where="encoding", fix=did_you_mean(encoding, known)
        ) from None
    return info.name


def guess_encoding(text: bytes, *, where: str) -> Guess:
    """The encoding of a text that is not UTF-8.

    Args:
        text: the lines of a file that hold other characters than ASCII.

    Raises:
        DataError: several encodings give sensible, different texts, or none does; the message shows them.
    """
    readings: dict[str, Guess] = {}
    for encoding in (*_latin(text), *_scripts(text)):
        decoded = text.decode(encoding)
        readings.setdefault(decoded, Guess(encoding, sample_of(decoded)))
    if len(readings) == 1:
        return next(iter(readings.values()))
    offered = list(readings.values()) or list(_all_readings(text))
    found = "; ".join(f"as {guess.encoding}: {guess.sample}" for guess in offered[:8])
    raise DataError(
        f"The file is not UTF-8, and its encoding is not certain. It reads {found}"
        if offered
        else "The file is not UTF-8 text, and no other encoding fits",
        where=where,
        expected="UTF-8, or the name of the encoding",
        fix="say which reading is right, with `--encoding NAME`, or `encoding:` beside the file's `path:`"
        if offered
        else "check how the file was written",
    )


def _latin(text: bytes) -> Iterator[str]:
    """The code pages in which (nearly) all letters beyond ASCII belong to one language."""
    for encoding, alphabets in _ALPHABETS.items():
        letters = _letters(text, encoding)
        if letters is None:
            continue
        if not letters:
            yield encoding  # typographic quotes and dashes only: they are the same in all of these
        for alphabet in alphabets:
            foreign = sum(letter.lower() not in alphabet and letter != "İ" for letter in letters)
            if letters and foreign <= _MAX_FOREIGN * len(letters):
                yield encoding
                break


def _letters(text: bytes, encoding: str) -> list[str] | None:
    """The letters and marks beyond ASCII; None where the bytes are not of this encoding."""
    try:
        decoded = text.decode(encoding)
    except UnicodeDecodeError:
        return None
    if any("\x80" <= character < "\xa0" for character in decoded):
        return None  # control characters: no text has them
    return [c for c in decoded if c > "\x7f" and (c.isalpha() or "\u0300" <= c <= "\u036f")]


def _scripts(text: bytes) -> Iterator[str]:
    """What charset-normalizer takes a text of another script for: more than one where it sees no difference."""
    from charset_normalizer import from_bytes

    found = from_bytes(text, cp_isolation=[*_SCRIPTS, *_ALPHABETS], threshold=0.3)
    sensible = [
        match for match in found if match.encoding in _SCRIPTS and _is_sensible(match.encoding, str(match))
    ]
    if not sensible or (best := found.best()) is None:
        return
    coherence = max(match.coherence for match in sensible)
    for match in sensible:
        if match.chaos <= best.chaos + 0.05 and match.coherence >= coherence - 0.1:
            yield match.encoding


def _is_sensible(encoding: str, text: str) -> bool:
    """Whether the letters are mixed as texts of the encoding's languages mix them."""
    letters = [character for character in text if character.isalpha()]
    strange = [character for character in letters if character > "\x7f"]
    # The texts of other scripts consist of their letters, those of Latin ones hold a few.
    if len(strange) <= 0.3 * len(letters):
        return False
    kana = _share(strange, "\u3040", "\u30ff")
    hangul = _share(strange, "\uac00", "\ud7a3")
    if encoding in ("shift_jis", "euc_jp"):
        return kana > 0.1 and _share(strange, "\uff61", "\uff9f") < 0.1
    if encoding == "euc_kr":
        return hangul > 0.9
    if encoding in ("gb18030", "big5"):
        return _share(strange, "\u4e00", "\u9fff") > 0.9
    if encoding == "cp874":
        return not any(letter in "\u0e03\u0e05\u0e5a\u0e5b" for letter in text)  # letters out of use
    return True


def _share(characters: list[str], low: str, high: str) -> float:
    return sum(low <= character <= high for character in characters) / max(1, len(characters))


def _all_readings(text: bytes) -> Iterator[Guess]:
    seen = set()
    for encoding in dict.fromkeys(("cp1252", *_OLD, *_ALPHABETS, *_SCRIPTS)):
        try:
            decoded = text.decode(encoding)
        except UnicodeDecodeError:
            continue
        if decoded not in seen:
            seen.add(decoded)
            yield Guess(encoding, sample_of(decoded))


def sample_of(text: str) -> str:
    """A piece of the text around its first character beyond ASCII."""
    first = next((index for index, character in enumerate(text) if character > "\x7f"), 0)
    start = max(0, first - SAMPLE_CHARACTERS // 3)
    if start and not text[start - 1].isspace():  # from the beginning of a word, where there is one
        start += next((n + 1 for n, c in enumerate(text[start:first]) if c.isspace()), 0)
    piece = " ".join(text[start : start + SAMPLE_CHARACTERS].split())
    return f"“{piece}”"
