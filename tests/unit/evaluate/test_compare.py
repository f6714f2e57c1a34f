from __future__ import annotations

import math

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    Phi3Config,
    Phi3ForCausalLM,
)

from phlora.errors import DataError
from phlora.evaluate.compare import (
    Comparison,
    EvaluationItem,
    LossScores,
    ModelScores,
    compare,
    score_loss,
    score_model,
)
from phlora.evaluate.metrics import resolve_metrics
from phlora.testing.models import TINY_SIZES

VOCABULARY = 61
SMALL = dict(TINY_SIZES, vocab_size=VOCABULARY, pad_token_id=0, initializer_range=0.2)


@pytest.fixture(scope="module")
def model() -> peft.PeftModel:
    torch.manual_seed(0)
    config = Phi3Config(max_position_embeddings=64, original_max_position_embeddings=64, **SMALL)
    model = peft.get_peft_model(
        Phi3ForCausalLM(config), peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def rows_of(lengths: list[int]) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(4)
    rows = []
    for length in lengths:
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return rows


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (length - len(r["input_ids"])) for r in rows])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


def item(number: int, reference: str) -> EvaluationItem:
    return EvaluationItem(
        prompt_ids=[number],
        reference=reference,
        messages=[{"role": "user", "content": f"question {number}"}],
        origin=f"chats.jsonl:{number}",
    )


def side(answers: list[str], items: list[EvaluationItem], *names: str, loss: float = 1.0) -> ModelScores:
    scores = {
        name: [metric(answer, item.reference) for answer, item in zip(answers, items, strict=True)]
        for name, metric in resolve_metrics(names or ["exact_match"]).items()
    }
    per_row = [(loss * 4, 4, 2)] * len(items)
    losses = LossScores(
        loss=loss,
        perplexity=math.exp(loss),
        token_accuracy=0.5,
        num_tokens=4 * len(items),
        per_row=per_row,
    )
    means = {}
    for name, values in scores.items():
        known = [value for value in values if value is not None]
        means[name] = sum(known) / len(known) if known else None
    return ModelScores(loss=losses, answers=answers, scores=scores, metrics=means)


class TestScoreLoss:
    @pytest.mark.parametrize("batch_size", [1, 2, 8])
    def test_equals_transformers_on_each_row(self, model, batch_size) -> None:
        rows = rows_of([5, 9, 3, 12])
        scores = score_loss(model, rows, collate=collate, batch_size=batch_size)
        model.eval()
        for row, (loss_sum, num_tokens, num_correct) in zip(rows, scores.per_row, strict=True):
            with torch.no_grad():
                out = model(**collate([row]))
            assert num_tokens == len(row["input_ids"]) - 2
            assert loss_sum / num_tokens == pytest.approx(out.loss.item(), rel=1e-5)
            hits = out.logits[0, 1:-1].argmax(-1) == torch.tensor(row["labels"][2:])
            assert num_correct == int(hits.sum())
        assert scores.num_tokens == 21
        assert scores.loss == pytest.approx(sum(row[0] for row in scores.per_row) / 21)
        assert scores.perplexity == pytest.approx(math.exp(scores.loss))
        assert scores.token_accuracy == sum(row[2] for row in scores.per_row) / 21

    def test_reads_objects_and_reports_progress(self, model) -> None:
        class Row:
            def __init__(self, row: dict[str, list[int]]) -> None:
                self.input_ids, self.labels = row["input_ids"], row["labels"]

        done = []
        rows = rows_of([4, 6, 5])
        scores = score_loss(
            model,
            [Row(row) for row in rows],
            collate=lambda batch: collate([vars(row) for row in batch]),
            batch_size=2,
            progress=done.append,
        )
        assert done == [2, 1]
        assert [row[1] for row in scores.per_row] == [2, 4, 3]

    def test_leaves_the_mode_and_the_gradients_alone(self, model) -> None:
        model.train()
        first = score_loss(model, rows_of([8, 8]), collate=collate, batch_size=2)
        assert model.training and torch.is_grad_enabled()
        # With dropout two passes would differ.
        assert first == score_loss(model, rows_of([8, 8]), collate=collate, batch_size=2)
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_a_row_without_trained_tokens_counts_for_nothing(self, model) -> None:
        rows = rows_of([6, 7])
        bare = {"input_ids": [1, 2, 3], "labels": [-100] * 3}
        with_bare = score_loss(model, [rows[0], bare, rows[1]], collate=collate, batch_size=3)
        assert with_bare.per_row[1] == (0.0, 0, 0)
        assert with_bare.loss == pytest.approx(
            score_loss(model, rows, collate=collate, batch_size=2).loss, rel=1e-6
        )

    @pytest.mark.parametrize("rows", [[], [{"input_ids": [1, 2], "labels": [-100, -100]}]])
    def test_nothing_to_score(self, model, rows) -> None:
        with pytest.raises(DataError, match=f"None of the {len(rows)} held-out rows"):
            score_loss(model, rows, collate=collate, batch_size=2)


