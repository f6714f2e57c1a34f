"""Decoding of many prompts at once, and streaming of one.

Evaluation prompts are short and share a long system prompt. So the tokens that all prompts begin with go
through the model once, at batch 1; their keys and values are then repeated for every row. Rows are sorted by
length, padded on the left behind the shared tokens, decoded together, and leave the batch as they finish.

    keys    [ shared prefix (P) ][ padding ][ rest of the prompt ][ new tokens ]
    mask      1 1 1 1 1 1 1 1 1    0 0 0      1 1 1 1 1 1 1 1 1     1 1 1 1

Two kinds of models tie a row to its neighbours and are kept apart: with a sliding window that is shorter than
the text, padding would shift the window, so that only prompts of one length go together; with long-context
rotary factors, a row that may pass the limit is decoded alone, and its cache is computed anew at the limit.

Legend: B rows, P shared tokens, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phlora.errors import ConfigError
from phlora.models.causal_lm import CausalLM, as_causal_lm
from phlora.models.families import context_lengths
from phlora.models.sampling import GREEDY, Pick, Sampling
from phlora.models.stored_layers import compute_dtype

# A prefix shorter than this saves less than the extra forward pass costs.
_MIN_SHARED_TOKENS = 8
_MAX_AUTO_ROWS = 64
_AUTO_CACHE_BYTES = 1 << 30


@torch.inference_mode()
def generate(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    batch_size: int | Literal["auto"] = "auto",
    sampling: Sampling = GREEDY,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The continuation of every prompt, token by token: the likeliest one, or one that is drawn.

    What a prompt gets does not depend on the prompts beside it, nor on `batch_size`.

    Args:
        model: causal language model, bare or under PEFT; its mode and `use_cache` are left as they are.
        prompts: token ids, at least one each.
        max_new_tokens: at most so many new tokens a row, and never more than the model's context holds with its prompt.
        stop_token_ids: ids that end a row; they are not part of the answer.
        pad_token_id: fills the gaps; it is masked and may be any id.
        batch_size: rows decoded together; `auto` fits their keys and values into 1 GiB.
        sampling: how tokens are chosen; the seed of prompt number n (from 0) is `sampling.seed + n`.
        progress: called with the number of rows that have been finished since.

    Returns:
        The new token ids of each prompt, in the order of the prompts.

    Raises:
        ConfigError: a prompt without tokens, or a batch size below 1.
    """
    _check(prompts, batch_size)
    most = context_lengths(model.config).max_tokens
    rooms = [max_new_tokens if most is None else min(max_new_tokens, most - len(p)) for p in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    lm = as_causal_lm(model)
    together, alone = _split_at_rope_limit(lm, prompts, rooms)
    advance = progress or (lambda done: None)
    with evaluating(model):
        for row in alone:
            tokens = _tokens(lm, prompts[row], pick=sampling.picker(row), stops=frozenset(stop_token_ids))
            answers[row] = list(itertools.islice(tokens, max(0, rooms[row])))
            advance(1)
        for rows, shared, cache in _batches(lm, prompts, together, rooms, batch_size):
            rests = [_Rest(prompts[row][shared:], rooms[row], sampling.picker(row)) for row in rows]
            stops = frozenset(stop_token_ids)
            _decode(lm, rests, shared, cache, stops, pad_token_id, is_greedy=sampling.is_greedy)
            for row, rest in zip(rows, rests, strict=True):
                answers[row] = rest.answer
            advance(len(rows))
    return answers


def _check(prompts: Sequence[Sequence[int]], batch_size: int | str) -> None:
    empty = [row for row, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        raise ConfigError(f"Prompt {empty[0]} has no token", expected="at least one token in every prompt")
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise ConfigError(
            f"The batch has {batch_size} rows", where="batch_size", expected="`auto`, or 1 and more"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; only modules that were training go back to it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _split_at_rope_limit(
    model: CausalLM, prompts: Sequence[Sequence[int]], rooms: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Rows that stay within the short rotary factors, and rows that may pass them."""
    limit = context_lengths(model.config).original_max_tokens
    within = [limit is None or len(p) + room <= limit for p, room in zip(prompts, rooms, strict=True)]
    rows = range(len(prompts))
    return [r for r in rows if within[r]], [r for r in rows if not within[r]]


def _batches(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    rows: list[int],
    rooms: Sequence[int],
    batch_size: int | Literal["auto"],
) -> Iterator[tuple[list[int], int, Any]]:
    """Rows to decode together, how many tokens they share, and the cache of those; long rows first."""
    rows = sorted((row for row in rows if rooms[row] > 0), key=lambda row: -len(prompts[row]))
    if not rows:
        return
    longest = max(len(prompts[row]) + rooms[row] for row in rows)
    size = _rows_that_fit(model, longest) if batch_size == "auto" else batch_size
    window = context_lengths(model.config).sliding_window_tokens
    if window is not None and longest > window:
        for _, same in itertools.groupby(rows, key=lambda row: len(prompts[row])):
            for batch in _chunks(list(same), size):
                yield batch, 0, None
        return
    shared = _shared_tokens([prompts[row] for row in rows])
    cache = _prefix_cache(model, prompts[rows[0]][:shared]) if shared else None
    for batch in _chunks(rows, size):
        yield batch, shared, cache


def _chunks(rows: list[int], size: int) -> Iterator[list[int]]:
    """Chunks of at most `size` and nearly equal length, so that none is a small remnant."""
    count = -(-len(rows) // size)
    for i in range(count):
        yield rows[i * len(rows) // count : (i + 1) * len(rows) // count]


def _rows_that_fit(model: CausalLM, tokens: int) -> int:
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dtype = compute_dtype(cast(nn.Module, model))
    row_bytes: int = 2 * config.num_hidden_layers * kv_heads * head_dim * tokens * dtype.itemsize
    return max(1, min(_MAX_AUTO_ROWS, _AUTO_CACHE_BYTES // row_bytes))


def _shared_tokens(prompts: list[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; each keeps at least one token of its own."""
    if len(prompts) < 2:
        return 0
    # The common prefix of all is that of the smallest and the largest in lexical order.
    first, last = min(map(list, prompts)), max(map(list, prompts))
    shared = len(os.path.commonprefix([first, last]))
    shared = min(shared, *(len(prompt) - 1 for prompt in prompts))
    return shared if shared >= _MIN_SHARED_TOKENS else 0


def _prefix_cache(model: CausalLM, prefix: Sequence[int]) -> Any:
    ids = torch.tensor([list(prefix)], device=model.device)
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


@dataclass
class _Rest:
    """What of a row comes behind the shared tokens, how much may follow, and what has followed."""

    prompt: Sequence[int]
    room: int
    pick: Pick
    answer: list[int] = field(default_factory=list)


def _decode(
    model: CausalLM,
    rests: list[_Rest],
    shared: int,
    prefix_cache: Any,
    stops: frozenset[int],
    pad_token_id: int,
    *,
    is_greedy: bool,
) -> None:
    """Write the answers of rows whose first `shared` tokens are in `prefix_cache`."""
    width, device = max(len(rest.prompt) for rest in rests), model.device
    gaps = [width - len(rest.prompt) for rest in rests]
    pairs = list(zip(rests, gaps, strict=True))
    ids = torch.tensor([[pad_token_id] * gap + list(rest.prompt) for rest, gap in pairs], device=device)
    real = torch.tensor([[0] * gap + [1] * len(rest.prompt) for rest, gap in pairs], device=device)
    positions = shared + (real.cumsum(-1) - 1).clamp(min=0)
    mask = torch.cat([real.new_ones(len(rests), shared), real], dim=-1)
    padded = not real.all()
    cache = copy.deepcopy(prefix_cache)
    if cache is not None:
        cache.batch_repeat_interleave(len(rests))
    live = rests
    while True:
        out = model(
            input_ids=ids,
            attention_mask=mask if padded else None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, tokens = out.past_key_values, _picked(out.logits[:, -1], live, is_greedy=is_greedy)
        going = []
        for place, (rest, token) in enumerate(zip(live, tokens.tolist(), strict=True)):
            if token not in stops:
                rest.answer.append(token)
                if len(rest.answer) < rest.room:
                    going.append(place)
        if not going:
            return
        positions = positions[:, -1:] + 1
        if len(going) < len(live):
            live = [live[place] for place in going]
            keep = torch.tensor(going, device=device)
            tokens, positions, mask = tokens[keep], positions[keep], mask[keep]
            cache.batch_select_indices(keep)
        ids, mask = tokens[:, None], torch.cat([mask, mask.new_ones(len(live), 1)], dim=-1)


def _picked(logits: torch.Tensor, live: list[_Rest], *, is_greedy: bool) -> torch.Tensor:
    """The next token of every row (B), from its logits (B, V)."""
    if is_greedy:
        return logits.argmax(-1)
    drawn = [rest.pick(row) for rest, row in zip(live, logits, strict=True)]
    return torch.tensor(drawn, device=logits.device)


# --------------------------------------------------------------------------------------------- one prompt


def stream(
    model: PreTrainedModel | PeftModel,
    prompt_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
    sampling: Sampling = GREEDY,
    reply: int = 0,
) -> Iterator[str]:
    """Yield the reply of `generate` piece by piece; a character of several tokens comes when it is whole.

    Args:
        model: causal language model, bare or under PEFT.
        prompt_ids: at least one token id.
        tokenizer: turns ids into text; special tokens are left out.
        max_new_tokens: at most so many new tokens.
        stop_token_ids: ids that end the reply.
        sampling: how tokens are chosen.
        reply: which reply it is; one number on, a seed draws other tokens.

    Raises:
        ConfigError: an empty prompt.
    """
    _check([prompt_ids], "auto")
    pick = sampling.picker(reply)
    tokens = _tokens(as_causal_lm(model), prompt_ids, pick=pick, stops=frozenset(stop_token_ids))
    return _text_pieces(_first_tokens(model, tokens, max_new_tokens), tokenizer)


def _first_tokens(model: nn.Module, tokens: Iterator[int], max_new_tokens: int) -> Iterator[int]:
    for _ in range(max_new_tokens):
        with evaluating(model):
            token = next(tokens, None)
        if token is None:
            return
        yield token


@torch.inference_mode()
def _tokens(
    model: CausalLM,
    prompt: Sequence[int],
    *,
    pick: Pick,
    stops: frozenset[int],
) -> Iterator[int]:
    """New tokens of one prompt, one by one, without end but for a stop token."""
    limit = context_lengths(model.config).original_max_tokens
    ids, cached, cache = list(prompt), 0, None
    while True:
        if limit is not None and cached <= limit < len(ids):
            # Past the limit the rotary factors are other ones, for all earlier keys too.
            cached, cache = 0, None
        out = model(
            input_ids=torch.tensor([ids[cached:]], device=model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cached, cache = len(ids), out.past_key_values
        token = pick(out.logits[0, -1])
        if token in stops:
            return
        ids.append(token)
        yield token


def _text_pieces(tokens: Iterator[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Text of a growing token list; each piece is decoded behind the one before it, for the spaces' sake.

    Together they are what decoding all tokens gives, where a character that the end of the reply cuts in two is the
    replacement character.
    """
    ids: list[int] = []
    start = shown = 0

    def fresh() -> str:
        before, text = (
            tokenizer.decode(part, skip_special_tokens=True) for part in (ids[start:shown], ids[start:])
        )
        assert isinstance(text, str)
        return text[len(before) :]

    for token in tokens:
        ids.append(token)
        piece = fresh()
        # The replacement character at the end stands for bytes that still wait for their other half.
        if piece and not piece.endswith("\ufffd"):
            yield piece
            start, shown = shown, len(ids)
    if rest := fresh():
        yield rest
