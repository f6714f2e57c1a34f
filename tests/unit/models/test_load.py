import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from phlora.adapters.load import load_adapter
from phlora.config import ModelConfig
from phlora.errors import ConfigError, ModelError
from phlora.models import tokenizer as tokenizer_module
from phlora.models.fingerprint import fingerprint
from phlora.models.load import load_model
from phlora.models.tokenizer import load_tokenizer, prepare_tokenizer
from phlora.testing import tiny_phi3

FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


@pytest.fixture
def tiny_folder(tmp_path):
    model, tokenizer = tiny_phi3()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def make_adapter(folder, *, targets=FUSED, zero=False, base_fingerprint=None):
    model, _ = tiny_phi3()
    config = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=zero)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(folder)
    if base_fingerprint:
        (folder / "phlora.json").write_text(json.dumps({"base_fingerprint": base_fingerprint}))
    return adapted


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


def test_remote_code_is_never_used_for_phi3(tiny_folder):
    edit_json(tiny_folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"})
    (tiny_folder / "modeling_phi3.py").write_text("raise SystemExit('remote code ran')")
    loaded = load_model(tiny_folder, device="cpu", dtype="float32", trust_remote_code=True)
    assert type(loaded.model).__module__ == "transformers.models.phi3.modeling_phi3"
    assert any("trust_remote_code is not used" in note for note in loaded.notes)


def test_remote_code_of_others_has_to_be_trusted(tiny_folder):
    edit_json(
        tiny_folder / "config.json", model_type="homemade", auto_map={"AutoConfig": "configuration.Config"}
    )
    with pytest.raises(ModelError, match="trust_remote_code: true"):
        load_tokenizer(tiny_folder)


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def drop_tensor(folder):
    edit_weights(folder, lambda tensors: tensors.pop("model.norm.weight"))


def shrink_tensor(folder):
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "weights cannot be read"),
        (drop_tensor, r"lack 1 tensors .* model\.norm\.weight"),
        (shrink_tensor, "weights cannot be read"),
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


# ---------------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_is_the_same_in_float32_and_bfloat16_and_under_an_adapter(tiny_folder):
    full, half = (
        load_model(tiny_folder, device="cpu", dtype=dtype).fingerprint for dtype in ("float32", "bfloat16")
    )
    assert full == half
    adapted = get_peft_model(tiny_phi3()[0], LoraConfig(target_modules=FUSED))
    assert fingerprint(adapted) == full


def test_fingerprint_tells_weights_of_the_same_shape_apart(tiny_folder):
    base = fingerprint(tiny_phi3()[0])
    assert base == fingerprint(tiny_phi3()[0])
    assert base != fingerprint(tiny_phi3(seed=1)[0])
    assert load_model(tiny_folder, device="cpu", dtype="float16").fingerprint != base


# -------------------------------------------------------------------------------------------------- adapter


def test_adapter_loads_with_a_report(tmp_path):
    made = make_adapter(tmp_path, base_fingerprint=fingerprint(tiny_phi3()[0]))
    base, _ = tiny_phi3()
    loaded = load_adapter(base, tmp_path)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, made.eval()(ids).logits)
    assert loaded.report.num_tensors == 2 * 4 * 2
    assert loaded.report.delta_norm > 0
    assert loaded.report.notes == ()
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_trainable_adapter_trains_its_own_tensors_only(tmp_path):
    make_adapter(tmp_path)
    loaded = load_adapter(tiny_phi3()[0], tmp_path, trainable=True)
    assert {n.split(".")[-3] for n, p in loaded.model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    assert any("not compared" in note for note in loaded.report.notes)


def test_adapter_on_other_weights_of_the_same_shape_is_refused(tmp_path):
    make_adapter(tmp_path, base_fingerprint=fingerprint(tiny_phi3()[0]))
    with pytest.raises(ModelError, match="trained on other weights"):
        load_adapter(tiny_phi3(seed=1)[0], tmp_path)


def test_float16_bases_are_compared_where_they_can_be(tmp_path):
    half = fingerprint(tiny_phi3()[0].half())
    assert half.startswith("float16:")
    make_adapter(tmp_path, base_fingerprint=half)
    assert load_adapter(tiny_phi3()[0], tmp_path).report.notes == ()
    with pytest.raises(ModelError, match="trained on other weights"):
        load_adapter(tiny_phi3(seed=1)[0], tmp_path)
    notes = load_adapter(tiny_phi3()[0].bfloat16(), tmp_path).report.notes
    assert any("cannot be told" in note for note in notes)


def test_split_names_on_a_fused_base_fail_with_counts_and_leave_the_base(tmp_path):
    make_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    split = {}
    for name, tensor in tensors.items():
        for fused, parts in (("qkv_proj", "qkv"), ("gate_up_proj", ("gate", "up"))):
            if fused in name:
                split |= {name.replace(fused, f"{part}_proj"): tensor.clone() for part in parts}
        if "o_proj" in name or "down_proj" in name:
            split[name] = tensor
    save_file(split, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    edit_json(tmp_path / "adapter_config.json", target_modules=names)
    base, _ = tiny_phi3()
    with pytest.raises(ModelError, match="20 of 28 tensors unused"):
        load_adapter(base, tmp_path)
    assert [n for n, _ in base.named_parameters()] == [n for n, _ in tiny_phi3()[0].named_parameters()]


def test_adapter_file_with_a_missing_tensor_is_refused(tmp_path):
    make_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 tensors"):
        load_adapter(tiny_phi3()[0], tmp_path)


def test_adapter_of_another_size_is_refused(tmp_path):
    make_adapter(tmp_path)
    edit_json(tmp_path / "adapter_config.json", r=3)
    with pytest.raises(ModelError, match="sizes do not fit"):
        load_adapter(tiny_phi3()[0], tmp_path)


def test_adapter_that_changes_nothing_is_an_error_unless_allowed(tmp_path):
    make_adapter(tmp_path, zero=True)
    with pytest.raises(ModelError, match="every lora_B is zero"):
        load_adapter(tiny_phi3()[0], tmp_path)
    assert load_adapter(tiny_phi3()[0], tmp_path, allow_zero=True).report.delta_norm == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["lora_A", "lora_B"])
def test_an_adapter_with_values_that_are_no_numbers_is_refused(tmp_path, kind, value):
    make_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if kind in name)[0, 0] = value
    save_file(tensors, file)
    with pytest.raises(ModelError, match=f"{kind}.* no finite numbers"):
        load_adapter(tiny_phi3()[0], tmp_path)


def test_a_fingerprint_that_is_no_text_is_told(tmp_path):
    make_adapter(tmp_path, base_fingerprint=[1])
    with pytest.raises(ModelError, match="`base_fingerprint` is no text"):
        load_adapter(tiny_phi3()[0], tmp_path)


def test_unusable_adapter_folders_are_told(tmp_path):
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ModelError, match=r"does not exist[\s\S]*adapter`"):
        load_adapter(tiny_phi3()[0], tmp_path / "adaptr")
    with pytest.raises(ModelError, match="lacks adapter_config.json and adapter_model.safetensors"):
        load_adapter(tiny_phi3()[0], tmp_path / "adapter")
    make_adapter(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ModelError, match="adapter cannot be read"):
        load_adapter(tiny_phi3()[0], tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", peft_type="IA3")
    with pytest.raises(ModelError, match="of the kind IA3"):
        load_adapter(tiny_phi3()[0], tmp_path / "adapter")
