"""HTML for notebooks: nothing of the user's is markup, and every text has its own direction."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from phlora.markup import bar, block, escaped, folded, line, preformatted, table

EVIL = "<script>alert(1)</script>\"'&\x1b\u202e"
VOID = ("br", "img", "hr", "input", "meta")


class Page(HTMLParser):
    """Elements with their attributes, and their texts; fails on tags that do not match."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(markup)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


@pytest.mark.parametrize(
    "markup",
    [
        line(EVIL),
        line(EVIL, "warn"),
        preformatted(EVIL),
        table([EVIL, EVIL], [[EVIL, EVIL]], numbers=(1,)),
        folded(EVIL, line(EVIL)),
        block(line(EVIL)),
    ],
)
def test_no_text_becomes_markup(markup: str) -> None:
    page = Page(markup)
    assert "script" not in [tag for tag, _ in page.elements]
    assert "<script>alert(1)</script>\"'&\\x1b\\u202e" in page.text
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_every_text_has_its_own_direction_and_numbers_stand_in_their_order() -> None:
    page = Page(table(["متن", "n"], [["سلام", "1 - 2"]], numbers=(1,)))
    cells = [attributes["dir"] for tag, attributes in page.elements if tag in ("td", "th")]
    assert cells == ["auto", "ltr"] * 2
    assert Page(line("سلام")).elements[0][1]["dir"] == "auto"


def test_bars_stay_within_their_place() -> None:
    widths = [Page(bar(share).markup).elements[0][1]["style"] for share in (-1, 0.5, 3)]
    assert widths == ["width:0.00em", "width:6.00em", "width:12.00em"]


def test_line_ends_stay_and_control_characters_are_spelled_out() -> None:
    assert escaped("a\n\tb\x07") == "a\n\tb\\x07"
