"""The report from comparisons built by hand."""

from __future__ import annotations

import errno
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.cells import cell_len

from phlora.errors import NoRoomError, RunError
from phlora.evaluate.compare import Comparison, EvaluationItem, LossScores, ModelScores, compare
from phlora.evaluate.findings import Line, duration, verdict
from phlora.evaluate.metrics import resolve_metrics
from phlora.evaluate.report import Report, is_path, marked_words, split_origin

LANGUAGES = {
    "persian": "چراغ آشپزخانه را روشن کن",
    "hindi": "रसोई की बत्ती जलाओ",
    "serbian": "Упали светло у кухињи, važi?",
    "turkish": "Mutfak ışığını aç, şimdi",
    "vietnamese": "Bật đèn nhà bếp giùm tôi",
}
VOID = {"meta", "wbr"}


def side(answers: list[str], references: list[str], *names: str, losses: list[float]) -> ModelScores:
    scores = {
        name: [metric(answer, reference) for answer, reference in zip(answers, references, strict=True)]
        for name, metric in resolve_metrics(names).items()
    }
    means = {}
    for name, values in scores.items():
        known = [value for value in values if value is not None]
        means[name] = sum(known) / len(known) if known else None
    loss = sum(losses) / len(losses)
    return ModelScores(
        loss=LossScores(
            loss=loss,
            perplexity=math.exp(loss) if loss < 700 else math.inf,
            token_accuracy=0.5,
            num_tokens=4 * len(losses),
            per_row=[(4 * value, 4, 2) for value in losses],
        ),
        answers=answers,
        scores=scores,
        metrics=means,
    )


def comparison_of(
    base: list[str],
    tuned: list[str],
    references: list[str],
    *names: str,
    questions: list[str] | None = None,
    base_loss: float = 2.0,
    tuned_loss: float = 0.5,
) -> Comparison:
    items = [
        EvaluationItem(
            prompt_ids=[1],
            reference=reference,
            messages=[
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": questions[index] if questions else f"question {index}"},
            ],
            origin=f"heldout.jsonl:{index + 1}",
        )
        for index, reference in enumerate(references)
    ]
    names = names or ("exact_match", "json_valid")
    wave = [0.01 * (index % 3) for index in range(len(references))]
    before = side(base, references, *names, losses=[base_loss + x for x in wave])
    after = side(tuned, references, *names, losses=[tuned_loss + 2 * x for x in wave])
    return compare(before, after, items)


def improved(right: int = 45, total: int = 50) -> Comparison:
    return comparison_of(["no"] * total, ["yes"] * right + ["no"] * (total - right), ["yes"] * total)


def report_of(comparison: Comparison, **facts: object) -> Report:
    return Report(**{"title": "runs/demo", "comparison": comparison, **facts})


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


