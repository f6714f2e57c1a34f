"""The chunked head against transformers' own loss."""

from __future__ import annotations

import peft
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Phi3Config, Phi3ForCausalLM

from phlora.errors import ModelError
from phlora.models.lm_head import (
    IGNORED,
    LossTerms,
    _losses_and_exponentials_,
    head_losses,
    token_losses,
    trained_tokens,
    trunk_and_head,
)
from phlora.testing import tiny_gemma2

VOCABULARY = 97
# float32 sums of a few dozen terms in another order.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


def tiny_model(**settings: object) -> Phi3ForCausalLM:
    torch.manual_seed(0)
    config = Phi3Config(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 64,
            "pad_token_id": 0,
            "initializer_range": 0.2,
            **settings,
        }
    )
    return Phi3ForCausalLM(config).eval()


def tiny_peft_model(**settings: object) -> peft.PeftModel:
    """LoRA with a non-zero B, so that the adapter counts."""
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=3, target_modules="all-linear", **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def padded_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (3, 11), generator=generator)
    mask = torch.tensor([[1] * 11, [1] * 7 + [0] * 4, [1] * 9 + [0] * 2])
    labels = ids.masked_fill(mask == 0, IGNORED)
    # The first row trains its first token, which nothing predicts; the second has gaps.
    labels[1, :3] = IGNORED
    labels[1, 4] = IGNORED
    labels[2, :6] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def lora_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("make", [tiny_model, tiny_peft_model])
@pytest.mark.parametrize("chunk", [None, 1, 4, 1000])
def test_mean_loss_equals_transformers(make, chunk) -> None:
    model, batch = make(), padded_batch()
    with torch.no_grad():
        expected = model(**batch)
        losses, correct, weights = token_losses(model, batch, chunk=chunk)
    torch.testing.assert_close(losses.mean(), expected.loss, **TOLERANCE)
    trained = batch["labels"][:, 1:] != IGNORED
    hits = expected.logits[:, :-1].argmax(-1)[trained] == batch["labels"][:, 1:][trained]
    assert torch.equal(correct, hits)
    assert torch.equal(weights, torch.ones(len(losses)))


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}], ids=["frozen", "trained"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_gradients_equal_transformers(settings, chunk) -> None:
    model, batch = tiny_peft_model(**settings), padded_batch()
    model(**batch).loss.backward()
    expected = lora_gradients(model)
    token_losses(model, batch, chunk=chunk)[0].mean().backward()
    actual = lora_gradients(model)
    assert actual.keys() == expected.keys()
    assert ("lm_head" in " ".join(actual)) == bool(settings)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, **TOLERANCE, msg=name)


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}], ids=["frozen", "trained"])
@pytest.mark.parametrize(
    "terms", [LossTerms(label_smoothing=0.2), LossTerms(z_loss=0.01), LossTerms(0.1, 0.003)], ids=str
)
def test_label_smoothing_and_z_loss_equal_their_formulas(terms, settings) -> None:
    model, batch = tiny_peft_model(**settings).double(), padded_batch()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), label_smoothing=terms.label_smoothing, reduction="none"
    )
    expected = (expected + terms.z_loss * logits.logsumexp(-1).flatten().square())[
        targets.flatten() != IGNORED
    ]
    expected.mean().backward()
    expected_gradients = lora_gradients(model)
    losses, _, _ = token_losses(model, batch, chunk=5, terms=terms)
    losses.mean().backward()
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    for name, gradient in lora_gradients(model).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-10, atol=1e-12, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(
            token_losses(model, batch, terms=terms)[0], expected, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("how", ["frozen", "biased", "trained", "evaluated"])
@pytest.mark.parametrize("terms", [LossTerms(), LossTerms(0.1, 0.003)], ids=str)
def test_entropies_are_those_of_the_predictions(terms, how) -> None:
    model, batch = (
        tiny_peft_model(**({"modules_to_save": ["lm_head"]} if how == "trained" else {})),
        padded_batch(),
    )
    if how == "biased":
        bias = torch.randn(model.config.vocab_size, generator=torch.Generator().manual_seed(1))
        model.get_base_model().lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    model = model.double()
    with torch.set_grad_enabled(how != "evaluated"):
        tokens = trained_tokens(model, batch, chunk=5, terms=terms, entropy=True)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = torch.distributions.Categorical(logits=logits[batch["labels"][:, 1:] != IGNORED]).entropy()
    torch.testing.assert_close(tokens.entropies, expected.detach(), rtol=1e-10, atol=1e-10)
    assert not tokens.entropies.requires_grad
    assert trained_tokens(model, batch, terms=terms).entropies is None


def test_gradient_follows_the_weight_of_each_token() -> None:
    model, batch = tiny_peft_model(), padded_batch()
    batch["loss_weights"] = torch.rand(3, 11, generator=torch.Generator().manual_seed(2))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    reference = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
    )
    (reference * batch["loss_weights"][:, 1:].flatten()).mean().backward()
    expected = lora_gradients(model)
    losses, _, weights = token_losses(model, batch, chunk=5)
    ((losses * weights).sum() / len(reference)).backward()
    for name, gradient in lora_gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], **TOLERANCE, msg=name)


