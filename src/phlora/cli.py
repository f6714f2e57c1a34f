"""The command line: parse, call one public function, show what it returns, map errors to exit codes.

Results go to standard output, everything else to standard error. With `--json` standard output holds exactly
one JSON document, also when the command fails. Heavy modules are imported inside the commands that need them,
so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import platform
import re
import shlex
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.main import get_command

import phlora
from phlora.display import Display, printable
from phlora.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    ConfigError,
    InputError,
    NoRoomError,
    PhloraError,
)

if TYPE_CHECKING:
    from phlora.config import Origins, RunConfig
    from phlora.data.checks import PreviewRow
    from phlora.data.formats import Row
    from phlora.models.load import LoadedTokenizer
    from phlora.train.finetune import Run

# sysexits.h: EX_SOFTWARE. 1 means a finding here, so a crash must not look like one.
EXIT_BUG = 70
# Newer versions of typer carry a copy of click; this is the UsageError of the copy in use.
_UsageError: Any = typer.BadParameter.__mro__[1]
_EMBEDDED = "smollm2-135m"
_OPTION_KEYS = {
    "--model": "model.name",
    "--data": "data.files",
    "--eval-data": "data.eval",
    "--quantization": "model.quantization",
    "--output": "output",
    "--offline": "model.offline",
}


class AdapterFormat(StrEnum):
    """What an adapter is converted to."""

    peft = "peft"
    loralib = "loralib"
    merged = "merged"


class MergeBase(StrEnum):
    """The base that an adapter of a quantised one is merged into."""

    auto = "auto"
    full = "full"
    dequantized = "dequantized"


class TrainOn(StrEnum):
    """The turns whose tokens are trained."""

    assistant = "assistant"
    last = "last"
    all = "all"


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
data_app = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, help="Check a chat file, or look into it."
)
app.add_typer(data_app, name="data")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but warnings and the result.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never ask a hub; use what is on this machine.")]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        help="auto, messages, conversations, alpaca, qa, prompt_completion or text.",
        show_default=True,
    ),
]
MaxLength = Annotated[int | None, typer.Option("--max-length", min=1, help="Longest row in tokens.")]
BaseModel = Annotated[
    str | None, typer.Option("--model", "-m", help="The base model, if not the one that the adapter names.")
]
IntoBase = Annotated[
    MergeBase,
    typer.Option(
        "--base",
        help="Trained on nf4 or int8: merge into the full or the dequantized base; auto: the lower loss.",
        show_default=True,
    ),
]
SavedDtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Of the merged model: auto (as the base's files), float32, bfloat16, float16.",
        show_default=True,
    ),
]
ProofRows = Annotated[
    list[str] | None,
    typer.Option("--rows", metavar="FILE", help="Chats for the proof, if not the run's held-out ones."),
]
Trained = Annotated[TrainOn, typer.Option("--train-on", help="The turns whose tokens are trained.")]


# ------------------------------------------------------------------------------------------------ commands


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


@app.command(
    short_help="Tune a model on a chat file, and prove it.",
    epilog="\b\nExamples:\n"
    "  phlora train --model microsoft/Phi-3-mini-4k-instruct --data chats.jsonl --output runs/support\n"
    "  phlora train run.yaml --set training_config.learning_rate=3e-4 --set peft_config.r=16\n"
    "  phlora train run.yaml --quantization nf4                       QLoRA\n"
    "  phlora train run.yaml --set peft_config.loraplus_lr_ratio=16   LoRA+\n"
    "  phlora train run.yaml --set peft_config.use_dora=true          DoRA\n"
    "  phlora train run.yaml --resume",
)
def train(
    config_file: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG.yaml", help="Configuration; not needed with --model and --data."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Hub id, folder, .gguf file or embedded name (smollm2-135m)."),
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", "-d", metavar="FILE", help="Chats to train on; repeatable.")
    ] = None,
    eval_data: Annotated[
        list[str] | None,
        typer.Option("--eval-data", metavar="FILE", help="Held-out chats; without it some are split off."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="DIR", help="Run folder  [default: runs/<name of the data>]"),
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option("--quantization", metavar="TYPE", help="nf4 or int8: the base in 4 or 8 bits (QLoRA)."),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="SECTION.KEY=VALUE", help="Set one value of the configuration; repeatable."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and the resolved configuration; train nothing.")
    ] = False,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Tune a model on a chat file, and compare it with its base on held-out chats.

    Options and --set override the configuration file. The run folder gets the adapter (plain PEFT), the
    checkpoints, the resolved configuration and the report.
    """
    config = _run_config(
        config_file,
        {
            "--model": model,
            "--data": data,
            "--eval-data": eval_data,
            "--quantization": quantization,
            "--output": output,
            "--offline": offline,
        },
        assignments or [],
    )
    if config.model.offline:
        _forbid_network()
    from phlora.train.finetune import finetune

    try:
        with _standard_output_kept():
            run = finetune(
                config, resume=resume, overwrite=overwrite, dry_run=dry_run, display=_display(quiet)
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_what_is_kept(Path(config.output))) from None
    _show_run(run, config, dry_run=dry_run, quiet=quiet, as_json=as_json)


