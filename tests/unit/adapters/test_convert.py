"""loralib's files and PEFT's folders: every bit kept, nothing guessed, nothing unsafe opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import phlora.lora as lora
from phlora.adapters.convert import Adapter
from phlora.adapters.loralib_file import read_loralib, write_loralib
from phlora.adapters.peft_folder import read_peft, write_peft
from phlora.errors import ConfigError, ModelError
from phlora.testing import tiny_phi3

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


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_a_loralib_checkpoint_answers_alike_in_stock_peft_and_comes_back_bit_equal(
    tmp_path: Path, bias: str
) -> None:
    theirs = fill(GPT2Like(loralib))
    torch.save(loralib.lora_state_dict(theirs, bias=bias), tmp_path / "adapter.pt")
    back = there_and_back(tmp_path / "adapter.pt", tmp_path / "peft", lora_alpha=32, enable=["q", "v"])

    base = GPT2Like()
    base.load_state_dict({name: value for name, value in theirs.state_dict().items() if "lora_" not in name})
    if bias != "none":
        base.c_attn.bias.data.zero_()
    tuned = PeftModel.from_pretrained(base, str(tmp_path / "peft"))
    ids = torch.arange(11)
    torch.testing.assert_close(tuned(ids), theirs(ids), rtol=1e-4, atol=1e-5)
    assert back.describe() == [
        "1 × c_attn: MergedLinear(r=4, lora_alpha=32, enable_lora=[True, False, True])",
        "1 × c_proj: Linear(r=4, lora_alpha=32)",
        "1 × wte: Embedding(r=4, lora_alpha=32)",
    ]


@pytest.mark.parametrize("enabled", [("q",), ("k",), ("q", "v"), ("k", "v"), ("q", "k", "v")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_of_unequal_blocks_comes_back_bit_equal_and_answers_alike(
    tmp_path: Path, enabled: tuple[str, ...], dtype: torch.dtype
) -> None:
    model, tokenizer = tiny_phi3()
    flags = [name in enabled for name in "qkv"]
    lora.replace(
        model, ["qkv_proj"], r=3, lora_alpha=5, enable_lora=flags, out_features_per_block=(64, 32, 32)
    )
    fill(model)
    state = {name: value.to(dtype) for name, value in lora.lora_state_dict(model).items()}
    torch.save(state, tmp_path / "adapter.pt")
    back = there_and_back(
        tmp_path / "adapter.pt", tmp_path / "peft", lora_alpha=5, enable=enabled, blocks=SIZES
    )
    assert (
        f"r=3, lora_alpha=5, enable_lora={flags}, out_features_per_block=[64, 32, 32]" in back.describe()[0]
    )

    lora.load_lora_state_dict(model, {name: value.float() for name, value in state.items()})
    tuned = PeftModel.from_pretrained(tiny_phi3()[0], str(tmp_path / "peft"))
    ids = tokenizer("merhaba dünya", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(tuned(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_scaling_is_kept_where_ranks_differ(tmp_path: Path) -> None:
    """Total rank and alpha grow together, so a runtime that reads only `lora_alpha / r` is right too."""
    theirs = fill(GPT2Like(loralib))
    torch.save(loralib.lora_state_dict(theirs), tmp_path / "adapter.pt")
    write_peft(read_loralib(tmp_path / "adapter.pt", lora_alpha=32, enable=["q", "v"]), tmp_path)
    config = LoraConfig.from_pretrained(str(tmp_path))
    assert (config.r, config.lora_alpha) == (4, 32)
    assert (config.rank_pattern, config.alpha_pattern) == ({"c_attn": 8}, {"c_attn": 64})


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_peft_adapter_becomes_loralib_layers_with_the_same_output(tmp_path: Path, use_rslora: bool) -> None:
    torch.manual_seed(0)
    base = GPT2Like()
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["c_attn", "c_proj"],
        rank_pattern={"c_proj": 2},
        alpha_pattern={"c_proj": 3},
        use_rslora=use_rslora,
    )
    tuned = fill(get_peft_model(base, config))
    tuned.save_pretrained(str(tmp_path))
    adapter = read_peft(tmp_path)
    ours = GPT2Like()
    plain = {k.replace(".base_layer", ""): v for k, v in tuned.base_model.model.state_dict().items()}
    ours.load_state_dict({name: value for name, value in plain.items() if "lora_" not in name})
    for layer in adapter.layers:
        lora.replace(ours, [layer.name], r=layer.r, lora_alpha=layer.lora_alpha)
    write_loralib(adapter, tmp_path / "adapter.pt")
    lora.load_lora_state_dict(ours, loralib_state(tmp_path / "adapter.pt"))
    ids = torch.arange(11)
    torch.testing.assert_close(ours(ids), tuned(ids), rtol=1e-5, atol=1e-5)
    assert {layer.name: layer.r for layer in adapter.layers} == {"c_attn": 4, "c_proj": 2}


def test_blocks_of_a_peft_adapter_can_be_named_and_have_to_be_block_diagonal(tmp_path: Path) -> None:
    A, B = torch.randn(4, 8), torch.zeros(128, 4)
    B[:64, :2], B[96:, 2:] = torch.randn(64, 2), torch.randn(32, 2)
    folder = tmp_path / "peft"
    folder.mkdir()
    torch.save({"x.qkv_proj.lora_A": A, "x.qkv_proj.lora_B": B}, tmp_path / "plain.pt")
    write_peft(read_loralib(tmp_path / "plain.pt", lora_alpha=8), folder)
    assert read_peft(folder).layers[0].layout is None
    (layer,) = read_peft(folder, enable=["q", "v"], blocks=SIZES).layers
    assert torch.equal(layer.lora_A, A) and (layer.r, layer.lora_alpha) == (2, 4)
    assert torch.equal(layer.lora_B, torch.cat([B[:64, :2], B[96:, 2:]]))
    with pytest.raises(ModelError, match="outside the blocks q_proj, k_proj"):
        read_peft(folder, enable=["q", "k"], blocks=SIZES)
    with pytest.raises(ConfigError, match="sizes are not known"):
        read_peft(folder, enable=["q", "v"])


def stacked(file: Path, rows: int, *, num_blocks: int, leaf: str = "qkv_proj", r: int = 2) -> Path:
    A, B = torch.randn(num_blocks * r, 8), torch.randn(rows, r)
    torch.save({f"x.{leaf}.lora_A": A, f"x.{leaf}.lora_B": B}, file)
    return file


@pytest.mark.parametrize(
    ("rows", "num_blocks", "enabled"),
    [
        (64, 1, ("q_proj",)),
        (64, 2, ("k_proj", "v_proj")),
        (128, 3, ("q_proj", "k_proj", "v_proj")),
        (128, 1, None),
    ],
)
def test_shapes_tell_the_blocks_where_only_one_choice_fits(
    tmp_path: Path, rows: int, num_blocks: int, enabled: tuple[str, ...] | None
) -> None:
    file = stacked(tmp_path / "a.pt", rows, num_blocks=num_blocks)
    (layer,) = read_loralib(file, lora_alpha=1, blocks=SIZES).layers
    assert (layer.layout.enabled if layer.layout else None) == enabled


@pytest.mark.parametrize(
    ("rows", "num_blocks", "leaf", "options", "message"),
    [
        (96, 2, "qkv_proj", {"blocks": SIZES}, "--enable q_proj,k_proj or --enable q_proj,v_proj"),
        (96, 2, "qkv_proj", {"blocks": SIZES, "enable": ["k", "v"]}, "k_proj, v_proj do not fit"),
        (90, 2, "qkv_proj", {"blocks": SIZES}, "no choice fits"),
        (128, 3, "qkv_proj", {}, "no 3 equal blocks"),
        (16, 2, "c_attn", {}, "several choices fit"),
        (16, 2, "mixer", {}, "--blocks mixer="),
        (16, 2, "c_attn", {"enable": ["qq"]}, "did you mean|one of"),
        (16, 1, "mixer", {"enable": ["q"]}, "leave it out"),
    ],
)
def test_blocks_that_cannot_be_told_are_a_question_not_a_guess(
    tmp_path: Path, rows: int, num_blocks: int, leaf: str, options: dict[str, Any], message: str
) -> None:
    file = stacked(tmp_path / "a.pt", rows, num_blocks=num_blocks, leaf=leaf)
    with pytest.raises(ConfigError, match=message):
        read_loralib(file, lora_alpha=1, **options)


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "2 of 6 tensors .*lora_magnitude_vector"),
        ({"modules_to_save": ["c_proj"], "target_modules": ["c_attn"]}, "1 of 4 tensors .*c_proj.weight"),
        ({"init_lora_weights": "pissa"}, "pissa"),
    ],
)
def test_what_loralib_cannot_say_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = LoraConfig(**{"r": 4, "target_modules": ["c_attn", "c_proj"], **changes})
    get_peft_model(GPT2Like(), config).save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match=message):
        read_peft(tmp_path)


def test_an_embedding_of_any_name_stays_one_on_the_way_from_peft(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 4))
    tuned = fill(get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=["0", "1"])))
    tuned.save_pretrained(str(tmp_path))
    adapter = read_peft(tmp_path)
    assert adapter.describe() == ["1 × 0: Embedding(r=3, lora_alpha=6)", "1 × 1: Linear(r=3, lora_alpha=6)"]
    write_loralib(adapter, tmp_path / "adapter.pt")
    theirs = nn.Sequential(
        loralib.Embedding(11, 8, r=3, lora_alpha=6), loralib.Linear(8, 4, r=3, lora_alpha=6)
    )
    theirs.load_state_dict({**base_state(tuned), **loralib_state(tmp_path / "adapter.pt")})
    torch.testing.assert_close(theirs(torch.arange(11)), tuned(torch.arange(11)))


def base_state(tuned: nn.Module) -> dict[str, Tensor]:
    """The base model's own state dict, under PEFT."""
    state = tuned.base_model.model.state_dict()
    return {name.replace(".base_layer", ""): value for name, value in state.items() if "lora_" not in name}


