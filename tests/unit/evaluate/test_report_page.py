"""The page of a report: whole, safe, and readable in every script."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from reports import LANGUAGES, comparison_of, improved, report_of, side

from phlora.evaluate.compare import compare
from phlora.evaluate.report import is_path, marked_words, split_origin

VOID = {"meta", "wbr"}


class Page(HTMLParser):
    """Elements with their texts, and for every text whether an element around it sets its direction."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, bool]] = []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop()[0] == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if not any(tag == "style" for tag, _ in self.open):
            self.texts.append((data, any(attrs.get("dir") == "auto" for _, attrs in self.open)))


class TestPage:
    def test_is_whole_and_asks_for_nothing_outside(self) -> None:
        text = report_of(
            improved(),
            training_curve=[(step, 2.0 / step, 1e-4) for step in range(1, 30)],
            evaluation_curve=[(10, 0.4), (29, 0.2)],
            config={"model": {"name": "m"}},
            environment={"torch": "2"},
        ).to_html()
        page = Page(text)
        tags = [tag for tag, _ in page.tags]
        assert not {"script", "link", "img", "iframe", "object"} & set(tags)
        assert tags.count("circle") == 2 and tags.count("polyline") == 2
        for _, attributes in page.tags:
            assert not {"src", "href", "onload", "onclick"} & attributes.keys()
        assert not re.search(r"https?://|url\(|@import", text)

    def test_characters_that_hide_or_turn_text_are_spelled_out(self) -> None:
        base = "ab\x1b[31mred\x9b \u202etxt.exe\u2066 \u200bend"
        kept = "می\u200cروم \u200fו \u061c"
        page = report_of(comparison_of([base], [kept], ["سلام\r\nx"], "rouge_l", questions=[base])).to_html()
        for character in "\x1b\x9b\u202e\u2066\r":
            assert character not in page
        assert r"\x1b[31mred\x9b \u202etxt.exe\u2066" in page.replace("<mark>", "").replace("</mark>", "")
        assert r"\u200c" not in page and r"\u061c" not in page and "\u200c" in page

    def test_a_policy_allows_nothing_from_outside(self) -> None:
        policy = re.search(
            r'http-equiv="Content-Security-Policy" content="([^"]*)"', report_of(improved()).to_html()
        )
        assert policy is not None and policy[1].startswith("default-src 'none'") and "script" not in policy[1]

    def test_dangerous_text_is_text(self) -> None:
        evil = '<script>alert("1")</script><img src=x onerror=alert(1)> & </p>'
        comparison = comparison_of(
            [evil, "yes"],
            ["yes", evil],
            ["yes", "yes"],
            "exact_match",
            f"contains:{evil}",
            questions=[evil, evil],
        )
        text = report_of(
            comparison,
            title=evil,
            notes=[evil],
            config={evil: evil},
            origins={evil: evil},
            data={evil: [evil]},
        ).to_html()
        page = Page(text)
        assert not {"script", "img"} & {tag for tag, _ in page.tags}
        assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
        assert sum("<script>" in data for data, _ in page.texts) >= 9

    @pytest.mark.parametrize("text", LANGUAGES.values(), ids=LANGUAGES)
    def test_texts_of_the_user_have_a_direction_of_their_own(self, text) -> None:
        comparison = comparison_of(
            ["zz", text],
            [text, "zz"],
            [text, text],
            "exact_match",
            f"contains:{text}",
            questions=[text, text],
        )
        page = Page(
            report_of(
                comparison, title=text, notes=[text], config={"data": text}, data={"file": text}
            ).to_html()
        )
        places = [isolated for data, isolated in page.texts if text in data]
        outside_title = [isolated for isolated in places if not isolated]
        # The one place without a direction is <title>, which holds plain text only.
        assert len(places) >= 10 and len(outside_title) == 1

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("داده‌ها/گفتگو.jsonl:3", True),
            ("chats.jsonl", True),
            (r"C:\\chats", True),
            ("runs/گفتگو", True),
            ("سلام دنیا", False),
            ("0.001", True),
            ("first line\nsecond/line", False),
        ],
    )
    def test_what_looks_like_a_file_keeps_the_order_of_its_parts(self, text: str, expected: bool) -> None:
        assert is_path(text) == expected

    def test_right_to_left_file_names_stand_in_left_to_right_lines(self) -> None:
        name = "داده‌ها/گفتگو.jsonl"
        text = report_of(improved(), title=name, notes=[f"{name}:3: cut"], data={"files": [name]}).to_html()
        assert '<bdi dir="ltr">داده‌ها</bdi>/<wbr><bdi dir="ltr">گفتگو.jsonl:3</bdi></bdi>: cut</li>' in text
        assert text.count('<bdi dir="ltr">داده‌ها</bdi>') == 3

    @pytest.mark.parametrize(
        ("note", "parts"),
        [
            ("a b.jsonl:12: cut", ("a b.jsonl:12", ": cut")),
            ("chats.jsonl:7", ("chats.jsonl:7", "")),
            ("Two rows were cut.", ("", "Two rows were cut.")),
        ],
    )
    def test_a_note_begins_with_where_it_is_about(self, note: str, parts: tuple[str, str]) -> None:
        assert split_origin(note) == parts

    def test_both_schemes_and_print_are_styled(self) -> None:
        text = report_of(improved()).to_html()
        assert "prefers-color-scheme: dark" in text and "@media print" in text and "viewport" in text

    def test_a_report_without_changed_answers_shows_them_side_by_side(self) -> None:
        text = report_of(comparison_of(["sama"] * 4, ["vari"] * 4, ["maré"] * 4)).to_html()
        assert (
            ">Unchanged <" in text.replace("\n", "") and text.count("sama") >= 4 and text.count("maré") >= 4
        )
        essay = "The parcel left our store on Monday and will reach you within three working days. " * 3
        text = report_of(comparison_of(["sama"] * 4, ["vari"] * 4, [essay] * 4)).to_html()
        assert "Side by side" in text and text.count("vari") >= 4 and "Judged by" not in text

    def test_a_huge_text_does_not_make_a_huge_page(self, tmp_path: Path) -> None:
        huge = "<b>x</b> " * 200_000
        report = report_of(
            comparison_of([huge] * 10, ["yes"] * 10, ["yes"] * 9 + [huge], questions=[huge] * 10)
        )
        report.write(tmp_path)
        assert (tmp_path / "report.html").stat().st_size < 3_000_000
        assert "1,780,000 more characters in report.json" in (tmp_path / "report.html").read_text("utf-8")
        answers = json.loads((tmp_path / "report.json").read_text("utf-8"))["answers"]
        assert answers[0]["base_answer"] == huge

    def test_long_lists_are_cut_and_say_so(self) -> None:
        text = report_of(improved()).to_html()
        assert "25 of 45 are shown; report.json holds all of them." in text
        assert "heldout.jsonl:25<" in text and "heldout.jsonl:26<" not in text

    def test_config_names_the_origin_of_each_value(self) -> None:
        report = report_of(
            improved(),
            config={"model": {"name": "m", "dtype": "auto"}, "data": {"files": [{"path": "a.jsonl"}]}},
            origins={"model.name": "demo.yaml", "data": "--data"},
        )
        rows = re.findall(
            r"<tr[^>]*><td>(.*?)</td><td>.*?</td><td>(?:<bdi[^>]*>)+(.*?)</bdi>", report.to_html()
        )
        assert rows == [("model.name", "demo.yaml"), ("model.dtype", "default"), ("data.files", "--data")]

    def test_loss_only(self) -> None:
        base = side([], [], losses=[2.0, 2.2])
        text = report_of(compare(base, side([], [], losses=[1.0, 1.1]), [])).to_html()
        assert "Answers that changed sides" not in text and "Loss during training" not in text
        Page(text)