def compare_adapter(model, rows, items, **how) -> Comparison:
    with model.disable_adapter():
        base = score_model(model, rows, items, **how)
    return compare(base, score_model(model, rows, items, **how), items)


def test_a_model_is_scored_as_it_stands(model) -> None:
    items = [item(1, "left"), item(2, "right")]
    seen = []

    def generate(given: peft.PeftModel, prompts: list[list[int]]) -> list[list[int]]:
        disabled = given.base_model.model.model.layers[0].mlp.down_proj.disable_adapters
        seen.append((disabled, given.training, torch.is_grad_enabled(), prompts))
        return [[0] if disabled else prompt for prompt in prompts]

    comparison = compare_adapter(
        model,
        rows_of([6, 9]),
        items,
        metrics=resolve_metrics(["exact_match", "json_valid"]),
        generate=generate,
        decode=lambda ids: ["wrong", "left", "right"][ids[0]],
        collate=collate,
        batch_size=2,
    )
    assert seen == [(True, False, False, [[1], [2]]), (False, False, False, [[1], [2]])]
    assert comparison.base.answers == ["wrong", "wrong"]
    assert comparison.base.metrics == {"exact_match": 0.0, "json_valid": None}
    assert comparison.tuned.metrics == {"exact_match": 1.0, "json_valid": None}
    assert comparison.base.loss.loss != comparison.tuned.loss.loss
    with model.disable_adapter():
        assert comparison.base.loss == score_loss(model, rows_of([6, 9]), collate=collate, batch_size=2)
    # Two rows are too few for an interval of the loss.
    assert set(comparison.intervals) == {"exact_match"}


def test_the_loss_interval_weighs_rows_by_their_tokens(model) -> None:
    rows = rows_of([6, 9, 12, 4, 5, 7, 8, 10, 11, 13])
    with model.disable_adapter():
        base = score_model(
            model, rows, [], metrics={}, generate=None, decode=None, collate=collate, batch_size=4
        )
    tuned = score_model(
        model, rows, [], metrics={}, generate=None, decode=None, collate=collate, batch_size=4
    )
    comparison = compare(base, tuned, [])
    assert set(comparison.intervals) == {"loss", "token_accuracy"}
    assert comparison.intervals["loss"].mean_difference == pytest.approx(tuned.loss.loss - base.loss.loss)


def test_without_items_only_the_loss_is_compared(model) -> None:
    def generate(*_: object) -> list[list[int]]:
        raise AssertionError("there is nothing to generate")

    comparison = compare_adapter(
        model,
        rows_of([6, 9]),
        [],
        metrics=resolve_metrics(["exact_match"]),
        generate=generate,
        decode=str,
        collate=collate,
        batch_size=2,
    )
    assert comparison.tuned.metrics == {"exact_match": None}
    assert comparison.decided_by is None
    assert comparison.answers == []