@app.command(
    short_help="Compare the base and the tuned model of a run.",
    epilog="\b\nExamples:\n"
    "  phlora evaluate runs/support\n"
    "  phlora evaluate runs/support --data other.jsonl --metric exact_match --metric rouge_l --json",
)
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder written by `phlora train`.")],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", "-d", metavar="FILE", help="Other chats than the run's held-out ones."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            help="exact_match, json_valid, json_equal, rouge_l, contains:TEXT or regex:PATTERN; repeatable.",
        ),
    ] = None,
    max_answers: Annotated[
        int | None,
        typer.Option("--max-answers", min=0, help="Rows answered by generation; 0: loss only."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Longest generated answer, in tokens.")
    ] = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare the base and the tuned model of a run on the same held-out chats.

    Writes report.json and report.html into the run folder.
    """
    if offline:
        _forbid_network()
    from phlora.train.proof import evaluate_run

    display = _display(quiet)
    with _standard_output_kept():
        report = evaluate_run(
            run,
            data=data or None,
            metrics=metric or None,
            max_answers=max_answers,
            max_new_tokens=max_new_tokens,
            display=display,
        )
    _print_result(report.to_json() if as_json else report.summary())
    display.note(f"Report: {Path(run) / 'report.html'}")


@app.command(
    epilog="\b\nExamples:\n"
    "  phlora chat runs/support\n"
    '  phlora chat smollm2-135m --system "Answer in one sentence."\n'
    '  echo "Where is my parcel?" | phlora chat runs/support'
)
def chat(
    source: Annotated[
        str,
        typer.Argument(metavar="RUN|MODEL", help="Run folder, adapter folder, or whatever --model takes."),
    ],
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System prompt  [default: none]")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Longest reply, in tokens.", show_default=True)
    ] = 512,
    temperature: Annotated[
        float,
        typer.Option("--temperature", min=0.0, help="0 always takes the likeliest token.", show_default=True),
    ] = 0.0,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Makes replies repeatable above temperature 0.")
    ] = None,
    offline: Offline = False,
) -> None:
    """Chat with a tuned model, its base, or both.

    /base, /tuned and /compare choose who answers; /help lists all commands. Ctrl-C stops a reply, Ctrl-D or
    /exit leaves. When standard input is no terminal, each line is one user turn. Nothing is stored.
    """
    if offline:
        _forbid_network()
    from phlora.serve.session import converse, open_chat

    display = _display(quiet=False)
    with _standard_output_kept():
        session = open_chat(
            source,
            system=system,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            display=display,
        )
    converse(session, display=display)


@app.command(
    short_help="Merge an adapter into its base, and prove it.",
    epilog="\b\nExamples:\n"
    "  phlora merge runs/support -o models/support\n"
    "  phlora merge runs/support -o models/support --base dequantized\n"
    "  phlora merge some/adapter -o models/support --rows chats.jsonl --dtype bfloat16",
)
def merge(
    source: Annotated[str, typer.Argument(metavar="RUN|ADAPTER", help="Run folder or adapter folder.")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="New model folder.")],
    base: IntoBase = MergeBase.auto,
    model: BaseModel = None,
    dtype: SavedDtype = "auto",
    rows: ProofRows = None,
    max_rows: Annotated[
        int, typer.Option("--max-rows", min=1, help="Rows of the proof at most.", show_default=True)
    ] = 64,
    device: Annotated[
        str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", show_default=True)
    ] = "auto",
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fold an adapter into its 16- or 32-bit base and save the whole model, which stock transformers loads.

    What was saved is loaded again and compared with base and adapter on the run's held-out rows: largest and
    mean difference of the logits, changed greedy tokens. Beyond the bound nothing is kept and the exit code is 1.
    For an adapter of a quantised base the loss merged into either base is measured and shown.
    """
    if offline:
        _forbid_network()
    from phlora.train.fold import merge_run

    with _standard_output_kept():
        report = merge_run(
            source,
            output,
            base=base.value,
            model=model,
            dtype=dtype,
            rows=rows or None,
            max_rows=max_rows,
            device=device,
            offline=offline,
            display=_display(quiet),
        )
    _print_result(report.to_json() if as_json else report.summary())


@app.command(
    short_help="Convert an adapter: PEFT, loralib, merged model.",
    epilog="\b\nExamples:\n"
    "  phlora convert runs/support --to loralib -o support.pt\n"
    "  phlora convert gpt2.pt --to peft -o adapter --lora-alpha 32 --enable q,v\n"
    "  phlora convert phi3.pt --to merged -o model --lora-alpha 32 --model PHI3 --rows chats.jsonl",
)
def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="loralib file (.pt), PEFT adapter folder or run folder.")
    ],
    to: Annotated[AdapterFormat, typer.Option("--to", help="What to convert to.")],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="OUT", help="New folder; for loralib a new file.")
    ],
    model: BaseModel = None,
    lora_alpha: Annotated[
        float | None,
        typer.Option("--lora-alpha", help="Of the layers of a loralib file, which does not know it."),
    ] = None,
    enable: Annotated[
        str | None,
        typer.Option("--enable", metavar="q,v", help="Adapted row blocks, where shapes do not tell."),
    ] = None,
    blocks: Annotated[
        list[str] | None,
        typer.Option(
            "--blocks",
            metavar="LAYER=ROWS,...",
            help="Rows of each block, such as qkv_proj=3072,1024,1024; by default those of --model; repeatable.",
        ),
    ] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(
            "--kernel",
            metavar="LAYER=SIZES",
            help="Kernel of a convolution in a loralib file, such as conv1=3,3; repeatable.",
        ),
    ] = None,
    base: IntoBase = MergeBase.auto,
    dtype: SavedDtype = "auto",
    rows: ProofRows = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Convert an adapter between loralib's file and PEFT's folder without losing a bit, or merge it.

    Every tensor is used or nothing is written. Pickles that hold more than tensors are not opened.
    `--to merged` is `phlora merge`, also for a loralib file; --base, --dtype and --rows are for it.
    """
    if to is AdapterFormat.merged and kernel:
        raise ConfigError(
            "--kernel is for --to peft: chat models have no convolutions",
            where="phlora convert",
            fix="leave it out",
        )
    if to is not AdapterFormat.merged and (rows or dtype != "auto" or base is not MergeBase.auto):
        raise ConfigError(
            "--base, --dtype and --rows are for --to merged", where="phlora convert", fix="leave them out"
        )
    if offline:
        _forbid_network()
    from phlora.train import fold

    names = [name.strip() for name in (enable or "").split(",") if name.strip()]
    how: dict[str, Any] = {"model": model, "offline": offline}
    with _standard_output_kept():
        loralib = {"lora_alpha": lora_alpha, "enable": names, "blocks": fold.parse_blocks(blocks or [])}
        report: Any
        if to is AdapterFormat.merged:
            how |= {"base": base.value, "dtype": dtype, "rows": rows or None, "display": _display(quiet)}
            report = fold.convert_to_model(source, output, **loralib, **how)
        else:
            kernels = fold.parse_kernels(kernel or [])
            report = fold.convert(source, output, to=to.value, kernels=kernels, **loralib, **how)
    _print_result(report.to_json() if as_json else report.summary())


@data_app.command(
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
    train_on: Trained = TrainOn.assistant,
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
        _forbid_network()
    from phlora.data.checks import check

    display = _display(quiet)
    with _standard_output_kept():
        tokens = _tokenizer(model, display) if model else None
        display.stage(f"Checking {', '.join(files)}")
        report = check(
            files,
            tokens.tokenizer if tokens else None,
            eval_sources=eval_data or None,
            format=format,
            train_on=train_on.value,
            max_length=max_length,
            training_template=tokens.training_template if tokens else None,
        )
    _print_result(report.to_json() if as_json else printable(report.render()))
    raise typer.Exit(report.exit_code(strict=strict))


@data_app.command(
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
    ] = _EMBEDDED,
    rows: Annotated[
        int, typer.Option("--rows", "-n", min=1, help="How many rows to show.", show_default=True)
    ] = 3,
    format: Format = "auto",
    max_length: MaxLength = None,
    train_on: Trained = TrainOn.assistant,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show rows token by token as the model will see them, and which tokens are trained.

    On a terminal trained tokens are green, elsewhere they stand in ⟦ ⟧; │ separates tokens.
    """
    if offline:
        _forbid_network()
    from phlora.data.checks import preview

    display = _display(quiet)
    with _standard_output_kept():
        first = _first_rows(file, format, rows)
        tokens = _tokenizer(model, display)
        shown = preview(
            first,
            tokens.tokenizer,
            rows,
            train_on=train_on.value,
            max_length=max_length,
            training_template=tokens.training_template,
        )
    if as_json:
        _print_result({"file": file, "model": model, "rows": [_preview_json(row) for row in shown]})
        return
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    display.note(f"Tokens of {model}; trained ones {'are green' if colour else 'stand in ⟦ ⟧'}")
    _print_result("\n\n".join(_preview_text(row, colour=colour) for row in shown))


