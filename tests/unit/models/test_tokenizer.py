"""A tokenizer is made ready for training, and what comes with a model is read only where it may be."""

import json

import pytest
from transformers import AutoTokenizer

from phlora.config import ModelConfig
from phlora.errors import ConfigError, ModelError
from phlora.models.load import load_model
from phlora.models.tokenizer import (
    find_files,
    load_tokenizer,
    model_config,
    prepare_tokenizer,
    read_tokenizer,
)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_tokenizer_alone_equals_the_models(tiny_folder):
    alone, loaded = load_tokenizer(tiny_folder), load_model(tiny_folder, device="cpu", dtype="float32")
    assert alone.stop_token_ids == loaded.tokenizer.stop_token_ids
    assert alone.tokenizer.pad_token == loaded.tokenizer.tokenizer.pad_token
    assert alone.notes == loaded.notes


def test_tokenizer_without_a_template_says_so(tiny):
    model, tokenizer = tiny
    tokenizer.chat_template = None
    prepared = prepare_tokenizer(tokenizer, config=model.config)
    assert any("no chat template" in note for note in prepared.notes)


def test_remote_code_of_others_has_to_be_trusted(tiny_folder):
    edit_json(
        tiny_folder / "config.json", model_type="homemade", auto_map={"AutoConfig": "configuration.Config"}
    )
    with pytest.raises(ModelError, match="trust_remote_code: true"):
        load_tokenizer(tiny_folder)


def test_a_setting_that_there_is_not_is_told_with_the_nearest(tiny_folder):
    with pytest.raises(ConfigError, match="(?s)no setting `revison`.*did you mean `revision`"):
        load_tokenizer(tiny_folder, revison="main")


def test_settings_stand_above_those_of_the_object():
    config = model_config(ModelConfig(name="m", revision="a", offline=True), {"revision": "b"})
    assert (config.name, config.revision, config.offline) == ("m", "b", True)


def test_a_pad_token_that_ends_replies_is_replaced_and_one_that_does_not_stays(tiny):
    model, tokenizer = tiny
    size = len(tokenizer)
    prepared = prepare_tokenizer(tokenizer, config=model.config, generation_config=model.generation_config)
    assert tokenizer.pad_token == "<unk>" and tokenizer.pad_token_id not in prepared.stop_token_ids
    assert any("<|endoftext|>, ends replies" in note for note in prepared.notes)
    assert len(tokenizer) == size
    again = prepare_tokenizer(tokenizer, config=model.config)
    assert tokenizer.pad_token == "<unk>" and not any("Padding" in note for note in again.notes)


def test_the_tokenizer_of_an_adapter_folder_is_read_beside_the_base_s_configuration(tiny_folder, tmp_path):
    base = load_tokenizer(tiny_folder)
    own = AutoTokenizer.from_pretrained(tiny_folder)
    own.chat_template += "{# its own #}"
    own.save_pretrained(tmp_path / "adapter")
    found = read_tokenizer(base.files, folder=tmp_path / "adapter")
    assert found.tokenizer.chat_template == own.chat_template
    assert found.stop_token_ids == base.stop_token_ids
    (tmp_path / "adapter" / "tokenizer.json").write_text("{broken")
    with pytest.raises(ModelError, match="The adapter's tokenizer cannot be read"):
        read_tokenizer(base.files, folder=tmp_path / "adapter")


def test_a_folder_without_weights_is_enough_where_none_are_needed(tiny_folder):
    (tiny_folder / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        find_files(ModelConfig(name=str(tiny_folder)))
    files = find_files(ModelConfig(name=str(tiny_folder)), needs_weights=False)
    assert files.config.model_type == "phi3"
    assert files.belong_to(ModelConfig(name=str(tiny_folder), dtype="bfloat16"))
    assert not files.belong_to(ModelConfig(name=str(tiny_folder), revision="other"))
