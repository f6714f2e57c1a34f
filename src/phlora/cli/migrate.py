"""`phlora migrate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phlora.cli.console import make_display, print_result
from phlora.cli.options import Json, Quiet
from phlora.errors import EXIT_FINDING, EXIT_INPUT

if TYPE_CHECKING:
    from phlora.migrate.report import FileReport

commands = typer.Typer()


@commands.command(
    short_help="Rewrite a TRL, PEFT, loralib or Unsloth script.",
    epilog="\b\nExamples:\n"
    "  phlora migrate train.py\n"
    "  phlora migrate train.py finetune.ipynb --write\n"
    "  phlora migrate scripts --check",
)
def migrate(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="SCRIPT.py|NOTEBOOK.ipynb|DIR...", help="Scripts, notebooks, or folders of them."
        ),
    ],
    write: Annotated[
        bool, typer.Option("--write", "-w", help="Change the files; each original is kept as NAME.orig.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Exit code 1 if there is anything to migrate.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Rewrite scripts and notebooks for TRL, PEFT, loralib or Unsloth to Phlora and to today's names.

    Shows what changes as a diff; nothing is written without --write, and no code is run. Comments, layout, magics and
    outputs stay. What cannot be decided becomes a comment `# phlora: ...` and a line of the summary.
    """
    from phlora.migrate.report import migrate_files, summary

    reports = migrate_files(paths, write=write, display=make_display(quiet))
    if as_json:
        print_result({"files": [report.to_json() for report in reports]})
    else:
        if not quiet:
            _show_diffs(reports)
        print_result(summary(reports, is_written=write))
    if any(report.problem for report in reports):
        raise typer.Exit(EXIT_INPUT)
    if check and any(report.is_changed for report in reports):
        raise typer.Exit(EXIT_FINDING)


def _show_diffs(reports: list[FileReport]) -> None:
    """In colours on a terminal."""
    from rich.console import Console
    from rich.text import Text

    from phlora.display import printable

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    styles = {"+++": "bold", "---": "bold", "@@": "cyan", "+": "green", "-": "red"}
    for report in reports:
        for diff in report.diffs:
            for line in printable(diff).splitlines():
                style = next((style for start, style in styles.items() if line.startswith(start)), "")
                console.print(Text(line, style=style))