# ------------------------------------------------------------------------------------- train: configuration


def _run_config(file: Path | None, options: Mapping[str, Any], assignments: Sequence[str]) -> RunConfig:
    """The file, the options over it, and the assignments over both."""
    from phlora.config import apply_overrides, build_config, read_config

    values, origins = read_config(file) if file else ({}, {})
    values, origins = _apply_options(values, origins, options)
    values, origins = apply_overrides(values, assignments, origins)
    config = build_config(values, origins)
    if "output" in values:
        return config
    if named := config.training_config.get("output_dir"):
        return replace(config, output=str(named))
    if file is None:
        output = _default_output(config.data.files[0].path)
        return replace(
            config, output=output, origins={**origins, "output": "the name of the first data file"}
        )
    return config


def _apply_options(
    values: dict[str, Any], origins: Origins, options: Mapping[str, Any]
) -> tuple[dict[str, Any], Origins]:
    from phlora.config import set_value

    model = values.get("model")
    if isinstance(model, dict) and options["--model"] not in (None, model.get("name")):
        # The revision in the file belongs to the model in the file.
        model.pop("revision", None)
        origins.pop("model.revision", None)
    for option, key in _OPTION_KEYS.items():
        if options[option]:
            values, origins = set_value(values, key, options[option], origins, origin=option)
    return values, origins


