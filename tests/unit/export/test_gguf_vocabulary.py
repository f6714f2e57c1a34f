"""Vocabularies in GGUF files make the same tokens in llama.cpp, in five languages and around control tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from phlora.data.dataset import load_rows
from phlora.errors import ModelError
from phlora.export.agreement import questions_of
from phlora.export.gguf_file import Weights, write_gguf_model
from phlora.export.gguf_vocabulary import _CUTS, _pre_tokenizer, model_name
from phlora.export.llamacpp_client import open_gguf
from phlora.models.tokenizer import prepare_tokenizer
from phlora.testing import (
    chat_rows,
    chatml_tokenizer,
    llama2_tokenizer,
    phi3_tokenizer,
    tiny_llama,
    tiny_phi3,
)


def with_unk(tokenizer: Any, *, rstrip: bool = True) -> Any:
    """With the tokens that Phi-3's vocabulary begins with."""
    tokenizer.add_special_tokens({"unk_token": "<unk>", "bos_token": "<s>"})
    tokenizer.add_tokens([AddedToken("</s>", rstrip=rstrip, normalized=False)])
    return tokenizer


TOKENIZERS = {
    "phi3": lambda: with_unk(phi3_tokenizer()),
    "phi3-keeps-space": lambda: with_unk(phi3_tokenizer(rstrip=False), rstrip=False),
    "chatml": chatml_tokenizer,
    "llama2": llama2_tokenizer,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompts_are_the_same_tokens_in_llama_cpp(name: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp (xllamacpp) is not installed")
    tokenizer = TOKENIZERS[name]()
    size = -(-len(tokenizer) // 32) * 32
    model: Any = tiny_llama(vocab_size=size, hidden_size=64, intermediate_size=64)
    loaded = prepare_tokenizer(tokenizer, config=model.config)
    state = model.state_dict()
    weights = Weights(
        shapes={key: tuple(value.shape) for key, value in state.items()}, read=state.__getitem__
    )
    file = tmp_path / "model.gguf"
    title = model_name("Phi-3 of mine", loaded)
    assert ("phi-3" in title) == (name == "phi3")
    write_gguf_model(file, weights, model.config, loaded, file_type="f32", name=title)
    rows = load_rows(chat_rows(10, turns=2)).rows
    questions, _ = questions_of(rows, loaded, replace_limit(model.config), max_new_tokens=1, most=10)
    assert len(questions) == 10
    with open_gguf(file, context=512) as client:
        for question in questions:
            assert client.prompt_ids(question) == question.prompt_ids


def replace_limit(config: Any) -> Any:
    config.max_position_embeddings = 4096
    return config


def test_a_tokenizer_that_strips_needs_the_tokens_that_llama_cpp_asks_for() -> None:
    tokenizer = phi3_tokenizer()
    tokenizer.add_special_tokens({"unk_token": "<unk>"})
    loaded = prepare_tokenizer(tokenizer, config=tiny_phi3()[0].config)
    with pytest.raises(ModelError, match="has no </s>, <s>"):
        model_name("x", loaded)


@pytest.mark.parametrize(("cut", "name"), _CUTS.items())
def test_cuts_of_texts_are_known_by_their_expression(cut: str, name: str) -> None:
    steps = [
        pre_tokenizers.Split(Regex(cut), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    assert _pre_tokenizer(spec_of(pre_tokenizers.Sequence(steps)), where="") == name


def test_other_cuts_are_refused() -> None:
    with pytest.raises(ModelError, match="(?s)Whitespace.*phlora merge"):
        _pre_tokenizer(spec_of(pre_tokenizers.Whitespace()), where="")


def test_digits_alone_are_smollms_cut() -> None:
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    assert _pre_tokenizer(spec_of(pre_tokenizers.Sequence(steps)), where="") == "smollm"


def spec_of(pre_tokenizer: Any) -> Any:
    import json

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    return json.loads(tokenizer.to_str())


def test_a_vocabulary_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    model, tokenizer = tiny_phi3()
    loaded = prepare_tokenizer(tokenizer, config=model.config)
    model.config.vocab_size = 100
    with pytest.raises(ModelError, match="100 embeddings"):
        write_gguf_model(
            tmp_path / "m.gguf",
            Weights(shapes={}, read=lambda name: None),
            model.config,
            loaded,  # type: ignore[arg-type, return-value]
            file_type="f32",
            name="x",
        )
    word = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), eos_token="a"
    )
    with pytest.raises(ModelError, match="of the kind WordLevel"):
        write_gguf_model(
            tmp_path / "m.gguf",
            Weights(shapes={}, read=lambda name: None),
            tiny_phi3()[0].config,  # type: ignore[arg-type, return-value]
            replace(loaded, tokenizer=word),
            file_type="f32",
            name="x",
        )
