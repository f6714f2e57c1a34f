"""The base model against the tuned one, on the same held-out rows.

Two questions are asked of each side: how likely it finds the trained tokens of every row (loss, perplexity, token
accuracy), and what it answers when it is given the prompt alone (the metrics). Both sides are the same PeftModel,
once with its adapter switched off, so nothing but the adapter can make a difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from phlora.data.collate import SharedPrefixCollator
from phlora.data.table import IGNORED
from phlora.errors import DataError
from phlora.evaluate.metrics import PASSING_SCORE, Metric
from phlora.evaluate.statistics import Interval, paired_interval
from phlora.evaluate.task import Task, task_of
from phlora.models.generate import evaluating
from phlora.models.lm_head import targets_and_weights, token_losses

Generate = Callable[[nn.Module, list[list[int]]], list[list[int]]]
Decode = Callable[[list[int]], str]
Collate = Callable[[Sequence[Any]], dict[str, Any]]
Advance = Callable[[int], None]
RowLoss = tuple[float, int, int]
Change = Literal["improved", "worsened"]


@dataclass(frozen=True, kw_only=True)
class EvaluationItem:
    """A prompt to answer and the answer that would be right.

    Attributes:
        prompt_ids: the prompt as tokens, ready for generation.
        reference: the right answer.
        messages: the prompt as messages with `role` and `content`, for people to read.
        origin: file and line of the row.
    """

    prompt_ids: list[int]
    reference: str
    messages: Sequence[Mapping[str, Any]] | None
    origin: Any


@dataclass(frozen=True, kw_only=True)
class LossScores:
    """What a model thinks of the trained tokens of the held-out rows; every token counts alike.

    Attributes:
        loss: mean cross-entropy per trained token, in nats.
        perplexity: exp(loss).
        token_accuracy: share of trained tokens that the model finds most likely.
        num_tokens: trained tokens in all rows.
        per_row: (loss sum, trained tokens, of these most likely) of each row, in the order of the rows.
    """

    loss: float
    perplexity: float
    token_accuracy: float
    num_tokens: int
    per_row: list[RowLoss]


@dataclass(frozen=True, kw_only=True)
class ModelScores:
    """One model's results.

    Attributes:
        loss: the scores of the trained tokens.
        answers: the generated answer of each item.
        scores: metric name -> score of each item, None where the metric does not apply.
        metrics: metric name -> mean of the scores, None where it applies to no item.
    """

    loss: LossScores
    answers: list[str] = field(default_factory=list)
    scores: dict[str, list[float | None]] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AnsweredItem:
    """An item with the answers of both models.

    Attributes:
        origin: file and line of the row.
        messages: the prompt as messages with `role` and `content`; empty for a plain text.
        reference: the right answer.
        base_answer, tuned_answer: what each model said.
        change: `improved` where the base is wrong and the tuned model right, `worsened` the other way round; None
            where both are right, both are wrong, or no metric tells right from wrong.
    """

    origin: str
    messages: list[dict[str, Any]]
    reference: str
    base_answer: str
    tuned_answer: str
    change: Change | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Both sides, and how sure their difference is.

    Attributes:
        base, tuned: the results of each.
        intervals: metric name, `loss` or `token_accuracy` -> 95 % interval of `tuned - base`; none where rows are
            too few for one.
        task: what the expected answers look like.
        decided_by: the metric that calls an answer right: the first one that can, for this task, and that applies
            to any item; None: no metric can, and the loss leads.
        answers: every item with both answers, in the order of the items.
    """

    base: ModelScores
    tuned: ModelScores
    intervals: dict[str, Interval]
    task: Task
    decided_by: str | None
    answers: list[AnsweredItem]

    def changed(self, change: Change) -> list[AnsweredItem]:
        """The items that improved, or those that worsened."""
        return [item for item in self.answers if item.change == change]

    def num_rows(self, name: str) -> int:
        """How many rows stand behind a figure."""
        if name in self.base.scores:
            return sum(score is not None for score in self.base.scores[name])
        return sum(num_tokens > 0 for _, num_tokens, _ in self.base.loss.per_row)


