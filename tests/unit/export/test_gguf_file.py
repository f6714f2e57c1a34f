"""GGUF files: the sums in them, and that llama.cpp computes what transformers computes from the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from phlora.adapters.peft_folder import read_portable
from phlora.config import ModelConfig
from phlora.data.dataset import load_rows
from phlora.errors import EnvironmentProblem, ModelError
from phlora.export.agreement import Answer, Bound, Question, compare_client, own_answers, questions_of
from phlora.export.gguf_file import (
    Weights,
    load_gguf_weights,
    merged_weights,
    write_gguf_adapter,
    write_gguf_model,
)
from phlora.export.gguf_vocabulary import model_name
from phlora.export.llamacpp_client import open_gguf
from phlora.models.checkpoint import Checkpoint, open_checkpoint
from phlora.models.tokenizer import LoadedTokenizer, find_files, read_tokenizer
from phlora.testing import (
    chat_rows,
    tiny_adapter,
    tiny_folder,
    tiny_gemma2,
    tiny_llama,
    tiny_phi3,
    tiny_tokenizer,
)

ROWS = load_rows(chat_rows(6)).rows
LLAMACPP = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("xllamacpp") is None,
    reason="llama.cpp (xllamacpp) is not installed",
)


def saved(folder: Path, kind: str) -> tuple[Any, Checkpoint, LoadedTokenizer]:
    """A tiny model as transformers loads it, the tensors of its files, and its tokenizer."""
    model: Any
    model, tokenizer = tiny_phi3(longrope=kind == "longrope", sliding_window=40 if kind == "window" else None)
    if kind == "llama":
        size = -(-len(tokenizer) // 32) * 32
        model = tiny_llama(vocab_size=size, hidden_size=64, intermediate_size=64, initializer_range=0.1)
    if kind == "longrope":
        # llama.cpp rounds contexts up to 256.
        model.config.max_position_embeddings, model.config.original_max_position_embeddings = 1024, 256
        model.config.rope_parameters["original_max_position_embeddings"] = 256
    if kind == "tied":
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    files = find_files(ModelConfig(name=str(folder)))
    checkpoint = open_checkpoint(files.location)
    assert checkpoint is not None
    return AutoModelForCausalLM.from_pretrained(folder).eval(), checkpoint, read_tokenizer(files)


def written(folder: Path, kind: str) -> tuple[Any, LoadedTokenizer, Path]:
    model, checkpoint, tokenizer = saved(folder / "base", kind)
    file = folder / "model.gguf"
    write_gguf_model(
        file,
        merged_weights(checkpoint, None),
        model.config,
        tokenizer,
        file_type="f32",
        name=model_name("x", tokenizer),
    )
    return model, tokenizer, file


def verdict(model: Any, tokenizer: LoadedTokenizer, file: Path, *, context: int = 128, **options: Any) -> Any:
    questions, left_out = questions_of(ROWS, tokenizer, model.config, max_new_tokens=8, most=4)
    own = own_answers(model, tokenizer, questions, max_new_tokens=8)
    with open_gguf(file, context=context, **options) as client:
        return compare_client(
            client, questions, own, max_new_tokens=8, bound=Bound(largest=0.02), num_left_out=left_out
        )


@LLAMACPP
@pytest.mark.parametrize("kind", ["phi3", "llama", "longrope", "window", "tied"])
def test_llama_cpp_answers_like_transformers(kind: str, tmp_path: Path) -> None:
    """Keys and values in float16 move log-probabilities by some thousandths."""
    found = verdict(*written(tmp_path, kind))
    assert found.verified and found.num_prompts > 0, found.summary()


@LLAMACPP
@pytest.mark.parametrize("place", [0, 1, 2])
def test_answers_that_end_themselves_end_in_llama_cpp(tmp_path: Path, place: int) -> None:
    model, checkpoint, tokenizer = saved(tmp_path / "base", "phi3")
    tokenizer = replace(tokenizer, stop_token_ids=(282, 275, 276))
    end = tokenizer.stop_token_ids[place]
    with torch.no_grad():
        model.lm_head.weight[end] *= 4
    state = dict(model.state_dict())
    weights = Weights(
        shapes={name: tuple(value.shape) for name, value in state.items()}, read=state.__getitem__
    )
    file = tmp_path / "model.gguf"
    write_gguf_model(file, weights, model.config, tokenizer, file_type="f32", name=model_name("x", tokenizer))
    questions, _ = questions_of(ROWS, tokenizer, model.config, max_new_tokens=16, most=24)
    own = own_answers(model, tokenizer, questions, max_new_tokens=16)
    ended = [(question, answer) for question, answer in zip(questions, own, strict=True) if answer.stopped]
    with open_gguf(file, context=128) as client:
        found = [client.answer(question.prompt_ids, max_new_tokens=16) for question, _ in ended]
    # Keys and values in float16 turn a near tie now and then, long before the end.
    alike = [
        (theirs, mine)
        for theirs, (_, mine) in zip(found, ended, strict=True)
        if theirs.token_ids[: len(mine.token_ids)] == mine.token_ids
    ]
    assert any(mine.token_ids for _, mine in alike), "or this tests nothing"
    assert all(theirs.stopped and theirs.token_ids == mine.token_ids for theirs, mine in alike)


@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_weights_are_read_back_into_their_places(kind: str, tmp_path: Path) -> None:
    model, _, file = written(tmp_path, kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_gguf_weights(model, file)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@LLAMACPP
def test_a_context_beyond_the_original_is_caught(tmp_path: Path) -> None:
    """llama.cpp then takes the long factors for short rows too."""
    assert not verdict(*written(tmp_path, "longrope"), context=512).verified


@LLAMACPP
@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_an_adapter_counts_at_its_scale(kind: str, tmp_path: Path) -> None:
    model, tokenizer, file = written(tmp_path, kind)
    folder = tiny_adapter(tmp_path / "base", tmp_path / "adapter", lora_alpha=3)
    adapter = tmp_path / "adapter.gguf"
    write_gguf_adapter(adapter, read_portable(folder), model.config, name="a")
    from phlora import load_adapter

    tuned = load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder).model
    at_zero, at_one = (verdict(model, tokenizer, file, adapter=adapter, scale=scale) for scale in (0.0, 1.0))
    assert at_zero.verified and not at_one.verified
    assert verdict(tuned, tokenizer, file, adapter=adapter, scale=1.0).verified


def test_sums_are_those_of_float32(tmp_path: Path) -> None:
    model, checkpoint, tokenizer = saved(tmp_path / "base", "phi3")
    adapter = read_portable(tiny_adapter(tmp_path / "base", tmp_path / "adapter", lora_alpha=3))
    file = tmp_path / "m.gguf"
    write_gguf_model(
        file, merged_weights(checkpoint, adapter), model.config, tokenizer, file_type="f32", name="x"
    )
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    layer = next(layer for layer in adapter.layers if layer.name.endswith("1.self_attn.qkv_proj"))
    delta = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    wanted = model.get_submodule(layer.name).weight.double() + delta
    got = torch.from_numpy(np.array(tensors["blk.1.attn_qkv.weight"])).double()
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert np.array_equal(tensors["output_norm.weight"], model.model.norm.weight.detach().numpy())


def test_metadata_of_phi3(tmp_path: Path) -> None:
    _, _, file = written(tmp_path, "longrope")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    assert fields["general.architecture"] == "phi3" and fields["general.name"] == "phi-3 x"
    assert fields["phi3.attention.sliding_window"] == 0 and fields["phi3.rope.dimension_count"] == 16
    assert fields["phi3.rope.scaling.original_context_length"] == 256
    assert fields["phi3.rope.scaling.attn_factor"] == pytest.approx((1 + np.log(4) / np.log(256)) ** 0.5)
    names = {tensor.name for tensor in gguf.GGUFReader(file).tensors}
    assert {"rope_factors_long.weight", "rope_factors_short.weight", "blk.0.ffn_up.weight"} <= names
    assert (
        fields["tokenizer.ggml.add_bos_token"] is False
        and "<|assistant|>" in fields["tokenizer.chat_template"]
    )


def test_an_adapter_of_other_sizes_is_refused(tmp_path: Path) -> None:
    _, checkpoint, _ = saved(tmp_path / "base", "phi3")
    llama = tiny_llama()
    llama.save_pretrained(tmp_path / "llama")
    adapter = read_portable(tiny_adapter(tmp_path / "llama", tmp_path / "adapter", target_modules=["o_proj"]))
    with pytest.raises(ModelError, match="o_proj of .*, and the base one of"):
        merged_weights(checkpoint, adapter)


def test_other_kinds_of_models_are_refused(tmp_path: Path) -> None:
    _, checkpoint, tokenizer = saved(tmp_path / "base", "phi3")
    with pytest.raises(ModelError, match="gemma2 are not written as GGUF.*"):
        write_gguf_model(
            tmp_path / "m.gguf",
            merged_weights(checkpoint, None),
            tiny_gemma2().config,
            tokenizer,
            file_type="f32",
            name="x",
        )
    config = tiny_phi3()[0].config
    config.rope_parameters["rope_type"] = "yarn"
    with pytest.raises(ModelError, match="Rotations of the kind yarn"):
        write_gguf_model(
            tmp_path / "m.gguf",
            merged_weights(checkpoint, None),
            config,
            tokenizer,
            file_type="f32",
            name="x",
        )


@LLAMACPP
def test_a_torn_file_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(EnvironmentProblem, match="does not open"), open_gguf(tmp_path / "m.gguf", context=64):
        pass


def test_the_tiny_tokenizer_is_phi3s(tmp_path: Path) -> None:
    assert any(token.rstrip for token in tiny_tokenizer().added_tokens_decoder.values())
    assert tiny_folder(tmp_path / "b").is_dir()


@dataclass
class RunsOn:
    """A client that knows one stop too few."""

    name: str = "one"

    def prompt_ids(self, question: Question) -> list[int]:
        return question.prompt_ids

    def answer(self, prompt_ids: Sequence[int], *, max_new_tokens: int) -> Answer:
        return Answer(token_ids=[5, 9, 9], logprobs=[-0.5, -0.1, -0.1], stopped=False)

    def text(self, ids: Sequence[int]) -> str:
        return str(ids)


@pytest.mark.parametrize("largest", [0.1, None])
def test_a_client_that_goes_on_past_the_stop_is_refused(largest: float | None) -> None:
    own = Answer(
        token_ids=[5], logprobs=[-0.5], stopped=True, likeliest=({5: -0.5, 6: -2.0}, {9: -0.1, 5: -3.0})
    )
    asked = [Question(messages=None, tools=None, prompt_ids=[1])]
    found = compare_client(RunsOn(), asked, [own], max_new_tokens=3, bound=Bound(largest=largest))
    assert not found.verified and found.stops_differing == 1
