"""Plots: the points that are drawn, and one clear error where matplotlib is not installed."""

from __future__ import annotations

from typing import Any

import pytest

from phlora.errors import MissingExtraError
from phlora.plots import plot_lengths, plot_loss


@pytest.fixture
def ax() -> Any:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    return Figure().subplots()


def test_losses_are_drawn_at_their_steps(ax: Any) -> None:
    assert plot_loss([(1, 3.0), (2, 2.5)], [(2, 2.75)], ax=ax) is ax
    training, evaluation = ax.get_lines()
    assert training.get_xydata().tolist() == [[1, 3.0], [2, 2.5]]
    assert evaluation.get_xydata().tolist() == [[2, 2.75]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["training", "held out"]


def test_nothing_to_draw_is_no_error(ax: Any) -> None:
    assert not len(plot_loss([], [], ax=ax).get_lines()) and not len(plot_lengths([], ax=ax).patches)


@pytest.mark.parametrize(("max_length", "lines"), [(None, 0), (20, 1), (4096, 0)])
def test_the_limit_is_drawn_where_it_is_near(ax: Any, max_length: int | None, lines: int) -> None:
    plot_lengths([(1, 10, 4), (11, 20, 2)], max_length=max_length, ax=ax)
    assert [(p.get_x(), p.get_width(), p.get_height()) for p in ax.patches] == [(1, 10, 4), (11, 10, 2)]
    assert len(ax.get_lines()) == lines


def test_without_matplotlib_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phlora.extras.is_installed", lambda module: False)
    with pytest.raises(MissingExtraError) as error:
        plot_loss([], [])
    assert 'pip install "phlora[plots]"' in error.value.fix
