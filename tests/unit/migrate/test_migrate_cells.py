"""Notebook cells as one module, and back to the letter."""

from __future__ import annotations

import ast

import pytest

from phlora.migrate.cells import join

CELLS = {
    "line magics": "%matplotlib inline\nx = 1\n!pip install -q trl",
    "assigned": "files = !ls\nt = %time f()\na, b = %sql select",
    "help": "?print\nprint??\nx.y?",
    "indented": "if x:\n    !ls\n    %cd ..\nelse:\n    y = 2",
    "continued": "!pip install a \\\n    b \\\n    c\nx = 1",
    "python magic": "%%time\nx = 1",
    "captured": "%%capture out\n!pip install x\nimport y",
    "modulo": "x = (5\n % 3)\ny = 5 \\\n% 3\nz = '''\n%d\n!no\n''' % 3",
    "quotes": "x = \"it's\"\n!ls 'a\ny = 'say \\'hi\\' # no'\n%ls",
    "await": "await f()",
    "empty": "",
    "ends with lines": "x = 1\n\n",
    "comments": "# one\n\n# two",
}


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_comes_back_to_the_letter(name: str) -> None:
    cells = join([(0, "a = 1"), (3, CELLS[name]), (4, "b = 2")])
    assert cells.split(cells.text) == {0: "a = 1", 3: CELLS[name], 4: "b = 2"}
    compile(cells.text, "cells", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_cells_in_another_language_are_left_out() -> None:
    sources = [
        "%%bash\nls",
        "x = 1",
        "  \n%%writefile train.py\nimport trl",
        "%%R -i x\nplot(x)",
        "%%!\nls -l a",
    ]
    cells = join(list(enumerate(sources)))
    assert cells.numbers == (1,)
    assert cells.skipped == {0: "bash", 2: "writefile", 3: "R", 4: "!"}


def test_lines_that_run_something_say_what_and_where() -> None:
    cells = join(
        [(0, "%%time\nx = 1\n%time y = f()\nprint??"), (4, "\nfiles = !ls\n  %pip install \\\n trl")]
    )
    named = [(line.cell, line.number, line.name) for line in cells.hidden]
    assert named == [(0, 1, ""), (0, 3, "%time"), (0, 4, ""), (4, 2, "!ls"), (4, 3, "%pip")]


def test_lines_are_counted_within_their_cell() -> None:
    cells = join([(0, "a\nb"), (2, "c\nd")])
    assert cells.text.splitlines()[1] == "a"
    assert [cells.place(line) for line in (2, 3, 5, 6)] == [(0, 1), (0, 2), (2, 1), (2, 2)]
