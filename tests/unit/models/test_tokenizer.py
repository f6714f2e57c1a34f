"""A tokenizer is made ready for training, and what comes with a model is read only where it may be."""

import json

import pytest

from phlora.errors import ModelError
from phlora.models.load import load_model
from phlora.models.tokenizer import load_tokenizer, prepare_tokenizer


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
