"""`phlora data check`, `phlora data preview` and `phlora data convert`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phlora.cli.console import (
    adopt_loggers,
    forbid_network,
    make_display,
    print_result,
    standard_output_kept,
)
from phlora.cli.options import Columns, Json, Offline, Quiet
from phlora.config import TrainOn
from phlora.display import Display, has_colours, printable
from phlora.errors import EXIT_DONE, EXIT_FINDING, ConfigError

if TYPE_CHECKING:
    from phlora.config import DataFile
    from phlora.data.checks import PreviewRow
    from phlora.data.rows import Row
    from phlora.models.tokenizer import LoadedTokenizer


commands = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, help="Check a chat file, look into it, or convert it."
)
Format = Annotated[
    str,
    typer.Option(
        "--format",
        help="auto, messages, conversations, alpaca, qa, prompt_completion, text, preference_chosen, classification, …",
        show_default=True,
    ),
]
Encoding = Annotated[
    str | None, typer.Option("--encoding", help="Of text files; without it UTF-8, or guessed and shown.")
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
    columns: Columns = None,
    encoding: Encoding = None,
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
        with display.counting("Reading") as reading:
            report = check(
                _sources(files, columns, encoding),
                tokens.tokenizer if tokens else None,
                eval_sources=_sources(eval_data, columns, encoding) if eval_data else None,
                format=format,
                train_on=train_on,
                max_length=max_length or DEFAULT_MAX_LENGTH,
                training_template=tokens.training_template if tokens else None,
                reading=reading,
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
    columns: Columns = None,
    encoding: Encoding = None,
    max_length: MaxLength = None,
    train_on: Trained = "assistant",
    plain: Annotated[
        bool,
        typer.Option(
            "--plain", help="No bars between tokens: letters that join, as Persian ones, stay joined."
        ),
    ] = False,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show rows token by token as the model will see them, and which tokens are trained.

    On a terminal trained tokens are green, elsewhere they stand in ⟦ ⟧; │ separates tokens, without --plain.
    """
    if offline:
        forbid_network()
    from phlora.data.checks import preview, preview_text

    display = make_display(quiet)
    with standard_output_kept():
        first = _first_rows(_sources([file], columns, encoding)[0], format, rows)
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
    colour = has_colours(sys.stdout)
    display.note(f"Tokens of {model}; trained ones {'are green' if colour else 'stand in ⟦ ⟧'}")
    print_result("\n\n".join(preview_text(row, colour=colour, plain=plain) for row in shown))


@commands.command(
    "convert",
    short_help="Write chats of any kind as plain JSONL.",
    epilog="\b\nExamples:\n"
    "  phlora data convert conversations.json chats.jsonl\n"
    "  phlora data convert table.xlsx chats.jsonl --columns question=Frage,answer=Antwort\n"
    "  phlora data convert 'WhatsApp Chat.txt' chats.jsonl --assistant Ana",
)
def convert_data(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE... OUTPUT", help="What is read, and the JSONL file to write.")
    ],
    format: Format = "auto",
    columns: Columns = None,
    encoding: Encoding = None,
    assistant: Annotated[
        str | None,
        typer.Option("--assistant", metavar="NAME", help="In a log of people: whose messages are learned."),
    ] = None,
    gap_hours: Annotated[
        float | None,
        typer.Option("--gap-hours", min=0.01, help="In a log: a longer pause (8) begins a new chat."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it is there.")] = False,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write chats of any kind that is read as plain JSONL of `messages`, a chat a line.

    Exports of ChatGPT, Claude, WhatsApp, Telegram and Slack and OpenAssistant's trees are read too. Rows that
    cannot be used are named and left out.

    Exit code 0: all rows written; 1: some left out; 2: none, or nothing could be read.
    """
    if len(files) < 2:
        raise ConfigError("One file was given", expected="FILE... OUTPUT: what is read, and what is written")
    if offline:
        forbid_network()
    from phlora.data.convert import convert

    display = make_display(quiet)
    with standard_output_kept(), display.counting("Writing") as progress:
        done = convert(
            _sources(files[:-1], columns, encoding),
            files[-1],
            format=format,
            assistant=assistant,
            gap_hours=gap_hours,
            overwrite=overwrite,
            progress=progress,
        )
    print_result(done.to_json() if as_json else printable(done.render()))
    raise typer.Exit(EXIT_FINDING if done.num_left_out else EXIT_DONE)


# ------------------------------------------------------------------------------- what the commands print


def _tokenizer(model: str, display: Display) -> LoadedTokenizer:
    from phlora.config import ModelConfig
    from phlora.models.tokenizer import find_files, read_tokenizer

    adopt_loggers()
    loaded = read_tokenizer(find_files(ModelConfig(name=model), needs_weights=False))
    for note in loaded.notes:
        display.note(note)
    return loaded


def _sources(files: Sequence[str], columns: list[str] | None, encoding: str | None) -> list[DataFile]:
    from phlora.config import DataFile, parse_columns

    mapping = parse_columns(columns or [])
    return [DataFile(path=file, columns=mapping, encoding=encoding) for file in files]


def _first_rows(file: DataFile, format: str, num_rows: int) -> list[Row]:
    from itertools import islice

    from phlora.data.dataset import read_rows

    return list(islice(read_rows(file, format=format), min(num_rows, sys.maxsize)))


def _preview_json(row: PreviewRow) -> dict[str, Any]:
    tokens = [{"text": text, "trained": trained, "weight": weight} for text, trained, weight in row.tokens]
    return {"origin": str(row.origin), "skipped": row.skipped, "tokens": tokens}
