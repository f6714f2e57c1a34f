"""Attention over a stream of row groups that share their first tokens, exact and isolated.

Legend: `T` stream positions, `H` query heads, `G` kv heads, `E` head width.

A token sees the shared tokens of all groups that it stands in, and what stands before it of its own tail or of the
shared tokens that it is one of; nothing of any other row: what every row would see on its own. A stream without shared
tokens is plain packing.

Three ways, the same values:

- `attend_densely`: one (T, T) mask, T^2 work. The truth that the other two are tested against.
- `attend_padded`: the tails as a padded batch behind copies of the shared keys. Public torch only, any device, and
  sliding windows, which are counted in positions of the row and not of the stream.
- `attend_merged`: on CPU. All queries behind the shared tokens of a group meet these in one call without a mask and
  without a copy, what is left is causal attention of shared tokens and tails to themselves, and the parts of each
  softmax are merged by their log-sum-exp.

`segment_attention` is registered with transformers under `SEGMENTS`; the `segments` keyword of the model reaches it
through transformers' own keywords. Without that keyword it is transformers' `sdpa`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from phlora.data.prefixes import Group, Segments
from phlora.errors import ModelError
from phlora.lora.autograd import first_derivatives_only, sees_through
from phlora.models import cpu_attention
from phlora.models.causal_lm import Decoder, as_causal_lm
from phlora.models.cpu_attention import causal, causal_backward, gradients, merge_, unmasked

SEGMENTS = "phlora_segments"
# Tails of one padded batch are at most this many times as long as its shortest one.
_WIDEST_BLOCK = 2
# On a CPU rows of this many tokens gain nothing from a batch.
_ALONE = 32
# K and V of all heads against all that a layer keeps of a position: a twelfth in Phi-3-mini's plain layers, twice that
# in lean ones.
_COPY_COST = 1 / 6
# Layouts whose attention is causal softmax attention with an optional window, and nothing else.
_PLAIN_ATTENTION = ("llama", "mistral", "phi3", "qwen2")
_DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout")


def sharing_obstacle(model: nn.Module, *, training: bool) -> str | None:
    """Why rows of this model may not be laid out as `Segments`; None: they may, exactly.

    Args:
        model: of transformers, plain or as a PeftModel.
        training: whether dropout would be at work.
    """
    config = as_causal_lm(model).config
    if config.model_type not in _PLAIN_ATTENTION:
        return f"the attention of {config.model_type} is not known to be plain"
    if config._attn_implementation not in ("sdpa", SEGMENTS):
        return f"attn_implementation is {config._attn_implementation}, not sdpa"
    adapters = getattr(model, "peft_config", {})
    for name, adapter in adapters.items():
        if getattr(adapter, "alora_invocation_tokens", None):
            return f"adapter {name} begins at a place that differs between rows"
    return _dropout_at_work(config, adapters) if training else None


def _dropout_at_work(config: Any, adapters: Mapping[str, Any]) -> str | None:
    for adapter in adapters.values():
        if getattr(adapter, "lora_dropout", 0.0):
            return f"lora_dropout is {adapter.lora_dropout}: rows would share one random mask"
    for name in _DROPOUTS:
        if getattr(config, name, 0.0):
            return f"{name} is {getattr(config, name)}: rows would share one random mask"
    return None


def copy_cost(model: nn.Module, device: torch.device, *, longest: int) -> float:
    """What a shared key laid before one more tail takes, in positions (`share_in_passes`); rows to `longest` tokens."""
    window = getattr(as_causal_lm(model).config, "sliding_window", None)
    merged = device.type == "cpu" and (window is None or longest <= window)
    return 0.0 if merged and cpu_attention.is_there() else _COPY_COST


def segment_inputs(trunk: Decoder, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a trunk for a batch with `segments`; the trunk's attention is set to `SEGMENTS`.

    The setting stays: gradient checkpointing runs the layers again in backward, and batches without `segments` take
    transformers' `sdpa` as before.

    Raises:
        ModelError: the model's attention is not sdpa.
    """
    current = trunk.config._attn_implementation
    if current not in ("sdpa", SEGMENTS):
        raise ModelError(
            f"Rows that share their first tokens need sdpa attention, the model has {current}",
            fix="load it with attn_implementation: sdpa, or set speed: reference",
        )
    if current != SEGMENTS:
        trunk.set_attn_implementation(SEGMENTS)
    # transformers passes a mask of four dimensions on unread; without one it would build its own of (T, T).
    unread = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=inputs["input_ids"].device)
    return {**inputs, "attention_mask": unread}


