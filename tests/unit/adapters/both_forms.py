"""What the tests of loralib files and PEFT folders share: a model in both forms, and files of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phlora.adapters.convert import Adapter
from phlora.adapters.loralib_file import read_loralib, write_loralib
from phlora.adapters.peft_folder import read_peft, write_peft

SIZES = {"qkv_proj": {"q_proj": 64, "k_proj": 32, "v_proj": 32}}


class GPT2Like(nn.Module):
    """A fused weight of three equal blocks, a plain linear layer and an embedding, in loralib or in torch."""

    def __init__(self, layers: Any = None) -> None:
        super().__init__()
        self.c_attn = (
            layers.MergedLinear(8, 24, r=4, lora_alpha=32, enable_lora=[True, False, True])
            if layers
            else nn.Linear(8, 24)
        )
        self.c_proj = layers.Linear(8, 8, r=4, lora_alpha=32) if layers else nn.Linear(8, 8)
        self.wte = layers.Embedding(11, 8, r=4, lora_alpha=32) if layers else nn.Embedding(11, 8)

    def forward(self, ids: Tensor) -> Tensor:
        q, k, v = self.c_attn(self.wte(ids)).chunk(3, dim=-1)
        return self.c_proj(q * k + v)


def fill(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator) / 10
    return model


def loralib_state(file: Path) -> dict[str, Tensor]:
    return torch.load(file, weights_only=True)


def assert_bit_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype and torch.equal(value, right[name]), name


def there_and_back(file: Path, folder: Path, **options: Any) -> Adapter:
    """`file` through a PEFT folder into `back.pt`, which is bit-equal."""
    folder.mkdir()
    write_peft(read_loralib(file, **options), folder)
    back = read_peft(folder)
    write_loralib(back, folder / "back.pt")
    assert_bit_equal(loralib_state(file), loralib_state(folder / "back.pt"))
    return back


def stacked(file: Path, rows: int, *, num_blocks: int, leaf: str = "qkv_proj", r: int = 2) -> Path:
    A, B = torch.randn(num_blocks * r, 8), torch.randn(rows, r)
    torch.save({f"x.{leaf}.lora_A": A, f"x.{leaf}.lora_B": B}, file)
    return file


def base_state(tuned: nn.Module) -> dict[str, Tensor]:
    """The base model's own state dict, under PEFT."""
    state = tuned.base_model.model.state_dict()
    return {name.replace(".base_layer", ""): value for name, value in state.items() if "lora_" not in name}
