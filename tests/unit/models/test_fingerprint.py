"""The fingerprint: every byte counts, one checkpoint has one, and those of earlier versions are still known."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from phlora.adapters.load import load_adapter
from phlora.errors import ModelError
from phlora.models.fingerprint import (
    are_same,
    fingerprint,
    identity_of,
    keep_identity,
    same_fingerprints,
    split_fingerprint,
)
from phlora.models.load import load_model
from phlora.testing import tiny_folder, tiny_phi3

FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
PLACE = "model.layers.1.mlp.down_proj.weight"


def saved(model, folder: Path) -> Path:
    tiny_folder(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def half_folder(tmp_path: Path) -> Path:
    return saved(tiny_phi3()[0].bfloat16(), tmp_path / "half")


def adapter_of(folder: Path, recorded: str) -> Path:
    model = get_peft_model(
        tiny_phi3()[0], LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    )
    model.save_pretrained(folder)
    (folder / "phlora.json").write_text(json.dumps({"base_fingerprint": recorded}))
    return folder


def test_one_weight_of_all_changes_it(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    before = load_model(folder, device="cpu", dtype="float32").fingerprint
    tensors = load_file(folder / "model.safetensors")
    # Between two of the values that are sampled.
    tensors[PLACE].view(-1)[7] += 1e-6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    after = load_model(folder, device="cpu", dtype="float32").fingerprint
    assert before != after
    assert before.partition("/")[0] == after.partition("/")[0]
    with pytest.raises(ModelError, match="trained on other weights"):
        load_adapter(
            load_model(folder, device="cpu", dtype="float32").model, adapter_of(tmp_path / "a", before)
        )


@pytest.mark.parametrize("storage", ["auto", "bfloat16", "float32"])
def test_one_checkpoint_has_one_whatever_it_is_stored_as(half_folder: Path, storage: str) -> None:
    expected = fingerprint(AutoModelForCausalLM.from_pretrained(half_folder, dtype=torch.bfloat16))
    loaded = load_model(half_folder, device="cpu", dtype="float32", storage_dtype=storage)
    assert loaded.fingerprint == expected == fingerprint(loaded.model, trusted=False)
    assert expected.count("/") == 1
    # The same values in 32 bits are the same weights.
    assert fingerprint(AutoModelForCausalLM.from_pretrained(half_folder, dtype=torch.float32)) == expected


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_quantised_base_is_known_by_its_checkpoint(half_folder: Path, storage: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    dense = load_model(half_folder, device="cpu", dtype="float32")
    loaded = load_model(half_folder, device="cpu", dtype="float32", storage_dtype=storage)
    assert split_fingerprint(loaded.fingerprint) == (dense.fingerprint, storage)
    notes = load_adapter(loaded.model, adapter_of(tmp_path / "a", dense.fingerprint)).report.notes
    assert len(notes) == 1 and f"sits on the {storage} form" in notes[0]


def test_an_object_rounded_from_a_checkpoint_is_known_again(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    full = load_model(folder, device="cpu", dtype="float32")
    # What was rounded away may have been otherwise.
    assert are_same(fingerprint(rounded), identity_of(full.model)) is None
    assert are_same(full.fingerprint, identity_of(rounded)) is None
    notes = load_adapter(full.model, adapter_of(tmp_path / "a", fingerprint(rounded))).report.notes
    assert any("rounded to 16 bits" in note for note in notes)
    rounded.get_parameter(PLACE).data.view(-1)[7] *= 1.01
    assert are_same(full.fingerprint, identity_of(rounded)) is False


def test_a_handed_over_object_is_read_again_whatever_it_remembers(tmp_path: Path) -> None:
    loaded = load_model(tiny_folder(tmp_path), device="cpu", dtype="float32")
    assert fingerprint(copy.deepcopy(loaded.model)) == loaded.fingerprint
    with torch.no_grad():
        loaded.model.get_parameter(PLACE).view(-1)[7] += 1e-3
    assert fingerprint(loaded.model) != loaded.fingerprint
    again = load_model(tiny_folder(tmp_path / "b"), device="cpu", dtype="float32")
    again.model.get_parameter(PLACE).data.view(-1)[7] += 1e-3
    assert fingerprint(again.model, trusted=False) != again.fingerprint


def test_that_of_an_earlier_version_is_compared_by_its_samples(half_folder: Path, tmp_path: Path) -> None:
    loaded = load_model(half_folder, device="cpu", dtype="float32")
    old = loaded.fingerprint.partition("/")[0]
    assert len(old) == len("bfloat16:") + 16
    assert load_adapter(loaded.model, adapter_of(tmp_path / "a", old)).report.notes == ()
    other = tiny_phi3(seed=1)[0]
    assert are_same(old, identity_of(other)) is False
    assert same_fingerprints(old, loaded.fingerprint) and same_fingerprints(loaded.fingerprint, old)
    assert not same_fingerprints(f"{old}+nf4", loaded.fingerprint)
    assert not same_fingerprints(old, fingerprint(other))


def test_an_adapter_that_trains_whole_modules_does_not_hide_the_base() -> None:
    model = tiny_phi3()[0]
    before = fingerprint(model)
    config = LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["lm_head"])
    assert fingerprint(get_peft_model(model, config)) == before


def test_it_is_the_same_whatever_is_computed_with_and_under_an_adapter(tiny_folder: Path) -> None:
    full, *others = (
        load_model(tiny_folder, device="cpu", dtype=dtype).fingerprint
        for dtype in ("float32", "bfloat16", "float16")
    )
    assert others == [full, full]
    adapted = get_peft_model(tiny_phi3()[0], LoraConfig(target_modules=FUSED))
    assert fingerprint(adapted) == full


def test_it_tells_weights_of_the_same_shape_apart() -> None:
    base = fingerprint(tiny_phi3()[0])
    assert base == fingerprint(tiny_phi3()[0])
    assert base != fingerprint(tiny_phi3(seed=1)[0])


def test_it_begins_with_the_hash_of_names_shapes_and_256_rounded_values() -> None:
    """Written down in so many words, because fingerprints of earlier versions stand in saved adapters."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.arange(3000.0).view(30, 100) / 7)
    module.lora_A = nn.Parameter(torch.ones(2))
    values = [number / 7 for number in range(0, 3000, 11)][:256]
    rounded = torch.tensor(values).to(torch.bfloat16).to(torch.float32).numpy().tobytes()
    digest = hashlib.sha256(b"weight (30, 100)" + rounded).hexdigest()[:16]
    assert fingerprint(module).partition("/")[0] == f"bfloat16:{digest}"


