"""What a comparison comes to, in one sentence, and how long things took."""

from __future__ import annotations

import math
import re

import pytest
from reports import comparison_of, improved, report_of, side

from phlora.evaluate.compare import EvaluationItem, compare
from phlora.evaluate.findings import Line, duration, verdict


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
