"""Nothing unsafe is opened, and every tensor has a place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from phlora.adapters.loralib_file import read_loralib
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
