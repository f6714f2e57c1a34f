"""A tokenizer as the vocabulary of a GGUF file, read from tokenizer.json alone.

Two kinds are known to llama.cpp among those that chat models have:

    gpt2    byte-level BPE: tokens, merges, and by `tokenizer.ggml.pre` how a text is cut before it is merged
    llama   SentencePiece's BPE with bytes to fall back on: tokens and scores, which are the ranks of the merges

Whether white space after control tokens is left out, as Phi-3's tokenizer does, llama.cpp (2026.10) decides by
`general.name`: exactly names with "phi-3" or "phi3" have it, and then `</s>`, `<unk>`, `<s>` and `<|endoftext|>` must
be in the vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from phlora.errors import ModelError
from phlora.models.tokenizer import LoadedTokenizer

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT_4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The expression by which a text is cut -> llama.cpp's name for it.
_CUTS = {
    f"{_ENDINGS}|{_LETTERS}" + r"\p{N}{1,3}" + _REST: "llama-bpe",
    f"{_ENDINGS}|{_LETTERS}" + r"\p{N}" + _REST: "qwen2",
    _GPT_4O: "gpt-4o",
}
_NAMED_PHI3 = re.compile(r"phi-?3", re.IGNORECASE)
_NEEDED_BY_PHI3 = ("</s>", "<unk>", "<s>", "<|endoftext|>")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Types of tokens, as llama.cpp numbers them.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTES = 1, 2, 3, 4, 5, 6
# Tokens that are no product of a merge: never the better choice.
_NEVER = -1e9


def model_name(title: str, tokenizer: LoadedTokenizer) -> str:
    """`general.name`: contains "phi-3" exactly when the tokenizer leaves white space after its markers out.

    Raises:
        ModelError: it does, and lacks the tokens that llama.cpp then wants.
    """
    added = tokenizer.tokenizer.added_tokens_decoder.values()
    plain = " ".join(_NAMED_PHI3.sub("phi 3", title).split()) or "model"
    if not any(token.rstrip for token in added):
        return plain
    vocabulary = tokenizer.tokenizer.get_vocab()
    missing = [token for token in _NEEDED_BY_PHI3 if token not in vocabulary]
    if missing:
        raise ModelError(
            f"The tokenizer leaves white space after its markers out and has no {', '.join(missing)}",
            where=str(tokenizer.tokenizer.name_or_path),
            expected=f"{', '.join(_NEEDED_BY_PHI3)}, without which llama.cpp cannot read such a tokenizer",
        )
    return f"phi-3 {plain}"


def write_vocabulary(writer: Any, loaded: LoadedTokenizer, *, vocab_size: int) -> None:
    """Put tokens, merges or scores, special tokens and the chat template into a `gguf.GGUFWriter`.

    Args:
        vocab_size: rows of the embedding; tokens that are missing up to there are filled in.

    Raises:
        ModelError: llama.cpp has no tokenizer of this kind.
    """
    tokenizer: Any = loaded.tokenizer
    where = str(tokenizer.name_or_path)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ModelError("The tokenizer has no tokenizer.json", where=where, expected="a fast tokenizer")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    if spec["model"]["type"] != "BPE":
        raise ModelError(
            f"The tokenizer is of the kind {spec['model']['type']}",
            where=where,
            expected="BPE, as llama.cpp has it",
        )
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if len(vocabulary) and max(vocabulary.values()) >= vocab_size:
        raise ModelError(
            f"The tokenizer has the id {max(vocabulary.values())}, and the model {vocab_size} embeddings",
            where=where,
        )
    texts = [f"[PAD{index}]" for index in range(vocab_size)]
    for text, index in vocabulary.items():
        texts[index] = text
    is_sentencepiece = bool(spec["model"].get("byte_fallback"))
    writer.add_tokenizer_model("llama" if is_sentencepiece else "gpt2")
    writer.add_tokenizer_pre("default" if is_sentencepiece else _pre_tokenizer(spec, where=where))
    writer.add_token_list(texts)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
    if is_sentencepiece:
        writer.add_token_scores(_scores(spec, texts))
        writer.add_add_space_prefix(_prepends_space(spec))
    else:
        writer.add_token_merges(merges)
    writer.add_token_types(_types(spec, texts, vocabulary, is_sentencepiece=is_sentencepiece))
    _write_special(writer, loaded)


def _types(
    spec: Mapping[str, Any], texts: Sequence[str], vocabulary: Mapping[str, int], *, is_sentencepiece: bool
) -> list[int]:
    known = set(vocabulary.values())
    added = {entry["id"]: entry for entry in spec["added_tokens"]}
    unknown = spec["model"].get("unk_token")

    def kind(index: int, text: str) -> int:
        if index not in known:
            return _UNUSED
        if is_sentencepiece and text == unknown:
            return _UNKNOWN
        if index in added:
            return _CONTROL if added[index]["special"] else _USER_DEFINED
        return _BYTES if is_sentencepiece and _BYTE.fullmatch(text) else _NORMAL

    return [kind(index, text) for index, text in enumerate(texts)]


def _scores(spec: Mapping[str, Any], texts: Sequence[str]) -> list[float]:
    """The earlier a merge, the higher the score of what it makes."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(spec["model"]["merges"]):
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        ranks.setdefault(left + right, rank)
    return [-float(ranks[text]) if text in ranks else _NEVER for text in texts]


def _prepends_space(spec: Mapping[str, Any]) -> bool:
    steps = [step for part in ("normalizer", "pre_tokenizer") for step in _steps(spec.get(part))]
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def _pre_tokenizer(spec: Mapping[str, Any], *, where: str) -> str:
    steps = _steps(spec.get("pre_tokenizer"))
    kinds = [step["type"] for step in steps]
    if steps and not steps[-1].get("add_prefix_space"):
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and (cut := _CUTS.get(steps[0]["pattern"].get("Regex", ""))):
            return cut
    raise ModelError(
        f"llama.cpp has no known name for the way in which the tokenizer cuts a text ({', '.join(kinds) or 'none'})",
        where=where,
        expected="that of GPT-2, SmolLM, Llama 3, Qwen 2 or GPT-4o (Phi-4-mini)",
        fix="merge it, and use llama.cpp's own converter: phlora merge",
    )


def _steps(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if not part:
        return []
    return list(part.get("normalizers") or part.get("pretokenizers") or [part])


def _write_special(writer: Any, loaded: LoadedTokenizer) -> None:
    tokenizer: Any = loaded.tokenizer
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    # llama.cpp ends replies at `eos` and `eot`, and at <|end|>, <|endoftext|>, </s> and others by their names.
    others = [index for index in loaded.stop_token_ids if index != tokenizer.eos_token_id]
    turn_end = others[0] if others else None
    if turn_end is not None:
        writer.add_eot_token_id(turn_end)
    if len(others) > 1:
        # The last that it has a place for; a run with more is compared like any other.
        writer.add_eom_token_id(others[1])
    if tokenizer.chat_template:
        # The template writes what begins a chat; llama.cpp would write it a second time.
        writer.add_add_bos_token(False)
        writer.add_chat_template(tokenizer.get_chat_template())
    else:
        ids = tokenizer("a").input_ids
        writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(False)