def test_a_model_in_float16_says_so_and_can_be_asked_in_either() -> None:
    base, half = identity_of(tiny_phi3()[0]), identity_of(tiny_phi3()[0].half())
    assert str(half).startswith("float16:") and str(base).startswith("bfloat16:")
    assert half.sampled("float16") == base.sampled("float16")
    assert half.whole["float16"] == base.whole["float16"]


def test_a_model_that_is_stored_otherwise_keeps_that_of_its_weights() -> None:
    model = tiny_phi3()[0]
    known = fingerprint(model)
    keep_identity(model, identity_of(model), storage="nf4")
    model.model.norm.weight.data.zero_()
    for kept in (model, copy.deepcopy(model)):
        assert split_fingerprint(fingerprint(kept)) == (known, "nf4")
    assert split_fingerprint(known) == (known, "")


def test_doubles_count_in_full() -> None:
    base, other = (tiny_phi3()[0].double() for _ in range(2))
    assert fingerprint(base) == fingerprint(tiny_phi3()[0])
    for model, change in ((base, 1e-12), (other, 2e-12)):
        model.get_parameter(PLACE).data.view(-1)[7] += change
    assert fingerprint(base).split("/")[1].startswith("float64:")
    assert fingerprint(base) != fingerprint(other)
    assert are_same(fingerprint(base), identity_of(tiny_phi3()[0])) is None


# ------------------------------------------------------------------------------------------------- kept digests


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHLORA_CACHE", str(tmp_path / "cache"))
    # The files of a test are new.
    monkeypatch.setattr("phlora.models.known_digests._SETTLED_SECONDS", -1.0)
    return tmp_path / "cache" / "fingerprints"


def test_files_that_did_not_change_are_not_counted_again(tiny_folder: Path, cache: Path, monkeypatch) -> None:
    first = load_model(tiny_folder, device="cpu", dtype="float32").fingerprint
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr("phlora.models.fingerprint._digest", None)
    assert load_model(tiny_folder, device="cpu", dtype="float32").fingerprint == first


def test_files_that_changed_are_counted_again(tiny_folder: Path, cache: Path) -> None:
    file = tiny_folder / "model.safetensors"
    first = load_model(tiny_folder, device="cpu", dtype="float32").fingerprint
    before, tensors = file.stat(), load_file(file)
    tensors[PLACE].view(-1)[7] += 1e-6
    # Into the same file, of the same size, and with the old time, as some tools copy.
    with file.open("r+b") as stream:
        stream.write(save(tensors, metadata={"format": "pt"}))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    now = file.stat()
    assert (now.st_size, now.st_mtime_ns, now.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert load_model(tiny_folder, device="cpu", dtype="float32").fingerprint != first


def test_files_that_were_written_a_moment_ago_are_not_remembered(
    tiny_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be written to again within the same tick of the clock."""
    monkeypatch.setattr("phlora.models.known_digests._SETTLED_SECONDS", 1e9)
    load_model(tiny_folder, device="cpu", dtype="float32")
    assert not cache.exists()


def test_a_model_of_fewer_layers_is_another_one_than_its_files_hold(tiny_folder: Path, cache: Path) -> None:
    whole = load_model(tiny_folder, device="cpu", dtype="float32").fingerprint
    config = json.loads((tiny_folder / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    (tiny_folder / "config.json").write_text(json.dumps(config))
    smaller = load_model(tiny_folder, device="cpu", dtype="float32")
    assert smaller.fingerprint == fingerprint(smaller.model, trusted=False) != whole


@pytest.mark.parametrize("content", ["", "[]", '{"whole": {}}', '{"whole": {"float32": 3}}'])
def test_a_broken_cache_costs_a_second_count_and_nothing_else(
    tiny_folder: Path, cache: Path, content: str
) -> None:
    first = load_model(tiny_folder, device="cpu", dtype="float32").fingerprint
    (kept,) = cache.iterdir()
    kept.write_text(content)
    assert load_model(tiny_folder, device="cpu", dtype="float32").fingerprint == first
    kept.unlink()
    cache.rmdir()
    cache.write_text("a file where a folder belongs")
    assert load_model(tiny_folder, device="cpu", dtype="float32").fingerprint == first