def score_loss(
    model: nn.Module,
    rows: Sequence[Any],
    *,
    collate: Collate,
    batch_size: int,
    progress: Advance | None = None,
) -> LossScores:
    """Loss, perplexity and token accuracy on the trained tokens of the rows.

    Args:
        model: a causal language model of transformers, plain or as a PeftModel.
        rows: objects or mappings with `input_ids` and `labels` (-100 where nothing is learned).
        collate: pads rows into a batch, one batch row for each, or shares their common starts
            (`SharedPrefixCollator`), which scores many answers to one prompt at little more than one prompt's cost.
        batch_size: rows at once; the longest rows come first, with sharing rows that begin alike come together.
        progress: called with the number of rows done.

    Raises:
        DataError: no row has a trained token.
    """
    shared = isinstance(collate, SharedPrefixCollator)
    order = sorted(
        range(len(rows)),
        key=lambda index: (
            list(_field(rows[index], "input_ids")) if shared else -len(_field(rows[index], "input_ids"))
        ),
    )
    per_row: list[RowLoss] = [(0.0, 0, 0)] * len(rows)
    with evaluating(model), torch.no_grad():
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            members = [rows[index] for index in indices]
            losses = _row_losses(model, collate(members), [_field(row, "labels") for row in members])
            for index, row_loss in zip(indices, losses, strict=True):
                per_row[index] = row_loss
            if progress:
                progress(len(indices))
    return _summed(per_row)


def score_model(
    model: nn.Module,
    rows: Sequence[Any],
    items: Sequence[EvaluationItem],
    *,
    metrics: Mapping[str, Metric],
    generate: Generate,
    decode: Decode,
    collate: Collate,
    batch_size: int,
    progress: Advance | None = None,
) -> ModelScores:
    """Score the rows and answer the items with the model as it stands.

    Args:
        rows, collate, batch_size, progress: as in `score_loss`.
        items: the prompts to answer; none: loss only.
        metrics: what `resolve_metrics` returns.
        generate: model and prompts -> the new tokens of each; called once with all prompts.
        decode: new tokens -> answer.
    """
    loss = score_loss(model, rows, collate=collate, batch_size=batch_size, progress=progress)
    if not items:
        return ModelScores(loss=loss, metrics=dict.fromkeys(metrics))
    with evaluating(model), torch.no_grad():
        answers = [decode(ids) for ids in generate(model, [list(item.prompt_ids) for item in items])]
    scores = {
        name: [metric(answer, item.reference) for answer, item in zip(answers, items, strict=True)]
        for name, metric in metrics.items()
    }
    means = {name: _mean_of_applicable(values) for name, values in scores.items()}
    return ModelScores(loss=loss, answers=answers, scores=scores, metrics=means)


def compare(
    base: ModelScores, tuned: ModelScores, items: Sequence[EvaluationItem], *, seed: int = 0
) -> Comparison:
    """Lay the results of two models on the same rows and items beside each other."""
    task = task_of([item.reference for item in items])
    pairs = {
        name: applicable
        for name in base.scores
        if (applicable := _applicable_pairs(base.scores[name], tuned.scores[name]))
    }
    intervals = {name: paired_interval(*scores, seed=seed) for name, scores in pairs.items()}
    intervals |= _loss_intervals(base.loss, tuned.loss, seed=seed)
    decided_by = next((name for name in pairs if task.judges(name)), None)
    return Comparison(
        base=base,
        tuned=tuned,
        intervals={name: interval for name, interval in intervals.items() if interval},
        task=task,
        decided_by=decided_by,
        answers=_answered(base, tuned, items, decided_by),
    )


def _field(row: Any, name: str) -> Sequence[int]:
    values: Sequence[int] = row[name] if isinstance(row, Mapping) else getattr(row, name)
    return values


