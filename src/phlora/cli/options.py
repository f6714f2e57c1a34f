"""Options that commands of several families have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but warnings and the result.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never ask a hub; use what is on this machine.")]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        metavar="NEW=OLD,...",
        help="What the file's columns are called here, such as question=Frage,answer=Antwort.",
    ),
]
LikeRunFormat = Annotated[
    str | None,
    typer.Option("--format", help="Of the named rows, if not the run's own; auto: as detected."),
]
LikeRunColumns = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        metavar="NEW=OLD,...",
        help='Of the named rows, if not the run\'s own; "" for none.',
    ),
]


def columns_in_place(given: Sequence[str] | None) -> dict[str, str] | None:
    """The columns that `--columns` names; None where it was not given, none for an empty text."""
    from phlora.config import parse_columns

    return None if given is None else parse_columns([text for text in given if text.strip()])
