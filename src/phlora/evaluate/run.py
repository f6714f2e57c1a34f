"""Base against tuned model on the held-out rows: right after training, or later from the run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from phlora.adapters.load import load_adapter
from phlora.adapters.speed import at_speed
from phlora.config import EvaluationConfig, RunConfig, Speed, build_config, resolved
from phlora.data.collate import Collator, SharedPrefixCollator
from phlora.data.dataset import load_rows
from phlora.data.prompts import encode_prompt
from phlora.data.rows import Row
from phlora.data.tokenize import TokenizedRow, tokenize_rows
from phlora.display import Display
from phlora.errors import RunError
from phlora.evaluate.compare import Comparison, EvaluationItem, compare, score_model
from phlora.evaluate.metrics import Metric, resolve_metrics
from phlora.evaluate.report import Report
from phlora.evaluate.task import task_of
from phlora.measure import Clock, peak_bytes
from phlora.models.generate import generate
from phlora.models.load import load_model
from phlora.models.prefix_sharing import decide_sharing
from phlora.models.rotary import longrope_limit
from phlora.models.tokenizer import LoadedTokenizer
from phlora.runs.folder import HELD_OUT_FILE, RunFolder, read_events

# Rows whose loss is taken at once.
BATCH_ROWS = 8


def compare_on(
    model: PeftModel,
    tokenizer: LoadedTokenizer,
    rows: Sequence[Row],
    tokenized: Sequence[TokenizedRow],
    evaluation: EvaluationConfig,
    *,
    display: Display,
    batch_size: int = BATCH_ROWS,
    speed: Speed = "auto",
    own_metrics: Mapping[str, Metric] | None = None,
) -> Comparison:
    """Loss on all rows and generated answers to the first `max_answers` of them, without and with the adapter.

    Args:
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

    def side(name: str) -> Any:
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
                    progress=_steps(answered),
                ),
                decode=lambda ids: str(tokenizer.tokenizer.decode(ids, skip_special_tokens=True)),
                collate=collate,
                batch_size=batch_size,
                progress=scored,
            )

    with at_speed(model, speed):
        with model.disable_adapter():
            base = side("Base")
        tuned = side("Tuned")
    return compare(base, tuned, items)


def evaluate_run(
    run: str | Path,
    *,
    data: Any = None,
    metrics: Sequence[str] | None = None,
    max_answers: int | None = None,
    max_new_tokens: int | None = None,
    display: Display | None = None,
) -> Report:
    """Compare the best adapter of a run with its base again, and write the run's report anew.

    Args:
        run: a run folder.
        data: other held-out rows (file(s), data set or rows); by default those of the run.
        metrics, max_answers, max_new_tokens: in the place of the run's own `evaluation` settings.
        display: where progress goes; standard error by default.

    Raises:
        PhloraError: the folder holds no trained run, its base model cannot be loaded, or the rows cannot be used.
    """
    display = display or Display()
    clock = Clock()
    folder = RunFolder(Path(run))
    facts = folder.facts()
    if not folder.best_adapter.is_dir():
        raise RunError(
            f"The run has no adapter yet ({facts.get('status')})", where=str(run), fix="train it first"
        )
    config = build_config(facts["config"], facts["origins"])
    changes: dict[str, Any] = {
        "metrics": metrics and tuple(metrics),
        "max_answers": max_answers,
        "max_new_tokens": max_new_tokens,
    }
    evaluation = dataclasses.replace(
        config.evaluation, **{name: value for name, value in changes.items() if value is not None}
    )
    resolve_metrics(evaluation.metrics)
    rows = load_rows(data if data is not None else folder.path / HELD_OUT_FILE).rows

    display.stage(f"Loading {config.model.name} and its adapter")
    loaded = load_model(config.model)
    adapted = load_adapter(loaded.model, folder.best_adapter)
    tokenized = tokenize_rows(
        rows,
        loaded.tokenizer.tokenizer,
        train_on=config.data.train_on,
        max_length=facts["max_length"],
        training_template=loaded.tokenizer.training_template,
    )
    kept = {row.origin for row in tokenized.rows}
    clock.lap("loading")

    display.stage(f"Comparing base and tuned model on {len(kept)} held-out rows")
    comparison = compare_on(
        adapted.model,
        loaded.tokenizer,
        [row for row in rows if row.origin in kept],
        tokenized.rows,
        evaluation,
        display=display,
        speed=config.speed,
    )
    clock.lap("evaluation")
    report = make_report(folder, comparison, dataclasses.replace(config, evaluation=evaluation), clock)
    report.write(folder.path)
    return report


def make_report(folder: RunFolder, comparison: Comparison, config: RunConfig, clock: Clock) -> Report:
    """The report of a run, from what its folder holds and a fresh comparison."""
    facts = folder.facts()
    events = read_events(folder.events)
    return Report(
        title=config.model.name,
        comparison=comparison,
        config=facts["config"] | {"evaluation": resolved(config)["evaluation"]},
        origins=facts["origins"],
        environment=facts["environment"],
        model=facts["model"],
        data={
            name: value for name, value in facts["data"].items() if name not in ("dropped", "cut", "contents")
        },
        adapter=facts["adapter"],
        timing={**facts.get("timing", {}), **clock.seconds},
        peak_bytes=peak_bytes(),
        training_curve=[
            (e["step"], float(e["loss"]), float(e.get("learning_rate", 0))) for e in events if "loss" in e
        ],
        evaluation_curve=[(e["step"], float(e["eval_loss"])) for e in events if "eval_loss" in e],
        notes=[*facts["data"]["dropped"], *facts["data"]["cut"]],
    )


def _steps(advance: Callable[[int], None]) -> Callable[[int, int], None]:
    """A function of (done, total) for a function of the rows since the last call."""
    before = 0

    def progress(done: int, total: int) -> None:
        nonlocal before
        advance(done - before)
        before = done

    return progress


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