class TestMarkedWords:
    def test_stretches_of_the_answer_are_the_answer(self) -> None:
        answer, reference = '{"tool": "light", "on": true}', '{"tool": "lamp", "on": true, "level": 3}'
        marked = marked_words(answer, reference)
        assert "".join(text for text, kind in marked if kind != "missing") == answer
        assert [text for text, kind in marked if kind == "differs"] == ["light"]
        assert "level" in "".join(text for text, kind in marked if kind == "missing")

    def test_equal_and_empty(self) -> None:
        assert marked_words("same words", "same words") == [("same words", "same")]
        assert marked_words("", "") == []
        assert marked_words("", "all") == [("all", "missing")]
        assert marked_words("all", "") == [("all", "differs")]

    def test_space_between_two_differing_words_differs_too(self) -> None:
        assert marked_words("one two three", "four five three") == [
            ("one two", "differs"),
            (" three", "same"),
        ]

    def test_hindi_words_are_not_torn(self) -> None:
        assert marked_words("बत्ती जलाओ", "बत्ती जलाना") == [("बत्ती ", "same"), ("जलाओ", "differs")]

    def test_a_very_long_answer_is_marked_whole(self) -> None:
        answer = "word " * 2000
        assert marked_words(answer, "other") == [(answer, "differs")]
