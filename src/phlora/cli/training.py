"""`phlora train`, `phlora plan` and `phlora evaluate`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phlora.cli.console import (
    forbid_network,
    make_display,
    print_result,
    standard_output_kept,
    terminal_width,
)
from phlora.cli.options import (
    Columns,
    Json,
    LikeRunColumns,
    LikeRunFormat,
    Offline,
    Quiet,
    columns_in_place,
)

if TYPE_CHECKING:
    from phlora.config import DataConfig, DataFile, RunConfig
    from phlora.config_values import Origins
    from phlora.train.finetune import Run

commands = typer.Typer()
_OPTION_KEYS = {
    "--model": "model.name",
    "--data": "data.files",
    "--eval-data": "data.eval",
    "--quantization": "model.quantization",
    "--output": "output",
    "--format": "data.format",
    "--strict": "data.strict",
    "--offline": "model.offline",
}

# What `train` and `plan` have in common.
ConfigFile = Annotated[
    Path | None,
    typer.Argument(metavar="CONFIG.yaml", help="Configuration; not needed with --model and --data."),
]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Hub id, folder, .gguf file or embedded name (smollm2-135m)."),
]
Data = Annotated[
    list[str] | None, typer.Option("--data", "-d", metavar="FILE", help="Chats to train on; repeatable.")
]
EvalData = Annotated[
    list[str] | None,
    typer.Option("--eval-data", metavar="FILE", help="Held-out chats; without it some are split off."),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="Of the data, where it is not to be found out: messages, alpaca, preference_chosen, …",
    ),
]
Output = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="DIR", help="Run folder  [default: runs/<name of the data>]"),
]
Quantization = Annotated[
    str | None,
    typer.Option("--quantization", metavar="TYPE", help="nf4 or int8: the base in 4 or 8 bits (QLoRA)."),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="SECTION.KEY=VALUE", help="Set one value of the configuration; repeatable."
    ),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Do not train when there are warnings about the data.")
]
FitMemory = Annotated[
    bool,
    typer.Option("--fit", help="Where it would not fit in memory, change what costs least to make it fit."),
]


@commands.command(
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
    config_file: ConfigFile = None,
    model: Model = None,
    data: Data = None,
    eval_data: EvalData = None,
    format: Format = None,
    columns: Columns = None,
    output: Output = None,
    quantization: Quantization = None,
    assignments: Assignments = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and the resolved configuration; train nothing.")
    ] = False,
    strict: Strict = False,
    fit: FitMemory = False,
    overcommit: Annotated[
        bool, typer.Option("--overcommit", help="Start although the forecast is over the free memory.")
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
        _options(model, data, eval_data, quantization, output, format, strict=strict, offline=offline),
        assignments or [],
        columns or [],
    )
    from phlora.train.finetune import finetune

    try:
        with standard_output_kept():
            run = finetune(
                config,
                resume=resume,
                overwrite=overwrite,
                dry_run=dry_run,
                fit_memory=fit,
                overcommit=overcommit,
                display=make_display(quiet),
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_what_is_kept(Path(config.output))) from None
    _show_run(run, config, dry_run=dry_run, quiet=quiet, as_json=as_json)


@commands.command(
    short_help="Say what a run will take, without starting it.",
    epilog="\b\nExamples:\n"
    "  phlora plan run.yaml\n"
    "  phlora plan --model microsoft/Phi-3-mini-4k-instruct --data chats.jsonl\n"
    "  phlora plan run.yaml --set training_config.activation_memory=recompute\n"
    "  phlora plan run.yaml --quantization nf4 --json",
)
def plan(
    config_file: ConfigFile = None,
    model: Model = None,
    data: Data = None,
    eval_data: EvalData = None,
    format: Format = None,
    columns: Columns = None,
    output: Output = None,
    quantization: Quantization = None,
    assignments: Assignments = None,
    strict: Strict = False,
    fit: FitMemory = False,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Parameters, tokens and steps of a run, the memory that it will hold by part, the time that it will take, and
    whether it fits here; if not, which single change makes it fit and what that costs.

    No weight is read: the model's configuration, its tokenizer and the data are enough. Seconds come from a moment's
    measuring of two layers of the model's shapes on a batch of the data.
    """
    config = _run_config(
        config_file,
        _options(model, data, eval_data, quantization, output, format, strict=strict, offline=offline),
        assignments or [],
        columns or [],
    )
    from phlora.train.finetune import plan_run

    with standard_output_kept():
        planned = plan_run(config, fit_memory=fit, display=make_display(quiet))
    print_result(planned.to_json() if as_json else planned.render())