def _default_output(data: str) -> str:
    """`runs/chats` for chats.jsonl, chats.jsonl.gz and the hub data set owner/chats."""
    stem = Path(Path(data).name.removesuffix(".gz")).stem
    name = re.sub(r"[^\w.-]+", "-", stem).strip("-.")
    return f"runs/{name or 'run'}"


# ----------------------------------------------------------------------------------------- train: the result


def _show_run(run: Run, config: RunConfig, *, dry_run: bool, quiet: bool, as_json: bool) -> None:
    from phlora.config import resolved

    report = run.report
    if as_json:
        result: dict[str, Any] = {"run": config.output, "report": report.to_json() if report else None}
        if dry_run:
            result |= {"dry_run": True, "plan": run.plan.to_json()}
            result |= {"config": resolved(config), "origins": dict(config.origins)}
        _print_result(result)
        return
    if dry_run:
        _print_result(run.config_text)
        return
    if report:
        _print_result(report.summary())
    display = _display(quiet)
    if report:
        display.note(f"Report: {Path(config.output) / 'report.html'}")
    display.note(f"Try it: phlora chat {shlex.quote(config.output)}")


def _what_is_kept(output: Path) -> str:
    """What an interrupted run left in its folder, and the command that continues it."""
    from phlora.train.checkpoints import RUN_FILE, RunFolder

    checkpoint = RunFolder(output).latest_checkpoint()
    if checkpoint is None:
        again = f" Start {output} again with --overwrite." if (output / RUN_FILE).exists() else ""
        return f"No checkpoint was written yet, so there is nothing to continue from.{again}"
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--overwrite", "--resume")]
    command = shlex.join(["phlora", *arguments, "--resume"])
    return f"Kept: {checkpoint}. Continue with: {command}"