CONVOLUTIONS = [
    (loralib.Conv2d, (3, 3), 3),
    (loralib.Conv2d, (1, 1), 1),
    (lora.Conv1d, (3,), 3),
    (lora.Conv2d, (2, 3), (2, 3)),
    (lora.Conv3d, (2, 2, 2), 2),
]


@pytest.mark.parametrize(("kind", "kernel", "size"), CONVOLUTIONS)
@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_convolution_answers_alike_in_stock_peft_and_comes_back_bit_equal(
    tmp_path: Path, kind: Any, kernel: tuple[int, ...], size: Any, bias: str
) -> None:
    how = {"stride": 2, "padding": 1}
    theirs = fill(nn.ModuleDict({"features": kind(6, 4, size, r=2, lora_alpha=5, **how)}))
    torch.save(lora.lora_state_dict(theirs, bias=bias), tmp_path / "adapter.pt")
    adapter = there_and_back(
        tmp_path / "adapter.pt", tmp_path / "peft", lora_alpha=5, kernels={"features": kernel}
    )
    plain = getattr(nn, f"Conv{len(kernel)}d")(6, 4, size, **how)
    plain.load_state_dict(theirs["features"].conv.state_dict())
    if bias != "none":
        plain.bias.data.zero_()
    tuned = PeftModel.from_pretrained(nn.ModuleDict({"features": plain}), str(tmp_path / "peft"))
    x = torch.randn(3, 6, *[7] * len(kernel))
    torch.testing.assert_close(
        tuned.base_model.model["features"](x), theirs["features"](x), rtol=1e-4, atol=1e-5
    )
    named = f"kernel_size={kernel[0] if len(set(kernel)) == 1 else kernel}, r=2, lora_alpha=5"
    assert adapter.describe() == [f"1 × features: Conv{len(kernel)}d({named})"]


