"""Base against tuned model on the held-out rows: right after training, or later from the run folder."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from phlora.adapters.base_view import as_base
from phlora.adapters.speed import at_speed
from phlora.config import EvaluationConfig, RunConfig, Speed, resolved
from phlora.data.collate import Collator, SharedPrefixCollator
from phlora.data.prompts import encode_prompt
from phlora.data.rows import Row
from phlora.data.tokenize import TokenizedRow, tokenize_rows
from phlora.display import Display
from phlora.errors import DataError, RunError
from phlora.evaluate.compare import Comparison, EvaluationItem, compare, score_model
from phlora.evaluate.metrics import Metric, resolve_metrics
from phlora.evaluate.report import Report
from phlora.evaluate.task import task_of
from phlora.files import clear_leftovers, replaced_folder
from phlora.measure import Clock, peak_bytes
from phlora.models.families import longrope_limit
from phlora.models.generate import generate
from phlora.models.prefix_sharing import decide_sharing
from phlora.models.tokenizer import LoadedTokenizer
from phlora.parameters import require_count
from phlora.runs.events import curve, lasting_events, read_events
from phlora.runs.folder import EVALUATIONS, HELD_OUT_FILE, RunFolder
from phlora.runs.reading import rows_or_held_out
from phlora.runs.resolve import ResolvedAdapter, load_pair, resolve_adapter
from phlora.runs.trained_rows import TrainedCount, count_trained

# Rows whose loss is taken at once.
BATCH_ROWS = 8
# A record that nobody wrote to for so long was left by a process that was killed.
_ABANDONED_SECONDS = 3600


def compare_on(
    model: PeftModel | PreTrainedModel,
    tokenizer: LoadedTokenizer,
    rows: Sequence[Row],
    tokenized: Sequence[TokenizedRow],
    evaluation: EvaluationConfig,
    *,
    display: Display,
    batch_size: int = BATCH_ROWS,
    speed: Speed = "auto",
    own_metrics: Mapping[str, Metric] | None = None,
    base: PreTrainedModel | None = None,
) -> Comparison:
    """Loss on all rows and generated answers to the first `max_answers` of them, without and with the adapter.

    Args:
        base: the other side, for a model without an adapter.
        own_metrics: functions of (answer, reference), under their names, beside those that `evaluation` names.

    Raises:
        ConfigError: an unknown metric.
    """
    items = _items(rows, tokenizer, evaluation.max_answers)
    task = task_of([item.reference for item in items])
    metrics = {**resolve_metrics(evaluation.metrics, auto=task.metrics), **(own_metrics or {})}
    sharing = decide_sharing(model, [[row] for row in tokenized], speed=speed, batch_size=batch_size)
    shared = SharedPrefixCollator(longrope_limit(model.config))
    collate = shared if sharing.on else Collator(tokenizer.tokenizer.pad_token_id)

    def side(name: str, model: PeftModel | PreTrainedModel) -> Any:
        with (
            display.progress(f"{name}: loss", len(tokenized)) as scored,
            display.progress(f"{name}: answers", len(items)) as answered,
        ):
            return score_model(
                model,
                tokenized,
                items,
                metrics=metrics,
                generate=lambda _, prompts: generate(
                    model,
                    prompts,
                    max_new_tokens=evaluation.max_new_tokens,
                    stop_token_ids=tokenizer.stop_token_ids,
                    pad_token_id=tokenizer.tokenizer.pad_token_id,
                    progress=answered,
                ),
                decode=lambda ids: str(tokenizer.tokenizer.decode(ids, skip_special_tokens=True)),
                collate=collate,
                batch_size=batch_size,
                progress=scored,
            )

    with at_speed(model, speed):
        if base is not None:
            with at_speed(base, speed):
                before = side("Base", base)
        else:
            assert isinstance(model, PeftModel)
            with as_base(model):
                before = side("Base", model)
        after = side("Tuned", model)
    return compare(before, after, items)


def evaluate_run(
    run: str | Path,
    *,
    data: Any = None,
    metrics: Sequence[str] | None = None,
    max_answers: int | None = None,
    max_new_tokens: int | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    display: Display | None = None,
) -> Report:
    """Compare an adapter of a run with its base again, on its held-out rows or on others.

    The report goes into a folder of its own, `evaluations/<UTC time>` in the run folder, which its `folder` names;
    nothing that the run or an earlier evaluation found is replaced. Rows that the run trained on, or that say nearly
    the same as one of those, are counted, said, and never called held out.

    Args:
        run: a run folder (its best adapter is taken), or one of its adapters or checkpoints.
        data: other rows (file(s), data set or rows); by default those that the run held out.
        metrics, max_answers, max_new_tokens: in the place of the run's own `evaluation` settings.
        format, columns: how files named in `data` are read, in the place of the run's own settings.
        display: where progress goes; standard error by default.

    Raises:
        PhloraError: there is no trained run, its base model cannot be loaded, or the rows cannot be used.
    """
    display = display or Display()
    clock = Clock()
    found = resolve_adapter(run)
    config = found.config
    if found.run is None or config is None:
        raise RunError(
            "The adapter lies in no run, so there are no settings and no rows to evaluate it by",
            where=str(run),
            fix="name a folder that `phlora train` wrote",
        )
    evaluation = _changed(config.evaluation, metrics, max_answers, max_new_tokens)
    require_evaluable(evaluation)
    resolve_metrics(evaluation.metrics)
    rows = _rows_of(found, data, format=format, columns=columns)

    display.stage(f"Loading {found.base_name} and {found.adapter}")
    pair = load_pair(found, display=display)
    for said in pair.notes:
        display.note(said)
    tokenized = tokenize_rows(
        rows,
        pair.tokenizer.tokenizer,
        train_on=found.train_on,
        max_length=found.max_length,
        training_template=pair.tokenizer.training_template,
    )
    kept = {row.origin for row in tokenized.rows}
    compared = [row for row in rows if row.origin in kept]
    trained = count_trained(found.run, compared)
    if trained is None and data is None:
        # Those that the run says it held out.
        trained = TrainedCount(same=0)
    num_trained = trained.same if trained else None
    notes = _about_trained(trained, len(compared))
    for note in notes:
        display.warn(note)
    clock.lap("loading")

    which = "held-out rows" if num_trained == 0 else "rows"
    display.stage(f"Comparing base and tuned model on {len(compared)} {which}")
    assert isinstance(pair.model, PeftModel)
    comparison = compare_on(
        pair.model,
        pair.tokenizer,
        compared,
        tokenized.rows,
        evaluation,
        display=display,
        speed=config.speed,
    )
    clock.lap("evaluation")
    report = make_report(found.run, comparison, replace(config, evaluation=evaluation), clock)
    left_out = [f"{skip.origin}: {skip.reason}" for skip in tokenized.skipped]
    report = replace(
        report,
        adapter={**report.adapter, "folder": _within(found.run, found.adapter)},
        data={**report.data, "evaluated": _names_of(data)},
        timing=clock.seconds,
        notes=[*notes, *(left_out if data is not None else report.notes)],
        num_trained_rows=num_trained,
    )
    return replace(report, folder=_write_record(found.run, report))


def require_evaluable(evaluation: EvaluationConfig) -> None:
    """
    Raises:
        ConfigError: a count that is none.
    """
    require_count(evaluation.max_answers, where="max_answers", least=0)
    require_count(evaluation.max_new_tokens, where="max_new_tokens")


def _changed(
    evaluation: EvaluationConfig,
    metrics: Sequence[str] | None,
    max_answers: int | None,
    max_new_tokens: int | None,
) -> EvaluationConfig:
    return EvaluationConfig(
        metrics=(metrics,) if isinstance(metrics, str) else tuple(metrics or evaluation.metrics),
        max_answers=evaluation.max_answers if max_answers is None else max_answers,
        max_new_tokens=evaluation.max_new_tokens if max_new_tokens is None else max_new_tokens,
        enabled=evaluation.enabled,
    )


def _rows_of(found: ResolvedAdapter, data: Any, **how: Any) -> list[Row]:
    rows = rows_or_held_out(found, data, command="phlora evaluate", option="--data", **how)
    if rows is None:
        raise DataError(
            "The run held no rows out",
            where=str(found.source),
            fix="name a file with chats that training did not see: --data chats.jsonl",
        )
    return rows


def _about_trained(trained: TrainedCount | None, num_rows: int) -> list[str]:
    if trained is None:
        return ["The run does not say which rows it trained on, so these may be among them"]
    notes = []
    if trained.same:
        which = "equal rows" if trained.same_prompt is None else "equal or nearly equal ones"
        notes.append(
            f"{trained.same} of {num_rows} rows were trained on ({which}): on those the tuned model repeats what it "
            "was shown, so the figures do not say how it does on new ones"
        )
    if trained.same_prompt:
        notes.append(
            f"{trained.same_prompt} of {num_rows} rows have a prompt that was trained on, with another answer"
        )
    return notes


def _names_of(data: Any) -> str:
    if data is None:
        return HELD_OUT_FILE
    names = [data] if isinstance(data, str | Path) else data
    if isinstance(names, list | tuple) and all(isinstance(name, str | Path) for name in names):
        return ", ".join(Path(name).name for name in names)
    return "rows in memory"


def _within(run: RunFolder, adapter: Path) -> str:
    """`adapter/best`: where an adapter lies in its run."""
    return adapter.resolve().relative_to(run.path.resolve()).as_posix()


def _write_record(run: RunFolder, report: Report) -> Path:
    """Write a report into a new folder under the run, which appears there whole."""
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
    evaluations = run.path / EVALUATIONS
    names = itertools.chain([stamp], (f"{stamp}-{number}" for number in itertools.count(2)))
    folder = next(evaluations / name for name in names if not (evaluations / name).exists())
    try:
        clear_leftovers(evaluations, idle_seconds=_ABANDONED_SECONDS)
        with replaced_folder(folder) as part:
            report.write(part)
    except PermissionError as error:
        raise RunError(
            "The evaluation cannot be written into the run", where=str(error.filename or folder)
        ) from error
    return folder


def make_report(folder: RunFolder, comparison: Comparison, config: RunConfig, clock: Clock) -> Report:
    """The report of a run, from what its folder holds and a fresh comparison."""
    facts = folder.facts()
    data = facts.get("data", {})
    events = lasting_events(read_events(folder.events))
    return Report(
        title=config.model.name,
        comparison=comparison,
        config=facts.get("config", {}) | {"evaluation": resolved(config)["evaluation"]},
        origins=facts.get("origins", {}),
        environment=facts.get("environment", {}),
        model=facts.get("model", {}),
        data={name: value for name, value in data.items() if name not in ("dropped", "cut", "contents")},
        adapter=facts.get("adapter", {}),
        timing={**facts.get("timing", {}), **clock.seconds},
        peak_bytes=peak_bytes(),
        training_curve=[
            (int(step), loss, rate) for step, loss, rate in curve(events, "loss", learning_rate=0.0)
        ],
        evaluation_curve=[(int(step), loss) for step, loss in curve(events, "eval_loss")],
        notes=[str(note) for name in ("dropped", "cut") for note in data.get(name, ())],
    )


def _items(rows: Sequence[Row], tokenizer: LoadedTokenizer, most: int) -> list[EvaluationItem]:
    prompts = (encode_prompt(row, tokenizer.tokenizer) for row in rows)
    items = [
        EvaluationItem(
            prompt_ids=prompt.prompt_ids,
            reference=prompt.reference,
            messages=prompt.messages,
            origin=prompt.origin,
        )
        for prompt in prompts
        if prompt is not None
    ]
    return items[:most]
