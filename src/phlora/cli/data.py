"""`phlora data check` and `phlora data preview`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phlora.cli.console import (
    adopt_loggers,
    forbid_network,
    make_display,
    print_result,
    standard_output_kept,
)
from phlora.cli.options import Json, Offline, Quiet
from phlora.config import TrainOn
from phlora.display import Display, printable
from phlora.errors import ConfigError

if TYPE_CHECKING:
    from phlora.data.checks import PreviewRow
    from phlora.data.rows import Row
    from phlora.models.tokenizer import LoadedTokenizer


commands = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, help="Check a chat file, or look into it."
)
Format = Annotated[
    str,
    typer.Option(
        "--format",
        help="auto, messages, conversations, alpaca, qa, prompt_completion, text, preference_chosen, classification, …",
        show_default=True,
    ),
]
MaxLength = Annotated[int | None, typer.Option("--max-length", min=1, help="Longest row in tokens.")]
Trained = Annotated[TrainOn, typer.Option("--train-on", help="The turns whose tokens are trained.")]


@commands.command(
    "check",
    short_help="List everything that is wrong with chat files.",
    epilog="\b\nExamples:\n"
    "  phlora data check chats.jsonl\n"
    "  phlora data check chats.jsonl --eval-data heldout.jsonl --model smollm2-135m --max-length 1024 --strict",
)
def check_data(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Chat files.")],
    eval_data: Annotated[
        list[str] | None,
        typer.Option("--eval-data", metavar="FILE", help="Held-out chats that may not stand in FILE."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Also check the tokens that this model's tokenizer makes."),
    ] = None,
    format: Format = "auto",
    max_length: MaxLength = None,
    train_on: Trained = "assistant",
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when there are warnings.")] = False,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Read chat files whole and list everything that is wrong with them, with line numbers.

    Exit code 0: usable; 1: warnings, with --strict; 2: errors, or nothing to train on.
    """
    if max_length is not None and model is None:
        raise ConfigError(
            "Tokens cannot be counted without a tokenizer", where="--max-length", fix="add --model MODEL"
        )
    if offline:
        forbid_network()
    from phlora.data.checks import DEFAULT_MAX_LENGTH, check

    display = make_display(quiet)
    with standard_output_kept():
        tokens = _tokenizer(model, display) if model else None
        display.stage(f"Checking {', '.join(files)}")
        report = check(
            files,
            tokens.tokenizer if tokens else None,
            eval_sources=eval_data or None,
            format=format,
            train_on=train_on,
            max_length=max_length or DEFAULT_MAX_LENGTH,
            training_template=tokens.training_template if tokens else None,
        )
    print_result(report.to_json() if as_json else printable(report.render()))
    raise typer.Exit(report.exit_code(strict=strict))


@commands.command(
    "preview",
    short_help="Show rows token by token, and what is trained.",
    epilog="\b\nExamples:\n"
    "  phlora data preview chats.jsonl\n"
    "  phlora data preview chats.jsonl --model microsoft/Phi-3-mini-4k-instruct --rows 10",
)
def preview_data(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Chat file.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="The model whose tokenizer cuts the text.", show_default=True)
    ] = "smollm2-135m",
    rows: Annotated[
        int, typer.Option("--rows", "-n", min=1, help="How many rows to show.", show_default=True)
    ] = 3,
    format: Format = "auto",
    max_length: MaxLength = None,
    train_on: Trained = "assistant",
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show rows token by token as the model will see them, and which tokens are trained.

    On a terminal trained tokens are green, elsewhere they stand in ⟦ ⟧; │ separates tokens.
    """
    if offline:
        forbid_network()
    from phlora.data.checks import preview

    display = make_display(quiet)
    with standard_output_kept():
        first = _first_rows(file, format, rows)
        tokens = _tokenizer(model, display)
        shown = preview(
            first,
            tokens.tokenizer,
            rows,
            train_on=train_on,
            max_length=max_length,
            training_template=tokens.training_template,
        )
    if as_json:
        print_result({"file": file, "model": model, "rows": [_preview_json(row) for row in shown]})
        return
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    display.note(f"Tokens of {model}; trained ones {'are green' if colour else 'stand in ⟦ ⟧'}")
    print_result("\n\n".join(_preview_text(row, colour=colour) for row in shown))


# ------------------------------------------------------------------------------- what the commands print


def _tokenizer(model: str, display: Display) -> LoadedTokenizer:
    from phlora.models.tokenizer import load_tokenizer

    adopt_loggers()
    loaded = load_tokenizer(model)
    for note in loaded.notes:
        display.note(note)
    return loaded


def _first_rows(file: str, format: str, num_rows: int) -> list[Row]:
    from itertools import islice

    from phlora.data.dataset import read_rows

    return list(islice(read_rows(file, format=format), min(num_rows, sys.maxsize)))


def _preview_json(row: PreviewRow) -> dict[str, Any]:
    tokens = [{"text": text, "trained": trained, "weight": weight} for text, trained, weight in row.tokens]
    return {"origin": str(row.origin), "skipped": row.skipped, "tokens": tokens}


def _preview_text(row: PreviewRow, *, colour: bool) -> str:
    """A row's tokens between bars, stretches of trained ones in green or in brackets."""
    from itertools import groupby

    if row.skipped:
        return f"── {row.origin}\nleft out: {row.skipped}"
    text = ""
    for (trained, weight), group in groupby(row.tokens, key=lambda token: token[1:]):
        pieces = "│".join(printable(piece) for piece, _, _ in group)
        factor = "" if weight in (0.0, 1.0) else f"×{weight:g} "
        if not trained:
            text += f"\x1b[2m{pieces}\x1b[0m" if colour else pieces
        else:
            text += f"\x1b[1;32m{factor}{pieces}\x1b[0m" if colour else f"⟦{factor}{pieces}⟧"
    return f"── {row.origin}\n{text}"
