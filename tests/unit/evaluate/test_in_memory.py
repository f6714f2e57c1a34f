"""`evaluate_model`: what a script has in memory is compared as a run is."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from phlora import evaluate_model
from phlora.display import Display
from phlora.errors import ConfigError
from phlora.testing import tiny_phi3

QUIET = Display(quiet=True)
ROWS = [
    {"conversations": [{"from": "human", "value": f"say {i}"}, {"from": "gpt", "value": f"yes {i} नमस्ते"}]}
    for i in range(12)
]


def with_adapter(model: Any) -> PeftModel:
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, settings)


def compare(model: Any, tokenizer: Any, **changes: Any) -> Any:
    settings: dict[str, Any] = {"max_answers": 3, "max_new_tokens": 4, "display": QUIET, **changes}
    return evaluate_model(model, tokenizer, ROWS, **settings).comparison


@pytest.fixture(scope="module")
def compared() -> Any:
    model, tokenizer = tiny_phi3()
    model = with_adapter(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    comparison = compare(model, tokenizer)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    return comparison


def test_the_losses_are_those_of_transformers(compared: Any) -> None:
    model, tokenizer = tiny_phi3()
    model = with_adapter(model).eval()

    def loss_of(row: dict[str, Any]) -> tuple[float, int]:
        chat = [{"role": "user", "content": row["conversations"][0]["value"]}]
        answer = {"role": "assistant", "content": row["conversations"][1]["value"]}
        start = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        text = tokenizer.apply_chat_template([*chat, answer], return_dict=False)
        ids = torch.tensor([text])
        labels = ids.clone()
        labels[0, : len(start)] = -100
        num_tokens = int((labels != -100).sum())
        with torch.no_grad():
            return float(model(ids, labels=labels).loss) * num_tokens, num_tokens

    for side in ("base", "tuned"):
        if side == "base":
            with model.disable_adapter():
                sums = [loss_of(row) for row in ROWS]
        else:
            sums = [loss_of(row) for row in ROWS]
        scores = getattr(compared, side).loss
        assert scores.num_tokens == sum(number for _, number in sums)
        assert scores.loss == pytest.approx(sum(s for s, _ in sums) / scores.num_tokens, rel=1e-5)


def test_a_model_trained_as_a_whole_is_compared_with_its_base(compared: Any) -> None:
    model, tokenizer = tiny_phi3()
    base, _ = tiny_phi3()
    tuned = with_adapter(model).merge_and_unload()
    comparison = compare(tuned, tokenizer, base=base)
    for side in ("base", "tuned"):
        ours, theirs = getattr(comparison, side), getattr(compared, side)
        assert ours.loss.loss == pytest.approx(theirs.loss.loss, rel=1e-5)
        assert ours.answers == theirs.answers


def test_it_says_which_base_is_missing() -> None:
    model, tokenizer = tiny_phi3()
    with pytest.raises(ConfigError, match="has no adapter that could be switched off"):
        compare(model, tokenizer)


def test_functions_are_metrics_and_the_tokenizer_stays() -> None:
    model, tokenizer = tiny_phi3()
    tokenizer.pad_token = tokenizer.eos_token

    def same_length(prediction: str, reference: str) -> float:
        return float(len(prediction) == len(reference))

    comparison = compare(with_adapter(model), tokenizer, metrics=["exact_match", same_length])
    assert set(comparison.base.scores) == {"exact_match", "same_length"}
    assert tokenizer.pad_token == tokenizer.eos_token


def test_it_is_shown_where_it_stands() -> None:
    model, tokenizer = tiny_phi3()
    shown = io.StringIO()
    report = evaluate_model(
        with_adapter(model), tokenizer, ROWS, max_answers=0, display=Display(stream=shown)
    )
    assert "held-out rows" in report.summary()
    assert report.title == "Phi3ForCausalLM"


def _length(answer: str, reference: str) -> float:
    return 0.5


def exact_match(answer: str, reference: str) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ([5], "`5` was given"),
        (5, "`5` was given"),
        (None, "`None` was given"),
        ({"rouge_l": 1}, "was given"),
        ("rogue_l", "did you mean `rouge_l`"),
        ([_length, _length], "Two metrics are called `_length`"),
        ([lambda a, b: 1.0, lambda a, b: 0.0], "Two metrics are called `<lambda>`"),
        (["exact_match", exact_match], "Two metrics are called `exact_match`"),
    ],
    ids=[
        "number in a list",
        "number",
        "nothing",
        "mapping",
        "typo",
        "twice",
        "lambdas",
        "a function named as another",
    ],
)
def test_no_metric_is_left_out_without_a_word(metrics: Any, said: str) -> None:
    model, tokenizer = tiny_phi3()
    with pytest.raises(ConfigError, match=said):
        compare(with_adapter(model), tokenizer, metrics=metrics)


@pytest.mark.parametrize("metrics", ["rouge_l", _length], ids=["name", "function"])
def test_one_metric_needs_no_list(metrics: Any) -> None:
    model, tokenizer = tiny_phi3()
    found = compare(with_adapter(model), tokenizer, metrics=metrics)
    assert list(found.tuned.metrics) == ["rouge_l" if metrics == "rouge_l" else "_length"]
