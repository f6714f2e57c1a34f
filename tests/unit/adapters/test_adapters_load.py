"""A saved adapter is put on the base that it was trained on, or refused with one message."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from phlora.adapters import load as module
from phlora.adapters.load import load_adapter
from phlora.errors import ModelError
from phlora.models.fingerprint import fingerprint
from phlora.testing import tiny_phi3

FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def make_adapter(folder, *, targets=FUSED, init=False, base_fingerprint=None):
    model, _ = tiny_phi3()
    config = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=init)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(folder)
    if base_fingerprint:
        (folder / "phlora.json").write_text(json.dumps({"base_fingerprint": base_fingerprint}))
    return adapted


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
    (note,) = load_adapter(tiny_phi3()[0], tmp_path).report.notes
    assert "one side was rounded to 16 bits" in note
    with pytest.raises(ModelError, match="trained on other weights"):
        load_adapter(tiny_phi3(seed=1)[0], tmp_path)
    notes = load_adapter(tiny_phi3()[0].bfloat16(), tmp_path).report.notes
    assert any("cannot be told" in note for note in notes)


def test_names_that_no_module_has_fail_with_counts_and_leave_the_base(tmp_path):
    make_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    split = {}
    for name, tensor in tensors.items():
        for fused, parts in (("qkv_proj", "qkv"), ("gate_up_proj", ("gate", "up"))):
            if fused in name:
                split |= {name.replace(fused, f"{part}_other"): tensor.clone() for part in parts}
        if "o_proj" in name or "down_proj" in name:
            split[name] = tensor
    save_file(split, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    names = ["q_other", "k_other", "v_other", "o_proj", "gate_other", "up_other", "down_proj"]
    edit_json(tmp_path / "adapter_config.json", target_modules=names)
    base, _ = tiny_phi3()
    with pytest.raises(ModelError, match="20 of 28 tensors unused"):
        load_adapter(base, tmp_path)
    assert [n for n, _ in base.named_parameters()] == [n for n, _ in tiny_phi3()[0].named_parameters()]


def test_parts_of_fused_weights_with_rows_of_the_whole_are_refused_and_leave_the_base(tmp_path):
    make_adapter(tmp_path, targets=["qkv_proj"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    split = {name.replace("qkv_proj", "q_proj"): tensor for name, tensor in tensors.items()}
    save_file(split, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    edit_json(tmp_path / "adapter_config.json", target_modules=["q_proj"])
    base, _ = tiny_phi3()
    with pytest.raises(ModelError, match="q_proj: lora_B has 128 rows"):
        load_adapter(base, tmp_path)
    assert [n for n, _ in base.named_parameters()] == [n for n, _ in tiny_phi3()[0].named_parameters()]


def test_adapter_file_with_a_missing_tensor_is_refused(tmp_path):
    make_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 tensors"):
        load_adapter(tiny_phi3()[0], tmp_path)


def full(*arguments, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize("what", ["PeftModelForCausalLM", "PeftModelForCausalLM.load_adapter"])
def test_a_full_memory_is_not_called_an_adapter_that_does_not_fit(tmp_path, monkeypatch, what):
    make_adapter(tmp_path)
    monkeypatch.setattr(f"{module.__name__}.{what}", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_adapter(tiny_phi3()[0], tmp_path)


def test_a_base_that_the_adapter_changes_is_as_it_was_after_a_refusal(tmp_path):
    """PEFT takes the start of a PiSSA adapter out of the base before it looks for the tensors."""
    make_adapter(tmp_path, init="pissa")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    base, before = tiny_phi3()[0], tiny_phi3()[0].state_dict()
    with pytest.raises(ModelError, match="lacks 1 tensors"):
        load_adapter(base, tmp_path)
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_adapter_of_another_size_is_refused(tmp_path):
    make_adapter(tmp_path)
    edit_json(tmp_path / "adapter_config.json", r=3)
    with pytest.raises(ModelError, match="has the rank 3 there, and 2"):
        load_adapter(tiny_phi3()[0], tmp_path)


def test_adapter_that_changes_nothing_is_an_error_unless_allowed(tmp_path):
    make_adapter(tmp_path, init=True)
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
    with pytest.raises(ModelError, match=r"`base_fingerprint` is `\[1\]`"):
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