class TestVerdict:
    def test_better(self) -> None:
        assert re.fullmatch(
            r"Exact match rose from 0 % to 90 % on 50 held-out rows "
            r"\(95 % interval of the change: \+77 to \+96\.7 points\)\.",
            verdict(improved()),
        )

    def test_worse_is_said(self) -> None:
        text = verdict(comparison_of(["yes"] * 50, ["yes"] * 20 + ["no"] * 30, ["yes"] * 50))
        assert text.startswith(
            "Exact match fell from 100 % to 40 % on 50 held-out rows: the tuned model is worse"
        )

    def test_a_difference_within_chance_is_no_improvement(self) -> None:
        text = verdict(comparison_of(["no"] * 11 + ["yes"], ["no"] * 10 + ["yes"] * 2, ["yes"] * 12))
        assert "went from 8.3 % to 16.7 % on 12 held-out rows: no proof of a change" in text

    def test_an_interval_beside_zero_is_no_proof_where_the_exact_test_says_otherwise(self) -> None:
        line = Line(name="exact_match", base=0.2, tuned=0.5, num_rows=20, low=0.01, high=0.5, p_value=0.07)
        assert line.direction == "unclear"

    @pytest.mark.parametrize("num_rows", [1, 2, 5, 9])
    def test_few_rows_say_nothing(self, num_rows: int) -> None:
        text = verdict(comparison_of(["no"] * num_rows, ["yes"] * num_rows, ["yes"] * num_rows))
        assert "went from 0 % to 100 %" in text and "too few rows to say, 10 are the least" in text
        assert "+100 to +100" not in text
        assert verdict(comparison_of(["no"] * 10, ["yes"] * 10, ["yes"] * 10)).startswith("Exact match rose")

    def test_open_text_is_led_by_the_loss_and_says_why(self) -> None:
        essay = "The parcel left our store on Monday and will reach you within three working days. " * 3
        comparison = comparison_of(["no"] * 20, [essay] * 20, [essay] * 20, "exact_match", "rouge_l")
        assert verdict(comparison).startswith("Loss fell from 2.010 to 0.519 (perplexity 7.460 to 1.680")
        summary = report_of(comparison).summary()
        assert "The loss leads, for the expected answers are open text (median 45 words)" in summary
        assert "ROUGE-L" in summary and "turned right" not in summary

    def test_all_right_before_and_after(self) -> None:
        text = verdict(comparison_of(["yes"] * 4, ["yes"] * 4, ["yes"] * 4))
        assert text.startswith("Exact match stayed at 100 % on 4 held-out rows: too few rows to say")
        text = verdict(comparison_of(["yes"] * 40, ["yes"] * 40, ["yes"] * 40))
        assert text.startswith("Exact match stayed at 100 % on 40 held-out rows: no proof of a change (95 %")

    def test_as_many_flips_each_way(self) -> None:
        text = verdict(comparison_of(["yes", "no"] * 6, ["no", "yes"] * 6, ["yes"] * 12))
        assert text.startswith("Exact match stayed at 50 % on 12 held-out rows: no proof")

    def test_without_answers_the_loss_decides(self) -> None:
        base = side([], [], losses=[2.0, 2.2, 2.4] * 4)
        text = verdict(compare(base, side([], [], losses=[0.5, 0.6, 0.7] * 4), []))
        assert re.match(
            r"Loss fell from 2.200 to 0.600 \(perplexity 9.02\d to 1.82\d\) on 12 held-out rows \(95 %", text
        )
        assert "worse" not in text and "points" not in text

    def test_a_higher_loss_is_worse(self) -> None:
        base, tuned = side([], [], losses=[0.5, 0.6, 0.7] * 4), side([], [], losses=[2.0, 2.1, 2.3] * 4)
        assert "the tuned model is worse" in verdict(compare(base, tuned, []))

    def test_an_adapter_without_effect_is_named(self) -> None:
        same = ["no"] * 3
        comparison = comparison_of(same, same, ["yes"] * 3)
        assert "changes nothing" not in verdict(comparison)
        base = side(same, ["yes"] * 3, "exact_match", losses=[1.0, 2.0, 3.0])
        item = EvaluationItem(prompt_ids=[1], reference="yes", messages=None, origin="x")
        assert "The adapter changes nothing" in verdict(compare(base, base, [item] * 3))

    def test_a_loss_that_is_no_number(self) -> None:
        base, tuned = side([], [], losses=[1.0, 2.0]), side([], [], losses=[math.nan, math.nan])
        assert "no finite number" in verdict(compare(base, tuned, []))


class TestSummary:
    def test_columns_line_up(self) -> None:
        text = report_of(improved(), timing={"train": 252.4, "evaluate": 4.0}, peak_bytes=3 << 29).summary()
        lines = text.splitlines()
        assert lines[0].startswith("Exact match rose")
        table = lines[2 : lines.index("", 2)]
        assert len({len(line) for line in table if "interval" in line or "Exact" in line}) == 1
        assert re.search(r"Exact match +0\.0 % +90\.0 % +\+90\.0 +\+\d+\.\d to \+\d+\.\d", text)
        assert re.search(r"Valid JSON +n/a +n/a$", text, re.MULTILINE)
        assert "45 rows turned right, 0 turned wrong." in text
        assert "train 4 min 12 s, evaluate 4.0 s." in text
        assert "Peak memory 1.50 GiB." in text

    @pytest.mark.parametrize("width", [40, 60, 80, 120])
    def test_it_fits_a_terminal_of_any_width(self, width: int) -> None:
        wide = "東京の台所の明かりをつけてください、お願いします"
        comparison = comparison_of(
            ["no"] * 20, ["yes"] * 20, ["yes"] * 20, "exact_match", f"contains:{wide}", f"regex:{'a' * 90}"
        )
        text = report_of(comparison, notes=["chats.jsonl:3: the row was cut at 1024 tokens " * 3]).summary(
            width=width
        )
        assert all(cell_len(line) <= width for line in text.splitlines())
        assert re.search(r"Exact match +0\.0 % +100\.0 % +\+100\.0", text)
        assert re.search(r"\+\d\d\.\d to \+100\.0", text)
        # Columns stand below each other, also behind wide characters.
        rows = [line for line in text.splitlines() if re.search(r" %  [ +-]", line)]
        assert len({cell_len(line[: line.index(" %")]) for line in rows}) == 1

    def test_a_name_cannot_command_the_terminal(self) -> None:
        text = report_of(
            comparison_of(["a"], ["b"], ["b"], "contains:\x1b[2J\nx"), notes=["\x1b]0;x"]
        ).summary()
        assert "\x1b" not in text and "\\x1b[2J x" in text

    def test_notes_are_said(self) -> None:
        assert report_of(improved(), notes=["Two rows were cut."]).summary().endswith("Two rows were cut.")


