"""A tiny random Phi-3 and its tokenizer, made in memory: for tests, and for trying things in seconds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

# What Phi-3's template writes, in our own words: the three roles that it knows, every other role left out.
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role in ("system", "user", "assistant") -%}
{{- "<|" + message.role + "|>\\n" + message.content + "<|end|>\\n" -}}
{%- endif -%}
{%- endfor -%}
{{- "<|assistant|>\\n" if add_generation_prompt else eos_token -}}
"""

_ADDED_TOKENS = (
    "<|endoftext|>",
    "<|assistant|>",
    "<|placeholder1|>",
    "<|placeholder2|>",
    "<|placeholder3|>",
    "<|placeholder4|>",
    "<|system|>",
    "<|end|>",
    "<|placeholder5|>",
    "<|placeholder6|>",
    "<|user|>",
)

_MERGES = (
    *(("Ġ", "t"), ("h", "e"), ("Ġ", "a"), ("i", "n"), ("Ġt", "he"), ("e", "r"), ("o", "n"), ("r", "e")),
    *(("Ġ", "s"), ("a", "t"), ("Ġ", "w"), ("o", "r"), ("e", "n"), ("i", "s"), ("Ġ", "c"), ("Ã", "¼")),
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few merges with all that is Phi-3's about it; see `phi3_tokenizer`."""
    return phi3_tokenizer(_MERGES)


def phi3_tokenizer(merges: Sequence[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE made in memory, with Phi-3's special tokens, their flags, and its chat template.

    As in Phi-3: markers strip the white space after them, `eos_token` and `pad_token` are both
    `<|endoftext|>`, and turns end with `<|end|>`. With 31,741 merges its special tokens have the ids of Phi-3-mini's.

    Args:
        merges: the pairs that become one token, the most frequent first.
    """
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [left + right for left, right in merges]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>")])
    backend.add_tokens([AddedToken("</s>", rstrip=True, normalized=False)])
    backend.add_special_tokens(
        [AddedToken(token, rstrip=token != "<|endoftext|>", normalized=False) for token in _ADDED_TOKENS]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def tiny_phi3(
    *, seed: int = 0, longrope: bool = False, sliding_window: int | None = None
) -> tuple[Phi3ForCausalLM, PreTrainedTokenizerFast]:
    """A random Phi-3 of 2 layers with 64 q, 32 k and 32 v rows, and its tokenizer; no file is read.

    Args:
        seed: of the weights; the caller's random state is left as it was.
        longrope: positions up to 256 with other rotary factors past 64, as in the 128k models.
        sliding_window: attention window in tokens.
    """
    tokenizer = tiny_tokenizer()
    max_positions = 256 if longrope else 512
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    if longrope:
        rope = {
            **rope,
            "rope_type": "longrope",
            "factor": 4.0,
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [2.0 + 0.5 * i for i in range(8)],
        }
    config = Phi3Config(
        vocab_size=-(-len(tokenizer) // 32) * 32,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        original_max_position_embeddings=64 if longrope else max_positions,
        rope_parameters=rope,
        sliding_window=sliding_window,
        # At Phi-3's 0.02 so small a model's logits would all but tie.
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Phi3ForCausalLM(config).eval()
    stops = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|assistant|>", "<|end|>"])
    model.generation_config.eos_token_id = stops
    return model, tokenizer
