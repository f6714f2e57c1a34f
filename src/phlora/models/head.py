"""The language-model head on trained positions only, and the loss of each of them.

Legend: `B` rows, `T` tokens, `D` model width, `V` vocabulary, `S` trained tokens of a batch.

A causal model predicts token `t + 1` from the hidden state at `t`, and the loss asks only for the predictions of
trained tokens. So the trunk runs on the whole batch, the `S` hidden states that predict a trained token are
gathered, and the head runs on those, a chunk at a time: the logits that exist at once are `(chunk, V)` and never
`(B, T, V)`, which for Phi-4-mini's vocabulary would be 0.8 MB a token. Values and gradients are those of
transformers' own loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from phlora.errors import ModelError
from phlora.lora.frozen import is_plain_linear
from phlora.models.attention import segment_inputs

IGNORED = -100
# fp32 logits that may exist at once when the caller names no chunk.
_CHUNK_BYTES = 64 << 20
_NOT_FOR_THE_TRUNK = ("labels", "shift_labels", "loss_weights")
# What some families do to logits after the head; none of it happens here.
_AFTER_THE_HEAD = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}


def trunk_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The decoder without its head, and the head; for a PeftModel, both with its adapters active.

    Raises:
        ModelError: the model has no head of its own, or changes its logits after the head.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(
            f"{type(model).__name__} has no language-model head", expected="a causal language model"
        )
    for name, neutral in _AFTER_THE_HEAD.items():
        value = getattr(model.config, name, None)
        if value not in (None, neutral):
            raise ModelError(
                f"The model changes its logits after the head ({name} = {value})",
                where=model.config.model_type,
                expected="a Phi-3 or Llama layout, whose head has the last word",
            )
    return model.get_decoder(), head


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
    model: nn.Module, batch: Mapping[str, Any], *, chunk: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of each trained token: `-log softmax(head(h_t))[target_t]`, in float32 or wider.

    Differentiable when gradients are enabled. A frozen plain head then runs once per chunk and keeps `(S, D)` for
    backward; any other head is recomputed in backward.

    Args:
        model: a causal language model of transformers, plain or as a PeftModel.
        batch: `input_ids`, and targets as `targets_and_weights` reads them; `segments` where rows share their first
            tokens. The rest (`attention_mask`, `position_ids`, ...) goes to the trunk.
        chunk: trained tokens whose logits exist at once; None: as many as fit into 64 MiB of float32.

    Returns:
        losses (S,), correct (S,) bool: whether the token is the most likely one, weights (S,),
        1 without `loss_weights`. In the order of the batch's rows, and of the positions within one.
    """
    trunk, head = trunk_and_head(model)
    inputs = {name: value for name, value in batch.items() if name not in _NOT_FOR_THE_TRUNK}
    if inputs.get("segments") is not None:
        inputs = segment_inputs(trunk, inputs)
    # A cache would hide from transformers that packed rows are several.
    hidden = trunk(**inputs, use_cache=False).last_hidden_state
    targets, weights = targets_and_weights(batch)
    trained = targets != IGNORED
    selected, targets = hidden[trained.to(hidden.device)], targets[trained].to(hidden.device)
    chunk = chunk or max(1, _CHUNK_BYTES // (4 * model.config.vocab_size))
    losses, correct = _head_losses(head, selected, targets, chunk=chunk)
    return losses, correct, torch.ones_like(losses) if weights is None else weights[trained].to(losses)


def _head_losses(head: nn.Module, hidden: Tensor, targets: Tensor, *, chunk: int) -> tuple[Tensor, Tensor]:
    """Losses and hits (S,) of hidden states (S, D) and their targets (S,)."""
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return _in_chunks(_chunk_losses, head, hidden, targets, chunk)
    if is_plain_linear(head) and not any(p.requires_grad for p in head.parameters()):
        return _FrozenHeadLosses.apply(hidden, targets, head, chunk)
    return _in_chunks(_recomputed_chunk_losses, head, hidden, targets, chunk)


def _in_chunks(
    function: Any, head: nn.Module, hidden: Tensor, targets: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    parts = [function(head, *part) for part in zip(hidden.split(chunk), targets.split(chunk), strict=True)]
    return torch.cat([losses for losses, _ in parts]), torch.cat([correct for _, correct in parts])


def _chunk_losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = _wide(head(hidden))
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


def _recomputed_chunk_losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return checkpoint(_chunk_losses, head, hidden, targets, use_reentrant=False)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _FrozenHeadLosses(torch.autograd.Function):
    """Losses whose gradient is made in forward, while the logits are there.

    `d loss_i / d h_i = (softmax(z_i) - onehot(y_i)) W` depends on nothing that backward brings but a factor for
    each token, so `(S, D)` is all that has to be kept: two matrix products in place of the three of recomputing.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Linear, chunk: int
    ) -> tuple[Tensor, Tensor]:
        slopes = torch.empty_like(hidden)
        losses = torch.empty(len(hidden), dtype=_wide(hidden[:0]).dtype, device=hidden.device)
        correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = head(hidden[part])
            dtype, logits, target = logits.dtype, _wide(logits), targets[part]
            losses[part] = F.cross_entropy(logits, target, reduction="none")
            correct[part] = logits.argmax(-1) == target
            slope = torch.softmax(logits, -1)
            slope[torch.arange(len(target), device=target.device), target] -= 1
            slopes[part] = slope.to(dtype) @ head.weight.to(dtype)
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grads: Tensor, _: Any) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (slopes * loss_grads.unsqueeze(-1)).to(slopes.dtype), None, None, None
