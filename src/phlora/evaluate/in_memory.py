"""Base against tuned model for models in memory: a trainer's own, a PeftModel, or a fully trained copy of its base."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phlora.config import EvaluationConfig, Speed, TrainOn
from phlora.data.dataset import load_rows
from phlora.data.encoding import require_tokenizer
from phlora.data.tokenize import tokenize_rows
from phlora.display import Display
from phlora.errors import ConfigError, shown
from phlora.evaluate.metrics import Metric, names_and_functions
from phlora.evaluate.report import Report
from phlora.evaluate.run import BATCH_ROWS, compare_on, require_evaluable
from phlora.measure import Clock, peak_bytes
from phlora.models.quantization import use_operands
from phlora.models.tokenizer import prepare_tokenizer
from phlora.parameters import require_choice, require_count


def evaluate_model(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Any,
    *,
    base: PreTrainedModel | None = None,
    metrics: str | Metric | Sequence[str | Metric] = ("auto",),
    max_answers: int = 100,
    max_new_tokens: int = 128,
    max_length: int | None = None,
    train_on: TrainOn = "assistant",
    batch_size: int = BATCH_ROWS,
    speed: Speed = "auto",
    title: str = "",
    display: Display | None = None,
) -> Report:
    """Compare a tuned model in memory with its base on rows that it was not trained on.

    Both answer the same prompts, greedily; loss, perplexity and token accuracy are those of the expected answers. The
    model is used as it stands and left as it was. Which rows it was trained on is not known here: that they are
    others is for the caller to see to.

    Args:
        model: a PeftModel, whose base is it without its adapter; or a model that was trained as a whole.
        tokenizer: with the chat template that was trained; it is not changed.
        data: file(s), rows or a data set, in any form that `load_rows` reads.
        base: the model that one without an adapter is compared with.
        metrics: names as in `evaluation.metrics`, and functions of (answer, reference) that return 0 to 1, or None
            where they do not apply; or one of them.
        max_answers: rows answered by generation, from the first on; 0: loss only.
        max_new_tokens: longest generated answer, in tokens.
        max_length, train_on: as in `tokenize_rows`.
        batch_size: rows whose loss is taken at once.
        speed: `auto`, or `reference` to compute without Phlora's own layers.
        title: what the report is called; by default the name of the model.
        display: where progress goes; standard error by default.

    Returns:
        The report; `write` puts it into a folder.

    Raises:
        ConfigError: a model without an adapter and no `base`, an unknown metric, or a setting out of range.
        DataError, ModelError: the rows or the tokenizer cannot be used.
    """
    if base is None and not isinstance(model, PeftModel):
        raise ConfigError(
            f"{type(model).__name__} has no adapter that could be switched off",
            where="model",
            expected="a PeftModel, or `base`: the model as it was before it was trained",
            fix='name it: base=load_model("…").model',
        )
    names, own_metrics = _metrics(metrics)
    evaluation = EvaluationConfig(
        metrics=tuple(names), max_answers=max_answers, max_new_tokens=max_new_tokens
    )
    require_evaluable(evaluation)
    require_count(batch_size, where="batch_size")
    require_choice(speed, get_args(Speed), where="speed")
    if base is not None and not isinstance(base, nn.Module):
        raise ConfigError(
            f"{shown(base)} was given",
            where="base",
            expected="a model in memory",
            fix='load_model("…").model',
        )
    require_tokenizer(tokenizer)
    for side in (model, base):
        if side is not None:
            use_operands(side)
    display, clock = display or Display(), Clock()
    prepared = prepare_tokenizer(
        copy.deepcopy(tokenizer), config=model.config, generation_config=model.generation_config
    )
    rows = load_rows(data).rows
    tokenized = tokenize_rows(
        rows,
        prepared.tokenizer,
        train_on=train_on,
        max_length=max_length,
        training_template=prepared.training_template,
    )
    kept = {row.origin for row in tokenized.rows}
    comparison = compare_on(
        model,
        prepared,
        [row for row in rows if row.origin in kept],
        tokenized.rows,
        evaluation,
        display=display,
        batch_size=batch_size,
        speed=speed,
        own_metrics=own_metrics,
        base=base,
    )
    clock.lap("evaluation")
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    return Report(
        title=title or str(model.config.name_or_path or type(whole).__name__),
        comparison=comparison,
        timing=clock.seconds,
        peak_bytes=peak_bytes(),
        notes=[f"{skip.origin}: {skip.reason}" for skip in tokenized.skipped],
    )


def _metrics(metrics: Any) -> tuple[list[str], dict[str, Metric]]:
    """
    Raises:
        ConfigError: what is neither a name nor a function.
    """
    is_one = isinstance(metrics, str) or callable(metrics) or not isinstance(metrics, Iterable)
    names, functions = names_and_functions([metrics] if is_one or isinstance(metrics, Mapping) else metrics)
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(
                f"{shown(name)} was given",
                where="metrics",
                expected="names, and functions of (answer, reference)",
            )
    return names, functions
