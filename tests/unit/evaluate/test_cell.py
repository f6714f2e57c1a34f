"""A report in a notebook: the same figures as in the terminal, answers that changed first, and no text as markup."""

from __future__ import annotations

from pathlib import Path

import pytest
from reports import LANGUAGES, comparison_of

from phlora.evaluate.report import Report

EVIL = '"><script>alert(1)</script>'


def test_figures_are_those_of_the_terminal() -> None:
    report = Report(title="t", comparison=comparison_of(["a", "b"], ["b", "b"], ["b", "b"], "exact_match"))
    cell = report._repr_html_()
    for word in ("Exact match", "50.0 %", "100.0 %", "Perplexity", "improved", report.verdict.split(",")[0]):
        assert word in cell


@pytest.mark.parametrize("text", [EVIL, *LANGUAGES.values()])
def test_texts_are_escaped_and_have_their_own_direction(text: str) -> None:
    comparison = comparison_of([text], [text], [text], "exact_match", questions=[text])
    cell = Report(title=text, comparison=comparison, notes=[text], folder=Path("runs/x"))._repr_html_()
    assert "<script" not in cell and "runs/x/report.html" in cell
    if text != EVIL:
        assert f'<td dir="auto">{text}</td>' in cell


def test_a_long_answer_and_many_answers_are_cut() -> None:
    answers = [f"{number} " + "long " * 1000 for number in range(50)]
    report = Report(title="t", comparison=comparison_of(answers, answers, answers, "exact_match"))
    cell = report._repr_html_()
    assert "(8 of 50)" in cell and len(cell) < 60_000


def test_losses_as_a_plot() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    report = Report(
        title="t",
        comparison=comparison_of(["a"], ["a"], ["a"]),
        training_curve=[(1, 2.0, 1e-3), (2, 1.5, 1e-3)],
        evaluation_curve=[(2, 1.75)],
    )
    assert report.plot_loss(ax) is ax
    assert [line.get_ydata().tolist() for line in ax.get_lines()] == [[2.0, 1.5], [1.75]]