class TestJson:
    def test_sides_are_shares_and_null(self) -> None:
        values = report_of(improved()).to_json()
        for name in ("base", "tuned"):
            assert {"exact_match", "json_valid", "loss", "perplexity", "token_accuracy"} <= values[
                name
            ].keys()
        assert values["base"]["exact_match"] == 0.0
        assert values["tuned"]["exact_match"] == 0.9
        assert values["tuned"]["json_valid"] is None
        assert values["intervals"]["exact_match"]["method"] == "exact"
        assert values["num_rows"]["exact_match"] == 50
        assert len(values["flips"]["improved"]) == 45
        assert values["flips"]["improved"][0]["origin"] == "heldout.jsonl:1"
        assert len(values["answers"]) == 50 and values["answers"][49]["change"] is None

    def test_metrics_that_were_not_asked_for_are_null(self) -> None:
        values = report_of(comparison_of(["a"], ["b"], ["b"], "rouge_l")).to_json()
        assert values["base"]["exact_match"] is None and values["tuned"]["rouge_l"] == 1.0

    def test_strict_json_without_nan(self, tmp_path: Path) -> None:
        comparison = comparison_of(["a"], ["b"], ["b"], base_loss=800.0)
        report = report_of(
            comparison,
            config={"a": math.inf, "path": Path("x"), "names": {"b", "a"}},
            training_curve=[(1, math.nan, 0.1), (2, 1.0, 0.1), (3, 0.5, 0.0)],
        )
        report.write(tmp_path)

        def refuse(name: str) -> None:
            raise AssertionError(name)

        values = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
        assert values["base"]["perplexity"] is None and values["base"]["loss"] == 800.0
        assert values["config"] == {"a": None, "path": "x", "names": ["a", "b"]}
        assert values["training_curve"][0] == {"step": 1, "loss": None, "learning_rate": 0.1}

    @pytest.mark.parametrize("text", LANGUAGES.values(), ids=LANGUAGES)
    def test_every_language_stands_in_the_files_as_written(self, text, tmp_path: Path) -> None:
        report_of(comparison_of(["no"], [text], [text], f"contains:{text}", "exact_match")).write(tmp_path)
        raw = (tmp_path / "report.json").read_text(encoding="utf-8")
        assert text in raw
        assert json.loads(raw)["tuned"][f"contains:{text}"] == 1.0
        assert text in (tmp_path / "report.html").read_text(encoding="utf-8")

    def test_half_a_surrogate_pair_does_not_stop_the_report(self, tmp_path: Path) -> None:
        report_of(comparison_of(["no"], ["\ud83d!"], ["\ud83d!"])).write(tmp_path)
        values = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
        assert values["flips"]["improved"][0]["reference"] == "\ud83d!"
        assert r"\ud83d!" in (tmp_path / "report.html").read_text(encoding="utf-8")


class TestSecrets:
    CONFIG = {
        "training_config": {
            "hub_token": "hf_abcdefghijklmnopqrstuv",
            "eos_token": "<|end|>",
            "wandb_api_key": "k1",
        },
        "command": "train --hub-token hf_abcdefghijklmnopqrstuv",
        "model": {"token": "s3cret", "revision": None},
    }

    def test_are_in_neither_file(self, tmp_path: Path) -> None:
        report_of(improved(), config=self.CONFIG, environment=self.CONFIG).write(tmp_path)
        for name in ("report.json", "report.html"):
            text = (tmp_path / name).read_text(encoding="utf-8")
            assert not re.search(r"hf_abc|s3cret|\bk1\b", text), name
            assert "(not shown)" in text

    def test_tokens_of_the_vocabulary_are_no_secrets(self) -> None:
        values = report_of(improved(), config=self.CONFIG).to_json()
        assert values["config"]["training_config"]["eos_token"] == "<|end|>"
        assert values["config"]["model"]["revision"] is None

    def test_a_metric_may_be_about_passwords(self) -> None:
        values = report_of(comparison_of(["a"], ["password"], ["b"], "contains:password")).to_json()
        assert values["tuned"]["contains:password"] == 1.0


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


class TestWrite:
    def test_creates_the_folder_and_leaves_nothing_else(self, tmp_path: Path) -> None:
        page = report_of(improved()).write(tmp_path / "a" / "b")
        assert page == tmp_path / "a" / "b" / "report.html"
        assert sorted(p.name for p in page.parent.iterdir()) == ["report.html", "report.json"]

    def test_replaces_an_older_report(self, tmp_path: Path) -> None:
        report_of(improved(40)).write(tmp_path)
        report_of(improved(45)).write(tmp_path)
        assert json.loads((tmp_path / "report.json").read_text())["tuned"]["exact_match"] == 0.9

    def test_a_full_disk_keeps_the_old_report(self, tmp_path: Path, monkeypatch) -> None:
        report_of(improved(40)).write(tmp_path)

        def full(self: Path, content: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(NoRoomError):
            report_of(improved(45)).write(tmp_path)
        assert json.loads((tmp_path / "report.json").read_text())["tuned"]["exact_match"] == 0.8
        assert len(list(tmp_path.iterdir())) == 2

    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(RunError, match="cannot be written"):
            report_of(improved()).write(tmp_path / "file")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.96, "10.0 s"),
        (59.6, "1 min 0 s"),
        (252.4, "4 min 12 s"),
        (7260, "2 h 1 min"),
        (42, "42 s"),
    ],
)
def test_duration(seconds, text) -> None:
    assert duration(seconds) == text