@commands.command(
    short_help="Compare the base and the tuned model of a run.",
    epilog="\b\nExamples:\n"
    "  phlora evaluate runs/support\n"
    "  phlora evaluate runs/support --data other.jsonl --metric exact_match --metric rouge_l --json",
)
def evaluate(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run, or an adapter or checkpoint in it."),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", "-d", metavar="FILE", help="Other chats than the run's held-out ones."),
    ] = None,
    format: LikeRunFormat = None,
    columns: LikeRunColumns = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            help="auto, exact_match, json_valid, json_equal, rouge1, rouge2, rougeL, rougeLsum, contains:TEXT, "
            "regex:PATTERN; repeatable.",
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
    """Compare the base and the tuned model of a run on the same held-out chats, or on others.

    Writes report.json and report.html into a new folder under RUN/evaluations; the proof of the run stays as it is.
    """
    if offline:
        forbid_network()
    from phlora.evaluate.run import evaluate_run

    display = make_display(quiet)
    with standard_output_kept():
        report = evaluate_run(
            run,
            data=data or None,
            metrics=metric or None,
            max_answers=max_answers,
            max_new_tokens=max_new_tokens,
            format=format,
            columns=columns_in_place(columns),
            display=display,
        )
    assert report.folder is not None
    folder = report.folder.as_posix()
    print_result(
        {**report.to_json(), "folder": folder} if as_json else report.summary(width=terminal_width())
    )
    display.note(f"Report: {folder}/report.html")


# ------------------------------------------------------------------------------------- train: configuration


def _options(
    model: str | None,
    data: list[str] | None,
    eval_data: list[str] | None,
    quantization: str | None,
    output: str | None,
    format: str | None,
    *,
    strict: bool,
    offline: bool,
) -> dict[str, Any]:
    """The options that stand for a key of the configuration, by name."""
    return {
        "--model": model,
        "--data": data,
        "--eval-data": eval_data,
        "--quantization": quantization,
        "--output": output,
        "--format": format,
        "--strict": strict,
        "--offline": offline,
    }


def _run_config(
    file: Path | None, options: Mapping[str, Any], assignments: Sequence[str], columns: Sequence[str]
) -> RunConfig:
    """The file, the options over it, the assignments over both, and the names of all data files' columns.

    From here on no network is reached where the configuration says so.
    """
    from phlora.config import build_config, default_output, parse_columns
    from phlora.config_values import apply_overrides, read_config

    values, origins = read_config(file) if file else ({}, {})
    values, origins = _apply_options(values, origins, options)
    values, origins = apply_overrides(values, assignments, origins)
    config = build_config(values, origins)
    if config.model.offline:
        forbid_network()
    if columns:
        config = replace(config, data=_with_columns(config.data, parse_columns(columns)))
    if "output" in values:
        return config
    if named := config.training_config.get("output_dir"):
        return replace(config, output=str(named))
    if file is None:
        output = default_output(config.data.files[0].path)
        return replace(
            config, output=output, origins={**origins, "output": "the name of the first data file"}
        )
    return config


def _with_columns(data: DataConfig, columns: Mapping[str, str]) -> DataConfig:
    """All data files, with these names for their columns too."""

    def named(files: Sequence[DataFile]) -> tuple[DataFile, ...]:
        return tuple(replace(file, columns={**file.columns, **columns}) for file in files)

    return replace(data, files=named(data.files), eval=named(data.eval))


def _apply_options(
    values: dict[str, Any], origins: Origins, options: Mapping[str, Any]
) -> tuple[dict[str, Any], Origins]:
    from phlora.config_values import set_value

    model = values.get("model")
    if isinstance(model, dict) and options["--model"] not in (None, model.get("name")):
        # The revision in the file belongs to the model in the file.
        model.pop("revision", None)
        origins.pop("model.revision", None)
    for option, key in _OPTION_KEYS.items():
        if options[option]:
            values, origins = set_value(values, key, options[option], origins, origin=option)
    return values, origins


# ----------------------------------------------------------------------------------------- train: the result


def _show_run(run: Run, config: RunConfig, *, dry_run: bool, quiet: bool, as_json: bool) -> None:
    from phlora.config import resolved

    report = run.report
    if as_json:
        result: dict[str, Any] = {"run": config.output, "report": report.to_json() if report else None}
        if dry_run:
            result |= {"dry_run": True, "plan": run.plan.to_json(), "forecast": run.plan.forecast_json()}
            result |= {"config": resolved(config), "origins": dict(config.origins)}
        print_result(result)
        return
    if dry_run:
        print_result(run.config_text)
        return
    if report:
        print_result(report.summary(width=terminal_width()))
    display = make_display(quiet)
    if report:
        display.note(f"Report: {Path(config.output) / 'report.html'}")
    display.note(f"Try it: phlora chat {shlex.quote(config.output)}")


def _what_is_kept(output: Path) -> str:
    """What an interrupted run left in its folder, and the command that continues it."""
    from phlora.runs.folder import RUN_FILE, RunFolder

    checkpoint = RunFolder(output).latest_checkpoint()
    if checkpoint is None:
        again = f" Start {output} again with --overwrite." if (output / RUN_FILE).exists() else ""
        return f"No checkpoint was written yet, so there is nothing to continue from.{again}"
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--overwrite", "--resume")]
    command = shlex.join(["phlora", *arguments, "--resume"])
    return f"Kept: {checkpoint}. Continue with: {command}"