def test_a_convolution_of_one_dimension_comes_from_peft_with_the_same_output(tmp_path: Path) -> None:
    base = nn.ModuleDict({"conv": nn.Conv1d(6, 4, 3)})
    tuned = fill(get_peft_model(base, LoraConfig(r=6, lora_alpha=9, target_modules=["conv"])))
    tuned.save_pretrained(str(tmp_path))
    write_loralib(read_peft(tmp_path), tmp_path / "adapter.pt")
    ours = nn.ModuleDict({"conv": lora.Conv1d(6, 4, 3, r=2, lora_alpha=3)})
    ours.load_state_dict({**base_state(tuned), **loralib_state(tmp_path / "adapter.pt")})
    x = torch.randn(2, 6, 7)
    torch.testing.assert_close(ours["conv"](x), tuned.base_model.model["conv"](x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("r", "how"), [(18, {}), (6, {}), (18, {"groups": 2})])
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_a_convolution_that_loralib_cannot_say_is_refused(tmp_path: Path, r: int, how: Any) -> None:
    base = nn.ModuleDict({"conv": nn.Conv2d(6, 4, 3, **how)})
    fill(get_peft_model(base, LoraConfig(r=r, target_modules=["conv"]))).save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match="no groups, a rank that 9 divides, and an A of 3 equal diagonal"):
        read_peft(tmp_path)


def test_a_convolution_whose_kernel_is_not_known_is_a_question(tmp_path: Path) -> None:
    file, conv = tmp_path / "a.pt", nn.ModuleDict({"c": loralib.Conv2d(6, 4, 3, r=2)})
    torch.save(loralib.lora_state_dict(conv, bias="all"), file)
    with pytest.raises(ConfigError, match="convolution, and the file does not know its kernel"):
        read_loralib(file, lora_alpha=1)
    with pytest.raises(ConfigError, match="no layer `d`"):
        read_loralib(file, lora_alpha=1, kernels={"d": (3, 3)})
    with pytest.raises(ModelError, match=r"not those of a kernel of 5"):
        read_loralib(file, lora_alpha=1, kernels={"c": (5, 5)})


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="adapter_config.json"):
        read_peft(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA"}))
    with pytest.raises(ModelError, match="of the kind LOHA"):
        read_peft(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="no valid JSON"):
        read_peft(tmp_path)


def test_what_is_written_is_a_plain_peft_adapter(tmp_path: Path) -> None:
    file = stacked(tmp_path / "a.pt", 96, num_blocks=2)
    adapter = read_loralib(file, lora_alpha=4, enable=["q", "v"], blocks=SIZES)
    write_peft(adapter, tmp_path, base_model="some/base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        "base_model.model.x.qkv_proj.lora_A.weight": (4, 8),
        "base_model.model.x.qkv_proj.lora_B.weight": (128, 4),
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, "some/base")
    facts = json.loads((tmp_path / "phlora.json").read_text())
    (tmp_path / "phlora.json").write_text(json.dumps({"blocks": {"x.qkv_proj": ["q_proj"]}}))
    with pytest.raises(ModelError, match="row blocks cannot be read"):
        read_peft(tmp_path)
    assert facts["blocks"] == {"x.qkv_proj": {"sizes": SIZES["qkv_proj"], "enabled": ["q_proj", "v_proj"]}}
