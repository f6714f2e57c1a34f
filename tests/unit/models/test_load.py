import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from phlora.config import ModelConfig
from phlora.errors import ConfigError, ModelError
from phlora.models import tokenizer as tokenizer_module
from phlora.models.load import load_model
from phlora.models.tokenizer import load_tokenizer
from phlora.testing import tiny_phi3

FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_folder_loads_with_choices_and_agreeing_tokens(tiny_folder):
    loaded = load_model(tiny_folder, dtype="float32", device="cpu")
    tokenizer = loaded.tokenizer.tokenizer
    assert (loaded.source.kind, loaded.device.type, loaded.dtype.value) == ("folder", "cpu", torch.float32)
    assert loaded.attention.value == loaded.model.config._attn_implementation == "sdpa"
    assert loaded.model.config.use_cache is False
    assert not loaded.model.training
    assert tokenizer.pad_token == "<unk>" and tokenizer.pad_token_id not in loaded.tokenizer.stop_token_ids
    assert loaded.model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert loaded.model.generation_config.eos_token_id == list(loaded.tokenizer.stop_token_ids)
    assert any("<|endoftext|>, ends replies" in note for note in loaded.notes)
    assert torch.equal(loaded.model.lm_head.weight, tiny_phi3()[0].lm_head.weight)


def test_asked_for_settings_arrive(tiny_folder):
    loaded = load_model(
        tiny_folder, dtype="bfloat16", attn_implementation="eager", use_cache=True, device="cpu"
    )
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.model.config._attn_implementation == "eager"
    assert loaded.model.config.use_cache is True


def test_settings_as_one_object_arrive_and_keywords_stand_above_them(tiny_folder):
    wanted = ModelConfig(name=str(tiny_folder), dtype="bfloat16", attn_implementation="eager", device="cpu")
    loaded = load_model(wanted, attn_implementation="sdpa")
    assert loaded.model.dtype == torch.bfloat16 and loaded.attention.value == "sdpa"


def test_a_setting_that_there_is_not_is_told_with_the_nearest(tiny_folder):
    with pytest.raises(
        ConfigError, match="(?s)no setting `attn_implementaton`.*did you mean `attn_implementation`"
    ):
        load_model(tiny_folder, attn_implementaton="sdpa")


def test_files_are_looked_for_once_for_tokenizer_and_weights(tiny_folder, monkeypatch):
    asked, locate = [], tokenizer_module.locate

    def record(*arguments, **options):
        asked.append(arguments)
        return locate(*arguments, **options)

    monkeypatch.setattr(tokenizer_module, "locate", record)
    wanted = ModelConfig(name=str(tiny_folder), dtype="float32", device="cpu")
    load_model(wanted, tokenizer=load_tokenizer(wanted))
    assert len(asked) == 1


def test_vocabulary_is_never_resized(tiny_folder):
    rows = tiny_phi3()[0].get_input_embeddings().weight.shape[0]
    loaded = load_model(tiny_folder, dtype="float32", device="cpu")
    assert loaded.model.get_input_embeddings().weight.shape[0] == rows > len(loaded.tokenizer.tokenizer)


def test_remote_code_is_never_used_for_phi3(tiny_folder):
    edit_json(tiny_folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"})
    (tiny_folder / "modeling_phi3.py").write_text("raise SystemExit('remote code ran')")
    loaded = load_model(tiny_folder, device="cpu", dtype="float32", trust_remote_code=True)
    assert type(loaded.model).__module__ == "transformers.models.phi3.modeling_phi3"
    assert any("trust_remote_code is not used" in note for note in loaded.notes)


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def drop_tensor(folder):
    edit_weights(folder, lambda tensors: tensors.pop("model.norm.weight"))


def shrink_tensor(folder):
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))


def transpose_tensor(folder):
    name = "model.layers.1.mlp.down_proj.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: tensors[name].t().contiguous()}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "weights cannot be read"),
        (drop_tensor, r"lack 1 tensors .* model\.norm\.weight"),
        (shrink_tensor, r"weights cannot be read: model\.norm\.weight has the shape \(3,\).* \(64,\)"),
        (
            transpose_tensor,
            r"layers\.1\.mlp\.down_proj\.weight has the shape \(112, 64\), .* calls for \(64, 112\)",
        ),
        (lambda folder: (folder / "config.json").write_text("{broken"), "configuration cannot be read"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "no"}'), "configuration cannot"),
        (lambda folder: (folder / "tokenizer.json").write_text("{broken"), "tokenizer cannot be read"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer cannot be read"),
    ],
)
def test_damaged_folder_is_one_clear_error(tiny_folder, damage, words):
    damage(tiny_folder)
    with pytest.raises(ModelError, match=words):
        load_model(tiny_folder, device="cpu", dtype="float32")


def test_damaged_gguf_is_one_clear_error(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUFxxxx")
    with pytest.raises(ModelError, match=r"cannot be read"):
        load_model(tmp_path / "model.gguf", device="cpu", dtype="float32")


def test_unused_tensors_are_a_note(tiny_folder):
    edit_weights(tiny_folder, lambda tensors: tensors.update({"extra.weight": torch.ones(2)}))
    loaded = load_model(tiny_folder, device="cpu", dtype="float32")
    assert any("1 tensors of the file are not used, such as extra.weight" in note for note in loaded.notes)


def test_tokenizer_of_a_larger_model_is_refused(tiny_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.add_tokens([f"extra{i}" for i in range(50)])
    tokenizer.save_pretrained(tiny_folder)
    with pytest.raises(ModelError, match="tokenizer that belongs to the model"):
        load_model(tiny_folder, device="cpu", dtype="float32")


def test_loading_is_silent(tiny_folder, capfd):
    load_model(tiny_folder, device="cpu", dtype="float32")
    assert capfd.readouterr() == ("", "")
