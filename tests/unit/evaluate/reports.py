"""Comparisons built by hand, and reports of them."""

from __future__ import annotations

import math

from phlora.evaluate.compare import Comparison, EvaluationItem, LossScores, ModelScores, compare
from phlora.evaluate.metrics import resolve_metrics
from phlora.evaluate.report import Report

LANGUAGES = {
    "persian": "چراغ آشپزخانه را روشن کن",
    "hindi": "रसोई की बत्ती जलाओ",
    "serbian": "Упали светло у кухињи, važi?",
    "turkish": "Mutfak ışığını aç, şimdi",
    "vietnamese": "Bật đèn nhà bếp giùm tôi",
}


def side(answers: list[str], references: list[str], *names: str, losses: list[float]) -> ModelScores:
    scores = {
        name: [metric(answer, reference) for answer, reference in zip(answers, references, strict=True)]
        for name, metric in resolve_metrics(names).items()
    }
    means = {}
    for name, values in scores.items():
        known = [value for value in values if value is not None]
        means[name] = sum(known) / len(known) if known else None
    loss = sum(losses) / len(losses)
    return ModelScores(
        loss=LossScores(
            loss=loss,
            perplexity=math.exp(loss) if loss < 700 else math.inf,
            token_accuracy=0.5,
            num_tokens=4 * len(losses),
            per_row=[(4 * value, 4, 2) for value in losses],
        ),
        answers=answers,
        scores=scores,
        metrics=means,
    )


def comparison_of(
    base: list[str],
    tuned: list[str],
    references: list[str],
    *names: str,
    questions: list[str] | None = None,
    base_loss: float = 2.0,
    tuned_loss: float = 0.5,
) -> Comparison:
    items = [
        EvaluationItem(
            prompt_ids=[1],
            reference=reference,
            messages=[
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": questions[index] if questions else f"question {index}"},
            ],
            origin=f"heldout.jsonl:{index + 1}",
        )
        for index, reference in enumerate(references)
    ]
    names = names or ("exact_match", "json_valid")
    wave = [0.01 * (index % 3) for index in range(len(references))]
    before = side(base, references, *names, losses=[base_loss + x for x in wave])
    after = side(tuned, references, *names, losses=[tuned_loss + 2 * x for x in wave])
    return compare(before, after, items)


def improved(right: int = 45, total: int = 50) -> Comparison:
    return comparison_of(["no"] * total, ["yes"] * right + ["no"] * (total - right), ["yes"] * total)


def report_of(comparison: Comparison, **facts: object) -> Report:
    return Report(**{"title": "runs/demo", "comparison": comparison, **facts})
