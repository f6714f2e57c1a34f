"""What weights are stored as: what loses nothing where it fits, and never what does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from phlora.config import ModelConfig
from phlora.errors import ConfigError, NoRoomError
from phlora.models import storage
from phlora.models.load import load_model
from phlora.models.storage import Sizes, Storage, choose_storage, storage_settings
from phlora.models.streaming import empty_model, sizes_of
from phlora.models.tokenizer import find_files

CPU = torch.device("cpu")
FULL, HALF = torch.float32, torch.bfloat16
# Phi-3-mini: 32 layers of 113,246,208 numbers, embeddings and head of 98,500,608 each, 65 norms.
PHI3 = Sizes(linears=3_623_878_656, matrices=3_820_879_872, rest=199_680, largest=98_500_608, stored=HALF)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch):
    def set_free(gigabytes: float) -> None:
        monkeypatch.setattr(storage, "available_bytes", lambda device: int(gigabytes * 1e9))

    return set_free


def choose(sizes: Sizes = PHI3, *, dtype: torch.dtype = FULL, **settings: object):
    wanted = storage_settings(ModelConfig(name="phi", **settings))  # type: ignore[arg-type]
    return choose_storage(wanted, sizes, dtype=dtype, device=CPU)


@pytest.mark.parametrize(
    ("gigabytes", "dtype", "expected"),
    [
        (80, FULL, "float32"),  # less than a quarter of what is free
        (24, FULL, "bfloat16"),
        (24, HALF, "bfloat16"),
        (8, FULL, "nf4"),
        (8, HALF, "nf4"),
    ],
)
def test_auto_takes_what_loses_nothing_and_fits(free, gigabytes, dtype, expected) -> None:
    pytest.importorskip("bitsandbytes")
    free(gigabytes)
    choice = choose(dtype=dtype)
    assert str(choice.value) == expected
    assert choice.value.dtype == (FULL if expected == "float32" else HALF)
    taken = PHI3.bytes_as(choice.value, dtype)
    assert taken <= 0.8 * gigabytes * 1e9
    if expected == "nf4":
        assert "7.6 GB of the 8.0 GB" in choice.reason


def test_a_checkpoint_of_32_bits_is_rounded_only_where_it_does_not_fit(free) -> None:
    sizes = Sizes(linears=900, matrices=1_000_000_000, rest=0, largest=1_000_000, stored=FULL)
    free(6)
    assert str(choose(sizes).value) == "float32"
    free(4)
    choice = choose(sizes)
    assert str(choice.value) == "bfloat16" and "rounded to 8 bits" in choice.reason


def test_what_fits_in_no_way_is_refused_with_figures(free, monkeypatch) -> None:
    pytest.importorskip("bitsandbytes")
    free(2)
    with pytest.raises(NoRoomError, match=r"nf4 take 2\.3 GB.*2\.0 GB free"):
        choose()
    for name in ("bfloat16", "float32", "int8"):
        with pytest.raises(NoRoomError, match=name):
            choose(storage_dtype=name)
    free(8)
    monkeypatch.setattr(storage, "is_installed", lambda name: False)
    with pytest.raises(NoRoomError, match="pip install"):
        choose()


def test_nf4_keeps_head_and_embeddings_in_16_bits(free) -> None:
    free(24)
    for settings in ({"storage_dtype": "nf4"}, {"quantization": storage.quantization_config("nf4")}):
        chosen = choose(**settings).value
        assert (str(chosen), chosen.dtype) == ("nf4", HALF)
        assert PHI3.bytes_as(chosen, FULL) == pytest.approx(2.26e9, rel=0.01)


def test_settings_that_contradict_each_other_or_do_not_exist_are_refused(free) -> None:
    free(24)
    with pytest.raises(ConfigError, match="contradict"):
        choose(storage_dtype="int8", quantization=storage.quantization_config("nf4"))
    with pytest.raises(ConfigError, match="bfloat16"):
        choose(storage_dtype="bflot16")
    for name, dtype in (("float32", HALF), ("float16", HALF)):
        with pytest.raises(ConfigError, match="cannot be computed with in bfloat16"):
            choose(storage_dtype=name, dtype=dtype)


def test_sizes_are_those_of_the_loaded_model(tiny_folder: Path) -> None:
    empty = empty_model(find_files(ModelConfig(name=str(tiny_folder))), dtype=FULL, attention="sdpa")
    sizes = sizes_of(empty, FULL)
    loaded = load_model(tiny_folder, device="cpu", dtype="float32")
    assert sizes.matrices + sizes.rest == loaded.model.num_parameters()
    assert sizes.bytes_as(Storage(dtype=FULL), FULL) == sum(p.nbytes for p in loaded.model.parameters())
    assert sizes.largest == 288 * 64


def test_loading_says_what_was_chosen(tiny_folder: Path) -> None:
    loaded = load_model(tiny_folder, device="cpu", dtype="float32")
    assert loaded.storage.value == "float32" and "what is computed with" in loaded.storage.reason
    loaded = load_model(tiny_folder, device="cpu", dtype="float32", storage_dtype="bfloat16")
    assert (loaded.storage.value, loaded.storage.reason) == ("bfloat16", "asked for")
    assert loaded.dtype.value == FULL
