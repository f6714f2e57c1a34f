"""The language-model head on trained positions only, and the loss of each of them.

Legend: `B` rows, `T` tokens, `D` model width, `V` vocabulary, `S` trained tokens of a batch.

A causal model predicts token `t + 1` from the hidden state at `t`, and the loss asks only for the predictions of
trained tokens. So the trunk runs on the whole batch (but for the end of its last layer, see `models.speed`), the `S`
hidden states that predict a trained token are gathered, and the head runs on those, a chunk at a time: the logits that
exist at once are `(chunk, V)` and never `(B, T, V)`, which for Phi-4-mini's vocabulary would be 0.8 MB a token. Values
and gradients are those of transformers' own loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

from phlora.data.table import IGNORED
from phlora.errors import ModelError
from phlora.lora.autograd import first_derivatives_only, sees_through
from phlora.lora.frozen import is_plain_linear
from phlora.lora.operands import DenseWeight, FrozenWeight
from phlora.models.causal_lm import Decoder
from phlora.models.operands import frozen_weight, is_operand
from phlora.models.prefix_attention import segment_inputs
from phlora.models.rotary import rotated_by_row

# fp32 logits that may exist at once when the caller names no chunk.
_CHUNK_BYTES = 64 << 20
_NOT_FOR_THE_TRUNK = ("labels", "shift_labels", "loss_weights", "rows", "num_tokens")
# What some families do to logits after the head (TRL 1.16's list); none of it happens here.
_AFTER_THE_HEAD = {
    "final_logit_softcapping": None,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "output_multiplier": 1.0,
    "lm_head_multiplier": 1.0,
}


@dataclass(frozen=True)
class LossTerms:
    """What is asked of a token besides cross-entropy.

    With logits `z` over `V` tokens, target `y`, smoothing `e` and weight `c`:

        loss = log Σ exp z - (1 - e) · z_y - e · mean(z) + c · (log Σ exp z)²

    which is cross-entropy against `1 - e` on the target and `e / V` everywhere, and for `c` above 0 a pull of the
    normaliser towards 1 (z-loss: Chowdhery et al. 2022, PaLM, section 5).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0


_CROSS_ENTROPY = LossTerms()


@dataclass
class TrainedTokens(CausalLMOutputWithPast):
    """What a forward pass says of its S trained tokens, as an output of transformers: `loss` is set, `logits` never.

    In the order of the batch's rows, and of the positions within one.

    Args:
        loss: the weighted mean of the losses: ().
        losses: of each token (S,), in float32 or wider.
        correct: 1 where the token is the most likely one, else 0: (S,).
        weights: of each token (S,), 1 without `loss_weights`.
        entropies: `-Σ p log p` of each prediction (S,), without gradient; None unless asked for.
    """

    losses: Tensor | None = None
    correct: Tensor | None = None
    weights: Tensor | None = None
    entropies: Tensor | None = None


def why_not_by_token(model: nn.Module) -> str | None:
    """Why `token_losses` are not the model's own losses, as the rest of a sentence about it; None where they are."""
    lm = _without_adapter(model)
    if lm.get_output_embeddings() is None:
        return "has no language-model head"
    if lm.base_model is lm:
        return "has no trunk that runs without its head"
    config = lm.config.get_text_config()
    for name, neutral in _AFTER_THE_HEAD.items():
        value = getattr(config, name, None)
        if value not in (None, neutral):
            return f"changes its logits after the head ({name} = {value})"
    return None


def trunk_and_head(model: nn.Module) -> tuple[Decoder, nn.Module]:
    """The decoder without its head, and the head; for a PeftModel, both with its adapters active.

    Raises:
        ModelError: the model has no head of its own, or changes its logits after the head.
    """
    reason = why_not_by_token(model)
    lm = _without_adapter(model)
    if reason is not None:
        raise ModelError(
            f"{type(lm).__name__} {reason}",
            where=lm.config.model_type,
            expected="a causal language model of a Phi-3 or Llama layout, whose head has the last word",
        )
    return lm.base_model, lm.get_output_embeddings()