def test_disabled_adapter_is_the_base_model() -> None:
    base, tuned, batch = tiny_model(), tiny_peft_model(), padded_batch()
    with torch.no_grad():
        expected = token_losses(base, batch)[0]
        assert not torch.allclose(token_losses(tuned, batch)[0], expected, atol=1e-3)
        with tuned.disable_adapter():
            assert torch.equal(token_losses(tuned, batch)[0], expected)


def test_packed_rows_do_not_see_each_other() -> None:
    model = tiny_model()
    first, second = torch.arange(1, 8), torch.arange(20, 29)
    alone = [
        token_losses(model, {"input_ids": row[None], "labels": row[None]})[0].detach()
        for row in (first, second)
    ]
    ids = torch.cat([first, second])[None]
    labels = ids.clone()
    labels[0, len(first)] = IGNORED
    positions = torch.cat([torch.arange(len(first)), torch.arange(len(second))])[None]
    packed = token_losses(model, {"input_ids": ids, "labels": labels, "position_ids": positions})[0]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_logits_never_exist_for_all_positions(training) -> None:
    model, batch = tiny_peft_model(), padded_batch()
    sizes = []
    handle = trunk_and_head(model)[1].register_forward_hook(lambda *call: sizes.append(len(call[2])))
    with torch.set_grad_enabled(training):
        losses = token_losses(model, batch, chunk=4)[0]
        if training:
            losses.sum().backward()
    handle.remove()
    assert max(sizes) == 4 and sum(sizes) == len(losses) < batch["labels"].numel()


def test_no_trained_token_gives_no_loss_and_a_zero_gradient() -> None:
    model, batch = tiny_peft_model(), padded_batch()
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    with torch.no_grad():
        assert [len(part) for part in token_losses(model, batch)] == [0, 0, 0]
    token_losses(model, batch)[0].sum().backward()
    assert all(not gradient.any() for gradient in lora_gradients(model).values())


def test_bfloat16_losses_are_float32_and_close() -> None:
    model, batch = tiny_peft_model().to(torch.bfloat16), padded_batch()
    losses = token_losses(model, batch, chunk=4)[0]
    assert losses.dtype == torch.float32
    losses.mean().backward()
    reference = model(**batch).loss
    torch.testing.assert_close(losses.mean(), reference, rtol=1e-3, atol=1e-3)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ModelError, match="no language-model head"):
        trunk_and_head(tiny_model().model)


def test_a_model_that_scales_its_logits_is_refused() -> None:
    model = tiny_model()
    model.config.logits_scaling = 8.0
    with pytest.raises(ModelError, match="logits_scaling = 8.0"):
        trunk_and_head(model)


def test_second_derivatives_of_the_fused_loss_are_an_error_and_first_ones_stay() -> None:
    model, batch = tiny_peft_model(), padded_batch()
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(token_losses(model, batch)[0].sum(), parameters)
    first = torch.autograd.grad(token_losses(model, batch)[0].sum(), parameters, create_graph=True)
    torch.testing.assert_close(first, expected)
    with pytest.raises(RuntimeError, match="The loss of trained tokens cannot be differentiated twice"):
        first[-1].sum().backward()


def test_forward_mode_follows_the_formula() -> None:
    model = tiny_model().requires_grad_(False)
    hidden = torch.randn(5, 32)
    targets = torch.arange(5)

    def losses(hidden: torch.Tensor) -> torch.Tensor:
        return head_losses(model.lm_head, hidden, targets, 2, LossTerms())[0]

    _, tangents = torch.func.jvp(losses, (hidden,), (hidden,))
    leaf = hidden.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(losses(leaf).sum(), leaf)
    torch.testing.assert_close(tangents, (slopes * hidden).sum(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_model_that_changes_its_logits_is_scored_by_its_own(adapted: bool) -> None:
    model = tiny_gemma2(vocab_size=VOCABULARY)
    if adapted:
        model = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules="all-linear")).eval()
    batch = padded_batch()
    with torch.no_grad():
        found = trained_tokens(model, batch)
        expected = model(**batch).loss
    torch.testing.assert_close(found.loss, expected, **TOLERANCE)
    torch.testing.assert_close(found.losses.mean(), expected, **TOLERANCE)
    assert len(found.losses) == int((batch["labels"][:, 1:] != IGNORED).sum())


@pytest.mark.parametrize("most", [1, 3, 50])
def test_of_equally_likely_tokens_the_first_counts_as_with_argmax(most: int) -> None:
    """Logits of a model in 16 bits are often equal, and those of an untrained head all are."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, most, (400, 23), generator=generator).float()
    logits[0] = float("nan")
    targets = torch.randint(0, 23, (400, 1), generator=generator)
    expected = logits.argmax(-1) == targets.squeeze(-1)
    expected[0] = False
    _, correct, _ = _losses_and_exponentials_(logits.clone(), targets, LossTerms())
    assert torch.equal(correct, expected) and correct.any()


def test_the_loss_of_tensors_without_numbers_has_its_shape() -> None:
    """A forecast asks for no more."""
    with FakeTensorMode():
        losses, correct, log_sums = _losses_and_exponentials_(
            torch.empty(5, 23), torch.empty(5, 1, dtype=torch.long), LossTerms()
        )
    assert losses.shape == correct.shape == (5,) and log_sums.shape == (5, 1)