def lay_out(segments: Segments, device: torch.device) -> None:
    """Make what attention over these segments looks up, so that no later pass over them has to."""
    _layout(segments, device)
    _layout(segments, device, alone=_ALONE)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query (1, H, T, E), key and value (1, G, T, E) -> (1, T, H, E)."""
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    if settings.get("dropout"):
        raise ModelError("Attention dropout is at work", fix="set speed: reference, or attention_dropout: 0")
    scaling = settings.get("scaling") or query.shape[-1] ** -0.5
    window = settings.get("sliding_window")
    if window is not None and segments.longest <= window:
        window = None
    # Under autocast q and k can be wider than v; torch's public attention casts them, the merge does not.
    alike = query.dtype == key.dtype == value.dtype
    mergeable = query.device.type == "cpu" and window is None and alike and not sees_through()
    if mergeable and cpu_attention.is_there():
        output = attend_merged(query, key, value, segments, scaling=scaling)
    else:
        output = attend_padded(query, key, value, segments, scaling=scaling, window=window)
    return output.transpose(1, 2).contiguous(), None


def attend_densely(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scaling: float,
    window: int | None = None,
) -> Tensor:
    """softmax(scaling * Q K^T + mask) V with the (T, T) mask of the segments: (1, H, T, E)."""
    mask = segment_mask(segments, window=window, device=query.device)
    key, value = _for_all_heads(query, key, value)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


def segment_mask(segments: Segments, *, window: int | None = None, device: Any = None) -> Tensor:
    """Which position sees which: (T, T) bool, rows are queries.

    What sees a token stands in one stretch: from the token itself to the end of its tail, or of its group.
    """
    total = segments.num_positions
    stop, place = (torch.empty(total, dtype=torch.long, device=device) for _ in range(2))
    for group in segments.groups:
        spans = [(group.shared.start, len(group.shared), group.num_shared - len(group.shared), group.stop)]
        spans += [(start, length, group.num_shared, start + length) for _, start, length in group.tails()]
        for start, length, before, end in spans:
            stop[start : start + length] = end
            place[start : start + length] = torch.arange(before, before + length, device=device)
    query = torch.arange(total, device=device)[:, None]
    seen = (query >= query.T) & (query < stop)
    return seen if window is None else seen & (place[:, None] - place < window)


def attend_padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scaling: float,
    window: int | None = None,
) -> Tensor:
    """As `attend_densely`, with the tails as padded batches behind copies of the shared keys and values."""
    key, value = _for_all_heads(query, key, value)
    outputs: dict[int, Tensor] = {}
    for block in _layout(segments, query.device).blocks:
        keys, values = block.batch_behind(key), block.batch_behind(value)
        mask = _causal_mask(block.width, keys.shape[2] - block.width, window, query.device)
        outputs[block.span.start] = block.stream(_sdpa(block.batch(query), keys, values, mask, scaling))
    return torch.cat([outputs[start] for start in sorted(outputs)], dim=2)


def attend_merged(query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scaling: float) -> Tensor:
    """As `attend_densely` without a window, on CPU, with no mask and no copy of shared keys."""
    layout = _layout(segments, query.device, alone=_ALONE)
    output: Tensor = _MergedAttention.apply(query, key, value, layout, scaling)  # type: ignore[no-untyped-call]
    return output


class _MergedAttention(torch.autograd.Function):
    """Softmax over two sets of keys, each with its own log-sum-exp l_i and output o_i:

        l = log(e^l_1 + e^l_2),    o = o_1 e^(l_1 - l) + o_2 e^(l_2 - l).

    In backward each set's kernel is given the merged o and l: the probabilities e^(s - l) and the row sums of
    do * o are then those of the whole softmax, and the gradients of the sets add up. Kept: q, k, v, o and l.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: _Layout, scaling: float
    ) -> Tensor:
        inputs, output = (query, key, value), torch.empty_like(query)
        norm = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for block in layout.blocks:
            out, lse = causal([block.batch(x) for x in inputs], scaling)
            output[:, :, block.span], norm[:, :, block.span] = block.stream(out), block.stream(lse)
        for shared, behind in layout.starts:
            rest = unmasked([query[:, :, behind], key[:, :, shared], value[:, :, shared]], scaling)
            merge_(output[:, :, behind], norm[:, :, behind], *rest)
        ctx.save_for_backward(query, key, value, output, norm)
        ctx.layout, ctx.scaling = layout, scaling
        return output

    @staticmethod
    @first_derivatives_only("Attention over shared prefixes")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in saved[:3]]
        for block in ctx.layout.blocks:
            ours = causal_backward(block.batch(grad, padding=0), [block.batch(x) for x in saved], ctx.scaling)
            for whole, x in zip(grads, ours, strict=True):
                whole[:, :, block.span] = block.stream(x)
        for shared, behind in ctx.layout.starts:
            spans = (behind, shared, shared)
            q, k, v = (x[:, :, span] for x, span in zip(saved[:3], spans, strict=True))
            out, lse, above = (x[:, :, behind] for x in (*saved[3:], grad))
            theirs = gradients([above, q, k, v, out], lse, None, ctx.scaling, causal=False)
            for whole, span, x in zip(grads, spans, theirs, strict=True):
                whole[:, :, span] += x
        return *grads, None, None


