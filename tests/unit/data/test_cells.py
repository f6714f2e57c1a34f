"""A check and a preview in a notebook: what is found, what is trained, and nothing of the user's as markup."""

from __future__ import annotations

import re
from typing import Any

import pytest

from phlora.data.checks import check, preview
from phlora.data.dataset import load_rows
from phlora.errors import InputError

EVIL = '<img src=x onerror="alert(1)">'


def rows() -> list[dict[str, Any]]:
    good = [
        {"messages": [{"role": "user", "content": EVIL}, {"role": "assistant", "content": f"سلام {n}"}]}
        for n in range(5)
    ]
    return [*good, {"messages": [{"role": "user", "content": "no answer"}]}]


def test_a_check_lists_findings_and_lengths(tiny_tokenizer: Any) -> None:
    found = check([rows()], tiny_tokenizer)
    cell = found._repr_html_()
    assert "5 of 6 rows usable" in cell and "tokens a row" in cell
    (finding,) = found.problems
    assert re.search(rf'class="(warn|error)" dir="auto">{finding.severity}: {finding.message}', cell)
    assert found._head()[0] in cell and 'class="bar"' in cell


def test_a_check_without_a_tokenizer_has_no_lengths_to_plot() -> None:
    found = check([rows()])
    assert "tokens a row" not in found._repr_html_()
    with pytest.raises(InputError, match="no lengths to plot"):
        found.plot_lengths()


def test_a_preview_marks_trained_tokens_and_escapes_all(tiny_tokenizer: Any) -> None:
    shown = preview(load_rows([rows()[:2]]).rows, tiny_tokenizer, 2)
    cell = shown._repr_html_()
    assert "<img" not in cell and cell.count("&lt;") >= 2
    trained = "".join(re.findall(r'<span class="trained">([^<]*)</span>', cell.partition("</style>")[2]))
    assert "سلام 0" in trained and "onerror" not in trained
    assert len(shown) == 2 and shown[0].tokens


def test_a_row_that_is_left_out_says_why(tiny_tokenizer: Any) -> None:
    cell = preview(load_rows([rows()[5:]]).rows, tiny_tokenizer, 1)._repr_html_()
    assert "left out" in cell and 'class="warn"' in cell


def test_lengths_as_a_plot(tiny_tokenizer: Any) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    found = check([rows()], tiny_tokenizer, max_length=64)
    assert found.plot_lengths(ax) is ax
    assert sum(patch.get_height() for patch in ax.patches) == 5
    assert [int(patch.get_x()) for patch in ax.patches] == [item.low for item in found.lengths]
