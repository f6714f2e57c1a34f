"""Facts about Phi-3 and its relatives: layouts, sizes, chat markers, stop and pad tokens, context lengths.

Nothing is loaded here: a configuration or a tokenizer is passed in, and questions about it are answered.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from phlora.data.rendering import TEMPLATE_ERRORS
from phlora.errors import ModelError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

_LLAMA_LAYOUTS = ("llama", "mistral", "qwen2", "qwen3", "smollm3")

# The fused weights of Phi-3, and the projections that they hold, in the order of their rows.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}

# Tokens that checkpoints carry and no chat writes.
_RESERVED = re.compile(r"pad|placeholder|reserved|dummy|unused|endofprompt", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What is known about a kind of model.

    Attributes:
        name: `phi-3` (also 3.5), `phi-4-mini`, `chatml`, `llama` or `generic`: how its chats are written.
        model_type: transformers' name of the layout.
        stop_tokens: tokens that end a reply, the end of a turn first.
    """

    name: str
    model_type: str
    stop_tokens: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ContextLengths:
    """How many tokens a model may see.

    Attributes:
        max_tokens: the longest sequence, None when the configuration does not say.
        original_max_tokens: where long-context rotary factors replace the short ones, None without them.
        sliding_window_tokens: how far back one token attends, None when it sees everything.
    """

    max_tokens: int | None
    original_max_tokens: int | None
    sliding_window_tokens: int | None