@dataclass(frozen=True)
class _Block:
    """Neighbouring rows of similar length as a batch of `num_rows` rows and `width` columns.

    Padding repeats the last token of its row: it comes after every real token, so no real token sees it. Rows of
    equal length need none of it and are taken where they lie. `before` is where the shared tokens before them lie.
    """

    span: slice
    num_rows: int
    width: int
    before: tuple[slice, ...]
    padded: Tensor | None = None
    is_real: Tensor | None = None
    real: Tensor | None = None

    def batch(self, x: Tensor, *, padding: float | None = None) -> Tensor:
        """(1, H, T, ...) -> (num_rows, H, width, ...); with `padding`, that value where padding is."""
        if self.num_rows == 1:
            return x[:, :, self.span]
        # By position and not by head: all numbers of a position lie together.
        flat = x[0].transpose(0, 1)
        flat = flat[self.span] if self.padded is None else flat.index_select(0, self.padded)
        taken: Tensor = flat.unflatten(0, (self.num_rows, self.width)).transpose(1, 2)
        if padding is None or self.is_real is None:
            return taken
        real = self.is_real.view(self.num_rows, 1, self.width, *[1] * (x.dim() - 3))
        return taken.masked_fill(~real, padding)

    def batch_behind(self, x: Tensor) -> Tensor:
        """As `batch`, each row behind copies of the shared tokens before it."""
        before = (x[:, :, span].expand(self.num_rows, -1, -1, -1) for span in self.before)
        return torch.cat([*before, self.batch(x)], dim=2)

    def stream(self, x: Tensor) -> Tensor:
        """(num_rows, H, width, ...) -> (1, H, span, ...)."""
        if self.num_rows == 1:
            return x
        flat = x.transpose(1, 2).flatten(0, 1)
        return (flat if self.real is None else flat.index_select(0, self.real)).transpose(0, 1).unsqueeze(0)


@dataclass(frozen=True)
class _Layout:
    """A stream as attention needs it.

    Attributes:
        blocks: shared tokens of each group, and tails, each of which attend to themselves causally.
        starts: where the shared tokens of each group lie, and all that stands behind them.
    """

    blocks: tuple[_Block, ...]
    starts: tuple[tuple[slice, slice], ...]


@functools.lru_cache(maxsize=8)
def _layout(segments: Segments, device: torch.device, *, alone: int | None = None) -> _Layout:
    """The same for every layer, so made once for each batch; tails of `alone` tokens or more in no batch."""
    blocks, starts = [], []
    for group in segments.groups:
        outer, shared = (_spans(group.outer), _spans([group.shared] if group.shared else []))
        for span in shared:
            blocks.append(_Block(span, 1, len(group.shared), outer))
            starts.append((span, slice(span.stop, group.stop)))
        blocks += [_block(tails, outer + shared, device) for tails in _batches(group, alone)]
    return _Layout(tuple(blocks), tuple(starts))


def _spans(ranges: Sequence[range]) -> tuple[slice, ...]:
    return tuple(slice(span.start, span.stop) for span in ranges)


def _batches(group: Group, alone: int | None) -> list[list[tuple[int, int]]]:
    """(position, length) of tails, longest first, in batches that are at most half padding."""
    batches: list[list[tuple[int, int]]] = []
    for _, start, length in group.tails():
        longest = batches[-1][0][1] if batches else 0
        if longest > _WIDEST_BLOCK * length or longest >= (alone or longest + 1) or not batches:
            batches.append([])
        batches[-1].append((start, length))
    return batches


def _block(tails: list[tuple[int, int]], before: tuple[slice, ...], device: torch.device) -> _Block:
    span, width = slice(tails[0][0], tails[-1][0] + tails[-1][1]), tails[0][1]
    if tails[-1][1] == width:
        return _Block(span, len(tails), width, before)
    starts, lengths = torch.tensor(tails, device=device).T
    columns = torch.arange(width, device=device)
    is_real = (columns < lengths[:, None]).flatten()
    padded = starts[:, None] + torch.minimum(columns, lengths[:, None] - 1)
    return _Block(span, len(tails), width, before, padded.flatten(), is_real, is_real.nonzero().squeeze(1))


def _causal_mask(width: int, before: int, window: int | None, device: torch.device) -> Tensor | None:
    """(width, before + width): each of `width` queries after `before` others; None: plain causal."""
    if not before and window is None:
        return None
    places = torch.arange(before + width, device=device)
    distance = places[before:, None] - places
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling
    )


def _for_all_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of G heads repeated for H."""
    times = query.shape[1] // key.shape[1]
    if times == 1:
        return key, value
    return key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)


AttentionInterface.register(SEGMENTS, segment_attention)
AttentionMaskInterface.register(SEGMENTS, sdpa_mask)