def _without_adapter(model: Any) -> Any:
    """The model of transformers in a PeftModel, with the adapter's layers in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def targets_and_weights(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """What each position is trained to predict: (B, T), -100 where nothing; and the weight of each, or None.

    A batch holds either `shift_labels` (B, T), with `loss_weights` aligned to them, or `labels` (B, T) aligned with
    the ids, with `loss_weights` aligned to those. Each row's first label is predicted by nothing.
    """
    weights = batch.get("loss_weights")
    if batch.get("shift_labels") is not None:
        return batch["shift_labels"], weights
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    return targets, None if weights is None else F.pad(weights[:, 1:], (0, 1))


def trained_weight(batch: Mapping[str, Any]) -> Tensor:
    """The weight of all tokens that a batch trains, the divisor of its loss: ()."""
    targets, weights = targets_and_weights(batch)
    trained = targets != IGNORED
    return trained.sum() if weights is None else (weights * trained).sum()


def token_losses(
    model: nn.Module, batch: Mapping[str, Any], *, chunk: int | None = None, terms: LossTerms = _CROSS_ENTROPY
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of each trained token: `-log softmax(head(h_t))[target_t]`, in float32 or wider.

    As `trained_tokens`: losses (S,), correct (S,) as bool, weights (S,).
    """
    tokens = trained_tokens(model, batch, chunk=chunk, terms=terms)
    assert tokens.losses is not None and tokens.correct is not None and tokens.weights is not None
    return tokens.losses, tokens.correct.bool(), tokens.weights