# ---------------------------------------------------------------------------------------------------- data


def _tokenizer(model: str, display: Display) -> LoadedTokenizer:
    from phlora.models.load import load_tokenizer

    _adopt_loggers()
    loaded = load_tokenizer(model)
    for note in loaded.notes:
        display.note(note)
    return loaded


def _first_rows(file: str, format: str, num_rows: int) -> list[Row]:
    from itertools import islice

    from phlora.data.formats import read_rows

    return list(islice(read_rows(file, format=format), num_rows))


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


# --------------------------------------------------------------------------------------- streams and the log


def _display(quiet: bool) -> Display:
    if quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return Display(quiet=quiet)


def _print_result(result: str | Mapping[str, Any]) -> None:
    """Text or one JSON document on standard output."""
    text = (
        result if isinstance(result, str) else json.dumps(result, indent=2, ensure_ascii=False, default=str)
    )
    sys.stdout.write(text + "\n")


@contextlib.contextmanager
def _standard_output_kept() -> Iterator[None]:
    """What libraries print goes to standard error: standard output is for the result."""
    _adopt_loggers()
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _forbid_network() -> None:
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


def _is_debugging() -> bool:
    return os.environ.get("PHLORA_DEBUG", "") not in ("", "0")


class _RecentRecords(logging.Handler):
    """The last log records, kept for the report of a bug."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: deque[str] = deque(maxlen=200)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


_records = _RecentRecords()


def _start_log() -> None:
    """Set up Python's logging, once: errors on the screen, warnings kept; all of it shown when debugging."""
    root = logging.getLogger()
    if _records in root.handlers:
        return
    screen = logging.StreamHandler()
    screen.setLevel(logging.INFO if _is_debugging() else logging.ERROR)
    screen.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    root.addHandler(_records)
    root.addHandler(screen)
    root.setLevel(logging.INFO if _is_debugging() else logging.WARNING)
    logging.captureWarnings(True)
    if not _is_debugging():
        # Read when the libraries are imported; their progress bars would disturb the display's own.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DATASETS_VERBOSITY", "error")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _adopt_loggers() -> None:
    """Let the libraries that log to the screen by themselves log to the root instead; after their import."""
    for name in ("transformers", "datasets", "huggingface_hub"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


def _use_utf8() -> None:
    """UTF-8 on every system; what is no text, such as the bytes of a strange file name, is escaped."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                encoding="utf-8", errors="strict" if stream is sys.stdin else "backslashreplace"
            )


# ------------------------------------------------------------------------------------------- the outer line


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code; the only place that catches whatever was raised."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _use_utf8()
    _start_log()
    as_json = "--json" in arguments
    try:
        code = _invoke(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        code = _report("Interrupted", f"Interrupted. {stop}".strip(), EXIT_INTERRUPTED, as_json=as_json)
    except BrokenPipeError:
        _let_go_of_stdout()
        code = EXIT_DONE
    except Exception as error:
        code = _report_error(error, arguments, as_json=as_json)
    sys.exit(code)


def _invoke(arguments: list[str]) -> int:
    """The command's exit code.

    `app()` would turn Ctrl-C and usage errors into exits of its own before `main` could see them.
    """
    command = get_command(app)
    try:
        with command.make_context("phlora", arguments) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return EXIT_DONE


def _report_error(error: Exception, arguments: Sequence[str], *, as_json: bool) -> int:
    if isinstance(error, _UsageError):
        error.show()
        return _report("UsageError", error.format_message(), error.exit_code, as_json=as_json, spoken=True)
    known = error if isinstance(error, PhloraError) else _known_problem(error)
    if known is None:
        message = _describe_bug(error, arguments)
        return _report("Bug", message, EXIT_BUG, as_json=as_json)
    if _is_debugging():
        traceback.print_exception(error)
    details = {key: getattr(known, key) for key in ("found", "where", "expected", "fix")}
    return _report(type(known).__name__, f"Error: {known}", known.exit_code, as_json=as_json, **details)


def _report(
    kind: str, message: str, exit_code: int, *, as_json: bool, spoken: bool = False, **details: str
) -> int:
    """Say what went wrong on standard error and, with `--json`, as an object on standard output."""
    if not spoken:
        sys.stderr.write(printable(message) + "\n")
    if as_json:
        _print_result(
            {
                "error": {
                    "kind": kind,
                    "message": message.removeprefix("Error: "),
                    **details,
                    "exit_code": exit_code,
                }
            }
        )
    return exit_code


def _known_problem(error: BaseException) -> PhloraError | None:
    """Problems of the machine or of a path that can come up anywhere."""
    where = str(getattr(error, "filename", None) or "")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return NoRoomError("The disk is full", where=where, fix="make room, then run the command again")
    if isinstance(error, PermissionError):
        return InputError("No permission to read or write this path", where=where, fix="name another path")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return NoRoomError(
            "The memory is full",
            fix="lower training_config.per_device_train_batch_size or training_config.max_length, "
            "or set training_config.gradient_checkpointing=true",
        )
    return None


def _describe_bug(error: Exception, arguments: Sequence[str]) -> str:
    head = f"This is a bug in Phlora: {type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(error))
    if _is_debugging():
        return f"{head}\n{trace}"
    facts = f"phlora {phlora.__version__}, Python {platform.python_version()}, {platform.platform()}"
    text = "\n".join([facts, shlex.join(["phlora", *arguments]), trace, *_records.lines, ""])
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="phlora-", suffix=".log", encoding="utf-8", delete=False
        ) as file:
            file.write(text)
    except OSError:
        return f"{head}\n{trace}"
    return f"{head}\nPlease report it together with {file.name}, which holds the traceback."


def _let_go_of_stdout() -> None:
    """Whoever read the output has gone; Python's own flush at exit must not complain about it."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