def _row_losses(model: nn.Module, batch: dict[str, Any], labels: Sequence[Sequence[int]]) -> list[RowLoss]:
    device = next(model.parameters()).device
    batch = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
    }
    losses, correct, _ = token_losses(model, batch)
    targets, _ = targets_and_weights(batch)
    # A long row's sum would lose digits in float32.
    losses_at = torch.zeros(targets.shape, dtype=torch.float64)
    correct_at = torch.zeros(targets.shape, dtype=torch.bool)
    trained = (targets != IGNORED).cpu()
    losses_at[trained], correct_at[trained] = losses.double().cpu(), correct.cpu()
    sums = []
    for positions in _predictors(batch, labels):
        sums.append((losses_at[positions].sum().item(), len(positions[1]), int(correct_at[positions].sum())))
    return sums


def _predictors(batch: Mapping[str, Any], labels: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[int]]]:
    """Where each row's trained tokens are predicted: (row of the batch, positions in it)."""
    for number, row in enumerate(labels):
        trained = [place - 1 for place, label in enumerate(row) if place and label != IGNORED]
        if "segments" in batch:
            path = batch["segments"].paths[number]
            yield 0, [path[place] for place in trained]
        else:
            yield number, trained


def _summed(per_row: list[RowLoss]) -> LossScores:
    num_tokens = sum(row[1] for row in per_row)
    if not num_tokens:
        raise DataError(
            f"None of the {len(per_row)} held-out rows has a trained token",
            fix="check the rows with `phlora data check` and `phlora data preview`",
        )
    loss = sum(row[0] for row in per_row) / num_tokens
    return LossScores(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        token_accuracy=sum(row[2] for row in per_row) / num_tokens,
        num_tokens=num_tokens,
        per_row=per_row,
    )


def _mean_of_applicable(values: Sequence[float | None]) -> float | None:
    scores = [value for value in values if value is not None]
    return sum(scores) / len(scores) if scores else None


def _applicable_pairs(
    base: Sequence[float | None], tuned: Sequence[float | None]
) -> tuple[list[float], list[float]] | None:
    pairs = [(b, t) for b, t in zip(base, tuned, strict=True) if b is not None and t is not None]
    return ([b for b, _ in pairs], [t for _, t in pairs]) if pairs else None


def _loss_intervals(base: LossScores, tuned: LossScores, *, seed: int) -> dict[str, Interval | None]:
    """Rows are drawn whole, each weighing as many tokens as it has: tokens of one row are not independent."""
    rows = [(b, t) for b, t in zip(base.per_row, tuned.per_row, strict=True) if b[1]]
    tokens = [b[1] for b, _ in rows]
    return {
        name: paired_interval(
            [b[column] / b[1] for b, _ in rows],
            [t[column] / t[1] for _, t in rows],
            weights=tokens,
            is_share=name == "token_accuracy",
            seed=seed,
        )
        for name, column in (("loss", 0), ("token_accuracy", 2))
    }


def _answered(
    base: ModelScores, tuned: ModelScores, items: Sequence[EvaluationItem], decided_by: str | None
) -> list[AnsweredItem]:
    if not base.answers:
        return []
    nothing: list[float | None] = [None] * len(items)
    before, after = (side.scores[decided_by] if decided_by else nothing for side in (base, tuned))
    return [
        AnsweredItem(
            origin=str(item.origin),
            messages=[dict(message) for message in item.messages or ()],
            reference=item.reference,
            base_answer=base.answers[index],
            tuned_answer=tuned.answers[index],
            change=_change(before[index], after[index]),
        )
        for index, item in enumerate(items)
    ]


def _change(before: float | None, after: float | None) -> Change | None:
    if before is None or after is None:
        return None
    was_right, is_right = before >= PASSING_SCORE, after >= PASSING_SCORE
    if was_right == is_right:
        return None
    return "improved" if is_right else "worsened"