def trained_tokens(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    chunk: int | None = None,
    terms: LossTerms = _CROSS_ENTROPY,
    entropy: bool = False,
) -> TrainedTokens:
    """The loss of each trained token: `-log softmax(head(h_t))[target_t]`, in float32 or wider.

    Differentiable when gradients are enabled. A frozen plain head then runs once per chunk and keeps `(S, D)` for
    backward; any other head is recomputed in backward.

    Args:
        model: a causal language model of transformers, plain or as a PeftModel.
        batch: `input_ids`, and targets as `targets_and_weights` reads them; `segments` where rows share their first
            tokens. The rest (`attention_mask`, `position_ids`, ...) goes to the trunk.
        chunk: trained tokens whose logits exist at once; None: as many as fit into 64 MiB of float32.
        terms: label smoothing and z-loss; by default neither.
        entropy: whether that of each prediction is wanted too.
    """
    if not torch.is_grad_enabled() and batch.get("segments") is None and _changes_its_logits(model):
        return _from_all_logits(model, batch, terms, entropy=entropy)
    trunk, head = trunk_and_head(model)
    inputs = {name: value for name, value in batch.items() if name not in _NOT_FOR_THE_TRUNK}
    targets, weights = targets_and_weights(batch)
    trained = targets != IGNORED
    asked = trained.flatten().nonzero().squeeze(1).to(inputs["input_ids"].device)
    if _takes_asked(trunk) and len(asked):
        inputs["asked"] = asked
    if inputs.get("segments") is not None:
        inputs = segment_inputs(trunk, inputs)
    with rotated_by_row(trunk, inputs):
        # A cache would hide from transformers that packed rows are several.
        hidden = trunk(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    # A last layer that takes `asked` returns those alone.
    selected = hidden if len(hidden) == len(asked) else hidden[asked.to(hidden.device)]
    targets = targets[trained].to(hidden.device)
    rows = chunk or rows_of_a_chunk(_without_adapter(model).config.get_text_config().vocab_size)
    found = head_losses(head, selected, targets, rows, terms, entropy=entropy)
    return _as_output(found, None if weights is None else weights[trained])


def _changes_its_logits(model: nn.Module) -> bool:
    return why_not_by_token(model) is not None and _without_adapter(model).get_output_embeddings() is not None


def _from_all_logits(
    model: nn.Module, batch: Mapping[str, Any], terms: LossTerms, *, entropy: bool
) -> TrainedTokens:
    """The same from the logits of all positions, for a model whose head has not the last word."""
    inputs = {name: value for name, value in batch.items() if name not in _NOT_FOR_THE_TRUNK}
    targets, weights = targets_and_weights(batch)
    trained = targets != IGNORED
    logits = model(**inputs, use_cache=False).logits
    found = _chunk_losses(
        nn.Identity(), logits[trained.to(logits.device)], targets[trained].to(logits.device), terms, entropy
    )
    return _as_output(found, None if weights is None else weights[trained])


def _as_output(found: tuple[Tensor, Tensor, Tensor | None], weights: Tensor | None) -> TrainedTokens:
    """Losses, hits and entropies (S,) with their mean."""
    losses, correct, entropies = found
    weights = torch.ones_like(losses) if weights is None else weights.to(losses)
    mean = (losses * weights).sum() / weights.sum().clamp(min=1e-12)
    return TrainedTokens(
        loss=mean, losses=losses, correct=correct.to(losses), weights=weights, entropies=entropies
    )


def _takes_asked(trunk: Decoder) -> bool:
    layers = getattr(trunk, "layers", None) or [None]
    return bool(getattr(layers[-1], "takes_asked", False))


def rows_of_a_chunk(vocabulary: int) -> int:
    """Trained tokens whose logits exist at once where nobody says how many."""
    return max(1, _CHUNK_BYTES // (4 * vocabulary))


def head_losses(
    head: nn.Module, hidden: Tensor, targets: Tensor, chunk: int, terms: LossTerms, *, entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Losses, hits and entropies (S,) of hidden states (S, D) and their targets (S,)."""
    frozen = (is_plain_linear(head) or is_operand(head)) and not any(
        p.requires_grad for p in head.parameters()
    )
    if sees_through():
        return _chunk_losses(head, hidden, targets, terms, entropy)
    if frozen or not torch.is_grad_enabled():
        losses, correct, entropies = _HeadLosses.apply(  # type: ignore[no-untyped-call]
            hidden, targets, head, chunk, terms, entropy
        )
        return losses, correct, entropies
    parts = [
        checkpoint(_chunk_losses, head, *part, terms, entropy, use_reentrant=False)
        for part in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return (
        torch.cat([losses for losses, _, _ in parts]),
        torch.cat([correct for _, correct, _ in parts]),
        torch.cat([entropies for _, _, entropies in parts]) if entropy else None,
    )


def _chunk_losses(
    head: nn.Module, hidden: Tensor, targets: Tensor, terms: LossTerms, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The formula of `LossTerms`, left to autograd."""
    logits = _wide(head(hidden))
    of_target = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    log_sums = logits.logsumexp(-1)
    losses = _combined(log_sums, of_target, logits.mean(-1), terms)
    entropies = _entropies(logits.detach().softmax(-1)) if entropy else None
    return losses, logits.argmax(-1) == targets, entropies


def _entropies(softmax: Tensor) -> Tensor:
    """`-Σ p log p`, where 0 log 0 is 0: (S, V) -> (S,)."""
    smallest = torch.finfo(softmax.dtype).tiny
    means: Tensor = torch.linalg.vecdot(softmax, softmax.clamp(min=smallest).log_())
    return -means


def _combined(log_sums: Tensor, of_target: Tensor, means: Tensor, terms: LossTerms) -> Tensor:
    smoothing = terms.label_smoothing
    return log_sums - (1 - smoothing) * of_target - smoothing * means + terms.z_loss * log_sums.square()


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _HeadLosses(torch.autograd.Function):
    """Losses whose gradient is made in forward, while the logits are there.

    `d loss_i / d h_i = ((1 + 2 c · lse_i) softmax(z_i) - (1 - e) onehot(y_i) - e / V) W` depends on nothing that
    backward brings but a factor for each token, so `(S, D)` is all that has to be kept: two matrix products in place of
    the three of recomputing. The logits are turned into that gradient where they are: one buffer for a chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: nn.Linear,
        chunk: int,
        terms: LossTerms,
        entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        needs_gradient = ctx.needs_input_grad[0]
        slopes = torch.empty_like(hidden) if needs_gradient else None
        losses = torch.empty(len(hidden), dtype=_wide(hidden[:0]).dtype, device=hidden.device)
        correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        entropies = torch.empty_like(losses) if entropy else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = head(hidden[part])
            dtype, logits, target = logits.dtype, _wide(logits), targets[part].unsqueeze(-1)
            losses[part], correct[part], log_sums = _losses_and_exponentials_(logits, target, terms)
            if slopes is not None:
                slope = _slope_(logits, target, log_sums, terms).to(dtype)
                slopes[part] = _operand(head, dtype).matmul_t(slope)
                if entropies is not None:
                    along = (_wide(slopes[part]) * hidden[part]).sum(-1)
                    if head.bias is not None:
                        along += slope.to(along) @ head.bias.to(along)
                    entropies[part] = _entropies_by_slope(along, losses[part], log_sums.squeeze(-1), terms)
            elif entropies is not None:
                entropies[part] = _entropies(logits)
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(correct, *([] if entropies is None else [entropies]))
        return losses, correct, entropies

    @staticmethod
    @first_derivatives_only("The loss of trained tokens")
    def backward(ctx: Any, loss_grads: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (slopes * loss_grads.unsqueeze(-1)).to(slopes.dtype), None, None, None, None, None


def _operand(head: nn.Linear, dtype: torch.dtype) -> FrozenWeight:
    # Under autocast the logits have another dtype than a plain weight.
    return frozen_weight(head) if is_operand(head) else DenseWeight(head.weight.to(dtype))


def _entropies_by_slope(along: Tensor, losses: Tensor, log_sums: Tensor, terms: LossTerms) -> Tensor:
    """`log Σ exp z - Σ p z` from `Σ z · d loss / d z` (S,), which costs a product of (S, D) and no pass over (S, V).

    `Σ z · d loss / d z = (1 + 2 c · lse) Σ p z - (1 - e) z_y - e · mean(z)`, and the last two are in the loss.
    """
    means = (along + log_sums + terms.z_loss * log_sums.square() - losses) / (1 + 2 * terms.z_loss * log_sums)
    return (log_sums - means).clamp(min=0)


def _losses_and_exponentials_(
    logits: Tensor, target: Tensor, terms: LossTerms
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, hits and `log Σ exp z`, (S,) each; `logits` (S, V) become `exp(z - log Σ exp z)`, the softmax."""
    of_target, most = logits.gather(-1, target), logits.amax(-1, keepdim=True)
    # Nothing waits for a GPU, where searching is fast too, and a forecast's tensors have no numbers to look at.
    has_numbers = logits.device.type == "cpu" and type(logits) is Tensor
    best = None if has_numbers else logits.argmax(-1, keepdim=True)
    means = logits.mean(-1, keepdim=True) if terms.label_smoothing else torch.zeros_like(most)
    sums = logits.sub_(most).exp_().sum(-1, keepdim=True)
    correct = (
        _first_of_the_most_likely(logits, target, of_target == most, sums) if best is None else best == target
    )
    log_sums = sums.log() + most
    logits.div_(sums)
    losses = _combined(log_sums, of_target, means, terms)
    return losses.squeeze(-1), correct.squeeze(-1), log_sums


def _first_of_the_most_likely(exponentials: Tensor, target: Tensor, likely: Tensor, sums: Tensor) -> Tensor:
    """Whether the target is what `argmax` would find, for a tenth of its time: (S, 1).

    Args:
        exponentials: `exp(z - max z)` (S, V), 1 where a token is the most likely one.
        likely: where the target is one of these; it has rivals only where they sum to 2 or more.
    """
    unsure = (likely & (sums > 1.99)).squeeze(-1).nonzero().squeeze(-1)
    if len(unsure):
        likely[unsure] = exponentials[unsure].argmax(-1, keepdim=True) == target[unsure]
    return likely


def _slope_(softmax: Tensor, target: Tensor, log_sums: Tensor, terms: LossTerms) -> Tensor:
    """`d loss / d logits`, in place of the softmax."""
    if terms.z_loss:
        softmax.mul_(1 + 2 * terms.z_loss * log_sums)
    if terms.label_smoothing:
        softmax.sub_(terms.label_smoothing / softmax.shape[-1])
    return softmax.scatter_add_(-1, target, torch.full_like(log_sums, terms.label_smoothing - 1))