def family_of(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Family:
    """The family of a model: chat markers come from the tokenizer, the layout from the configuration."""
    model_type = config.model_type
    name, stops = _chat_markers(tokenizer)
    if model_type == "phi3":
        return Family(name=name or "phi-3", model_type=model_type, stop_tokens=stops)
    if model_type in _LLAMA_LAYOUTS:
        return Family(name=name or "llama", model_type=model_type, stop_tokens=stops)
    return Family(name=name or "generic", model_type=model_type, stop_tokens=stops)


def _chat_markers(tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, tuple[str, ...]]:
    """The family's name and stop tokens by the special tokens that the vocabulary holds."""
    if tokenizer is None:
        return "", ()
    special = _special_tokens(tokenizer)
    if {"<|end|>", "<|endoftext|>", "<|assistant|>"} <= special:
        # Phi-4-mini took Phi-3's turn markers into another vocabulary and added tool calls.
        return ("phi-4-mini" if "<|tool|>" in special else "phi-3"), ("<|end|>", "<|endoftext|>")
    if {"<|im_start|>", "<|im_end|>"} <= special:
        return "chatml", ("<|im_end|>",)
    return "", ()


def fused_row_blocks(config: Any) -> dict[str, dict[str, int]]:
    """Rows of each projection inside Phi-3's fused weights; empty for a layout without fused weights.

    With H query heads, G key/value heads of width d and feed-forward width F:
    `qkv_proj (H·d + 2·G·d, D)` holds q, k, v; `gate_up_proj (2·F, D)` holds gate, up.
    """
    return projection_rows(config) if getattr(config, "model_type", None) == "phi3" else {}


def projection_rows(config: Any) -> dict[str, dict[str, int]]:
    """As `fused_row_blocks`, also of a Llama layout, whose projections are weights of their own; empty for others."""
    if getattr(config, "model_type", None) not in ("phi3", *_LLAMA_LAYOUTS):
        return {}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_rows = config.num_key_value_heads * head_dim
    rows = {
        "qkv_proj": (config.num_attention_heads * head_dim, kv_rows, kv_rows),
        "gate_up_proj": (config.intermediate_size, config.intermediate_size),
    }
    return {fused: dict(zip(FUSED[fused], sizes, strict=True)) for fused, sizes in rows.items()}


def block_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers except the output head, which is what PEFT means by `all-linear`."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    ]


def widest_product(config: Any) -> tuple[int, int]:
    """Rows and columns of the widest weight of a block: Phi-3's fused gate and up, elsewhere one that is as wide.

    The rows of an MLP are four widths where the configuration does not say.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(text, "hidden_size", None) or 1024
    inner = getattr(text, "intermediate_size", None) or 4 * width
    return (2 if text.model_type == "phi3" else 1) * inner, width


def has_plain_layout(config: PreTrainedConfig) -> bool:
    """Whether the files of such a model hold the tensors of its layers as they are, under their names."""
    return config.model_type in ("phi3", *_LLAMA_LAYOUTS)


def longrope_limit(config: Any) -> int | None:
    """The longest row, in tokens, that has the short factors; None for a model with one set of factors."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    limit: int = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    return limit


def context_lengths(config: PreTrainedConfig) -> ContextLengths:
    """The context lengths that a configuration states."""
    window = getattr(config, "sliding_window", None)
    return ContextLengths(
        max_tokens=getattr(config, "max_position_embeddings", None),
        original_max_tokens=longrope_limit(config),
        sliding_window_tokens=window if getattr(config, "use_sliding_window", True) else None,
    )


def turn_end_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that ends an assistant turn: the first special token that the template writes after one.

    Phi-3's `eos_token` is `<|endoftext|>`, while its turns end with `<|end|>`; so the template is asked.
    Without a template, or where it writes no special token there, it is `eos_token`.

    Raises:
        ModelError: there is neither.
    """
    after = _text_after_answer(tokenizer)
    found = [(after.index(token), token) for token in _special_tokens(tokenizer) if token in after]
    if found:
        # Of two tokens that start at one place the longer is meant.
        return min(found, key=lambda place: (place[0], -len(place[1])))[1]
    if tokenizer.eos_token is None:
        raise ModelError(
            "The tokenizer names no token that ends a turn",
            where=str(tokenizer.name_or_path),
            expected="a chat template that ends assistant turns with a special token, or an `eos_token`",
            fix="add `eos_token` to tokenizer_config.json",
        )
    return str(tokenizer.eos_token)


def _text_after_answer(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes behind an assistant's answer; empty when it cannot be rendered."""
    if not tokenizer.chat_template:
        return ""
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "probe-answer"}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except TEMPLATE_ERRORS:
        # A chat that it is to render says why not.
        return ""
    assert isinstance(text, str)
    return text.partition("probe-answer")[2]


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None = None,
    *,
    family: Family | None = None,
) -> tuple[int, ...]:
    """Ids that end a reply, the end of a turn first: by template, family, `eos_token`, the model's list."""
    tokens = [turn_end_token(tokenizer), *(family.stop_tokens if family else ())]
    ids: list[Any] = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
    own = generation_config.eos_token_id if generation_config is not None else None
    for more in (tokenizer.eos_token_id, own):
        ids += more if isinstance(more, Iterable) else [] if more is None else [more]
    return tuple(dict.fromkeys(ids))


def choose_pad_token(tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int]) -> str:
    """A token of the vocabulary for padding that ends no reply: Phi-3 ships with one that does.

    The tokenizer's own pad token if it stops nothing, else `unk_token`, a reserved token or `bos_token`.
    Nothing is added to the vocabulary, so no embedding is resized.

    Raises:
        ModelError: the vocabulary has no such token.
    """
    stops = set(stop_ids)
    reserved = [
        str(token)
        for _, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and _RESERVED.search(str(token))
    ]
    for token in (tokenizer.pad_token, tokenizer.unk_token, *reserved, tokenizer.bos_token):
        if token is not None and tokenizer.convert_tokens_to_ids(token) not in stops:
            return str(token)
    raise ModelError(
        "Every special token of the tokenizer ends a reply, so none is left for padding",
        where=str(tokenizer.name_or_path),
        fix="name a `pad_token` in tokenizer_config.json that the chat template does not write",
    )


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template with generation markers around what the assistant says, or None when none is known.

    TRL's training template where TRL knows this very template; the tokenizer's own where it has the markers.
    """
    if not tokenizer.chat_template:
        return None
    from trl.chat_template_utils import get_training_chat_template

    try:
        patched = get_training_chat_template(tokenizer)
    except TEMPLATE_ERRORS:
        return None
    return patched or tokenizer.get_chat_template()
