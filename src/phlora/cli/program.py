"""The program: every command under its name."""

from __future__ import annotations

from typing import Annotated

import typer

import phlora
from phlora.cli import chat, data, export, imports, migrate, training

app = typer.Typer(
    name="phlora",
    help="Fine-tune Phi-3-class chat models with LoRA, and prove that it helped.",
    epilog="\b\nExamples:\n"
    "  phlora data check chats.jsonl\n"
    "  phlora train --model smollm2-135m --data chats.jsonl --output runs/support\n"
    "  phlora chat runs/support",
    # Plain help: rich would triple the time that `--help` takes.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(training.commands)
app.add_typer(chat.commands)
app.add_typer(export.commands)
app.add_typer(imports.commands)
app.add_typer(migrate.commands)
app.add_typer(data.commands, name="data")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"phlora {phlora.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass
