"""Options that commands of several families have."""

from __future__ import annotations

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
