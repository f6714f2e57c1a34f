"""Small tokenizers made in the process, with the control tokens and chat templates of real families."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from phlora.testing.rows import LANGUAGES

PHI3_SPECIALS = ("<|endoftext|>", "<|assistant|>", "<|end|>", "<|system|>", "<|user|>")
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<|system|>\n' + message['content'] + '<|end|>\n' }}{% elif message['role'] == 'user' %}"
    "{{ '<|user|>\n' + message['content'] + '<|end|>\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}"
    "{% endif %}"
)
PHI3_WITHOUT_SYSTEM = PHI3.replace("message['role'] == 'system'", "false")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = CHATML.replace("message['content']", "message['content'] | trim")
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + "
    "message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + ' ' + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% endif %}{% endfor %}"
)
# Drops the reasoning of earlier turns, so that the rendering depends on the contents.
REASONING = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and not loop.last and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_fast: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
_CORPUS = [
    *LANGUAGES.values(),
    "What is the capital of France? The capital of France is Paris. system user assistant\n\n    def f():\n",
]


def _with_specials(tokenizer: Tokenizer, specials: tuple[str, ...], *, rstrip: bool) -> None:
    tokenizer.add_special_tokens([AddedToken(token, rstrip=rstrip, normalized=False) for token in specials])


@cache
def _byte_level(specials: tuple[str, ...], rstrip: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    _with_specials(tokenizer, specials, rstrip=rstrip)
    return tokenizer.to_str()


def phi3_tokenizer(template: str = PHI3, *, rstrip: bool = True) -> PreTrainedTokenizerFast:
    """Phi-3's control tokens, which swallow the white space after them as Phi-3's do."""
    text = _byte_level(PHI3_SPECIALS, rstrip)
    return _fast(
        tokenizer_object=Tokenizer.from_str(text),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=template,
    )


def chatml_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    """ChatML's turns, as Qwen's and SmolLM's: `<|im_start|>ROLE … <|im_end|>`."""
    text = _byte_level(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), False)
    return _fast(
        tokenizer_object=Tokenizer.from_str(text),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
    )


def llama2_tokenizer(template: str = LLAMA2) -> PreTrainedTokenizerFast:
    """Sentencepiece-like: spaces become ▁ and one is put before every stretch of text; adds a BOS token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    # The trainer flags the byte tokens as special; in a real vocabulary they are ordinary tokens.
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = parts["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return _fast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        chat_template=template,
    )
