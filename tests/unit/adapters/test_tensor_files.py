"""Nothing unsafe is opened, and every tensor has a place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from phlora.adapters.loralib_file import read_loralib
from phlora.adapters.tensor_files import load_tensors, sort_tensors
from phlora.errors import ModelError


class Payload:
    """What a hostile pickle does."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (Path("harm.txt"), "done"))


def test_a_pickle_with_code_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x.lora_A": Payload()}, tmp_path / "bad.pt")
    with pytest.raises(ModelError, match="could run code"):
        read_loralib(tmp_path / "bad.pt", lora_alpha=1)
    assert not (tmp_path / "harm.txt").exists()


A, B = torch.ones(2, 8), torch.ones(6, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x.lora_A": A, "x.lora_B": B, "x.weight": B, "y.weight": B}, r"2 of 4 tensors .*x\.weight"),
        ({"x.lora_A": A}, "1 of 1 tensors"),
        ({"x.lora_A": A, "y.lora_B": B}, "2 of 2 tensors"),
        ({}, "0 of 0 tensors"),
        ({"model_state_dict": {"x.lora_A": A}, "step": 3}, "2 of 2 entries are no tensors"),
        ([A, B], "holds a list"),
        ({"x.lora_A": torch.ones(3, 8), "x.lora_B": B}, "do not belong together"),
        ({"x.lora_A": torch.ones(2, 8, 1), "x.lora_B": B}, "3 dimensions"),
    ],
)
def test_every_tensor_has_a_place_or_nothing_is_converted(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ModelError, match=message):
        read_loralib(tmp_path / "a.pt", lora_alpha=1)


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None])
def test_a_broken_or_missing_file_is_one_message(tmp_path: Path, damage: bytes | None) -> None:
    if damage is not None:
        (tmp_path / "a.pt").write_bytes(damage)
    with pytest.raises(ModelError, match="cannot be read|does not exist"):
        read_loralib(tmp_path / "a.pt", lora_alpha=1)


def test_the_tensors_of_a_layer_are_paired_and_biases_stand_apart() -> None:
    state = {
        "a.b.lora_B": B,
        "a.b.lora_A": A,
        "c.lora_A": A,
        "c.lora_B": B,
        "c.bias": A[0],
        "norm.bias": A[1],
    }
    pairs, biases = sort_tensors(state, "{}.lora_A", "{}.lora_B", where="a.pt", fix="")
    assert pairs == {"a.b": (A, B), "c": (A, B)}
    assert biases.keys() == {"c.bias", "norm.bias"}


def test_both_kinds_of_file_hold_the_same_and_want_no_gradient(tmp_path: Path) -> None:
    state = {"x.lora_A": torch.nn.Parameter(A.clone()), "x.lora_B": B.to(torch.bfloat16)}
    torch.save(state, tmp_path / "a.pt")
    save_file({name: value.detach() for name, value in state.items()}, tmp_path / "a.safetensors")
    for file in ("a.pt", "a.safetensors"):
        found = load_tensors(tmp_path / file)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], value) for name, value in state.items())
        assert [value.dtype for value in found.values()] == [torch.float32, torch.bfloat16]
        assert not any(value.requires_grad for value in found.values())


@pytest.mark.parametrize("kept", [0, 4, 40])
def test_half_a_safetensors_file_is_one_message(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"x.lora_A": A}, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match="(?s)cannot be read.*copy it again"):
        load_tensors(file)
