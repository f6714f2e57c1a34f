"""What was found in data as lines: grouped, counted, and the first rows named."""

from __future__ import annotations

from phlora.data.problems import MAX_NAMED_ORIGINS, Noted, merge_problems, render_problem
from phlora.data.rows import Origin, Problem


def test_rows_that_are_counted_and_no_longer_named_are_told() -> None:
    noted = Noted()
    for line in range(1, 5001):
        noted.add(Origin("rows", line))
        noted.add(Origin("rows", line))
    assert (noted.count, len(noted.origins)) == (5000, MAX_NAMED_ORIGINS)
    shown = render_problem(Problem("odd", "warning", "Odd", tuple(noted.origins), noted.count))
    assert shown.startswith("warning: Odd (5000 rows)\n    rows:1, rows:2,") and shown.endswith(
        " and 4992 more"
    )


def test_problems_of_one_message_are_one_with_errors_first() -> None:
    one, other = (Problem("odd", "note", "Odd", (Origin("rows", line),)) for line in (1, 2))
    error = Problem("bad", "error", "Bad")
    assert merge_problems([one, error, other]) == (
        error,
        Problem("odd", "note", "Odd", (*one.origins, *other.origins), 2),
    )
    assert render_problem(error) == "error: Bad"
    assert render_problem(one) == "note: Odd\n    rows:1"