class TestCompare:
    def test_flips_in_each_direction_with_their_texts(self) -> None:
        items = [item(1, "روشن"), item(2, "b"), item(3, "c"), item(4, "d")]
        base = side(["x", "b", "c", "y"], items)
        tuned = side(["روشن", "z", "c", "y"], items)
        comparison = compare(base, tuned, items)
        (improved,), (worsened,) = comparison.changed("improved"), comparison.changed("worsened")
        assert (improved.origin, improved.base_answer, improved.tuned_answer) == (
            "chats.jsonl:1",
            "x",
            "روشن",
        )
        assert improved.messages == [{"role": "user", "content": "question 1"}]
        assert (worsened.origin, worsened.reference, worsened.tuned_answer) == ("chats.jsonl:2", "b", "z")
        assert comparison.intervals["exact_match"].mean_difference == 0
        interval = comparison.intervals["exact_match"]
        assert interval.low <= 0 <= interval.high
        assert [answer.change for answer in comparison.answers] == ["improved", "worsened", None, None]

    def test_the_first_metric_that_applies_and_can_tell_right_from_wrong_decides(self) -> None:
        items = [item(1, "plain"), item(2, "words")]
        names = ("json_equal", "rouge_1", "contains:plain", "exact_match")
        base = side(["no", "plain words"], items, *names)
        tuned = side(["plain text", "nothing"], items, *names)
        comparison = compare(base, tuned, items)
        assert comparison.decided_by == "contains:plain"
        assert [answer.origin for answer in comparison.changed("improved")] == ["chats.jsonl:1"]
        assert [answer.origin for answer in comparison.changed("worsened")] == ["chats.jsonl:2"]
        assert "json_equal" not in comparison.intervals

    def test_open_text_is_not_judged_by_equality(self) -> None:
        essay = "The parcel left our store on Monday and will reach you within three working days. " * 3
        items = [item(number, essay) for number in range(3)]
        names = ("exact_match", "rouge_l")
        comparison = compare(side(["no"] * 3, items, *names), side([essay] * 3, items, *names), items)
        assert comparison.task.kind == "open" and comparison.decided_by is None
        assert [answer.change for answer in comparison.answers] == [None] * 3
        assert comparison.tuned.metrics == {"exact_match": 1.0, "rouge_l": 1.0}

    def test_rows_that_a_metric_does_not_apply_to_are_not_counted(self) -> None:
        items = [item(1, "{}"), item(2, "plain")]
        base = side(["{", "plain"], items, "json_valid")
        tuned = side(["{}", "plain"], items, "json_valid")
        comparison = compare(base, tuned, items)
        assert comparison.num_rows("json_valid") == 1
        assert comparison.num_rows("loss") == 2
        assert comparison.intervals["json_valid"].mean_difference == 1

    def test_items_without_messages(self) -> None:
        bare = EvaluationItem(prompt_ids=[1], reference="a", messages=None, origin=None)
        comparison = compare(side(["b"], [bare]), side(["a"], [bare]), [bare])
        assert comparison.changed("improved")[0].messages == []


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(head_dim=8, final_logit_softcapping=0.5, **SMALL),
        GraniteConfig(logits_scaling=8.0, **SMALL),
        CohereConfig(logit_scale=0.25, **SMALL),
    ],
    ids=["gemma2", "granite", "cohere"],
)
def test_the_loss_of_a_model_that_changes_its_logits_is_that_of_its_logits(config) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    rows = rows_of([7, 12, 9])
    found = score_loss(model, rows, collate=collate, batch_size=2)
    expected = []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0].double()
        targets = torch.tensor(row["labels"])[1:]
        expected.append(torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum").item())
    assert [row[0] for row in found.per_row] == pytest.approx(expected, rel=1e-5)
