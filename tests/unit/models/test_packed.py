"""Bases that GPTQ or AWQ packed: the matrices that they stand for, to the bit; and a run on them."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from phlora import finetune, load_model
from phlora.display import Display
from phlora.errors import ConfigError, EnvironmentProblem, ModelError, PhloraError
from phlora.models.checkpoint import Checkpoint, _entries
from phlora.models.packed import Packing, open_packed, unpacked
from phlora.testing import chat_rows, invoke

QUIET = Display(quiet=True)
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of AutoAWQ's eight columns in an int32


def packed_along(numbers: list[list[int]], bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Rows of numbers as rows of int32, written down bit by bit."""
    each, rows = 32 // bits, []
    for row in numbers:
        words = []
        for start in range(0, len(row), each):
            part = row[start : start + each]
            part = [part[place] for place in order] if order else part
            word = sum(number << (bits * place) for place, number in enumerate(part))
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


def rounded(weight: Tensor, *, bits: int, group: int, order: Tensor | None = None) -> dict[str, Tensor]:
    """Numbers (in, out), zeros and scales (groups, out) of a matrix (out, in); the group of each column."""
    columns = weight.shape[1]
    group_of = torch.arange(columns) // group
    if order is not None:
        group_of = group_of[order]
    most = (1 << bits) - 1
    numbers = torch.zeros(columns, weight.shape[0], dtype=torch.int64)
    zeros = torch.zeros(columns // group, weight.shape[0], dtype=torch.int64)
    scales = torch.zeros(columns // group, weight.shape[0], dtype=torch.float16)
    for number in range(columns // group):
        part = weight[:, group_of == number]
        low, high = part.min(1).values, part.max(1).values
        scale = ((high - low) / most).clamp(min=1e-6).half()
        zero = (-low / scale.float()).round().clamp(1, most)
        scales[number], zeros[number] = scale, zero.long()
        numbers[group_of == number] = (
            (part / scale.float()[:, None] + zero[:, None]).round().clamp(0, most).long().T
        )
    return {"numbers": numbers, "zeros": zeros, "scales": scales, "groups": group_of}


def parts_of(weight: Tensor, method: str, **how: Any) -> tuple[dict[str, Tensor], Tensor]:
    """What a file of this method holds for a matrix, and the matrix that it stands for."""
    less_one = how.pop("less_one", True)
    bits = how["bits"]
    found = rounded(weight, **how)
    numbers, zeros, scales = found["numbers"], found["zeros"], found["scales"]
    dense = torch.stack(
        [
            ((numbers[i] - zeros[found["groups"][i]]).float() * scales[found["groups"][i]].float()).half()
            for i in range(len(numbers))
        ],
        dim=1,
    )
    if method == "awq":
        parts = {
            "qweight": packed_along(numbers.tolist(), bits, ORDER),
            "qzeros": packed_along(zeros.tolist(), bits, ORDER),
        }
    else:
        parts = {
            "qweight": packed_along(numbers.T.tolist(), bits).T.contiguous(),
            "qzeros": packed_along((zeros - int(less_one)).tolist(), bits),
            "g_idx": found["groups"].int(),
        }
    return {**parts, "scales": scales}, dense


@pytest.mark.parametrize(
    ("method", "how"),
    [
        ("gptq", {"bits": 4, "group": 16}),
        ("gptq", {"bits": 4, "group": 64}),
        ("gptq", {"bits": 8, "group": 32}),
        ("gptq", {"bits": 2, "group": 16}),
        ("gptq", {"bits": 4, "group": 16, "less_one": False}),
        ("awq", {"bits": 4, "group": 16}),
        ("awq", {"bits": 4, "group": 64}),
    ],
)
@pytest.mark.parametrize("in_order", [True, False])
def test_the_matrix_is_what_was_packed(method: str, how: dict[str, Any], in_order: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 64)
    order = None if in_order or method == "awq" else torch.randperm(64)
    packing = Packing(method, zeros_less_one=how.get("less_one", True))
    parts, dense = parts_of(weight, method, order=order, **how)
    found = unpacked(packing, parts["qweight"], parts["qzeros"], parts["scales"], parts.get("g_idx"))
    assert found.dtype == torch.float16 and torch.equal(found, dense)
    if in_order:
        assert torch.equal(unpacked(packing, parts["qweight"], parts["qzeros"], parts["scales"]), dense)


@pytest.fixture(scope="module", params=["gptq", "awq"])
def packed_folder(
    request: pytest.FixtureRequest, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Tensor]]:
    """The tiny model as such a method leaves it, and the matrices that its weights stand for."""
    method: str = request.param
    folder = tmp_path_factory.mktemp("packed") / method
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    dense = {}
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        parts, dense[name] = parts_of(weights.pop(name).float(), method, bits=4, group=16)
        weights |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 16}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder, dense


def changed(folder: Path, target: Path, **quantization: Any) -> Path:
    """A copy whose configuration says otherwise how it is packed."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] |= quantization
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


def test_a_packed_base_is_loaded_dense(packed_folder: tuple[Path, dict[str, Tensor]]) -> None:
    folder, dense = packed_folder
    loaded = load_model(str(folder), dtype="float32", device="cpu")
    for name, weight in dense.items():
        assert torch.equal(loaded.model.get_parameter(name).float(), weight.float()), name
    assert any("packed matrices" in note for note in loaded.notes)
    assert getattr(loaded.model.config, "quantization_config", None) is None
    again = load_model(str(folder), dtype="float32", device="cpu")
    assert loaded.fingerprint == again.fingerprint


def test_a_run_on_a_packed_base(packed_folder: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """Planned, trained, proven, evaluated again and merged like any other."""
    folder, _ = packed_folder
    rows = chat_rows(12)
    run = finetune(
        model={"name": str(folder), "dtype": "float32", "device": "cpu"},
        data=rows[:9],
        eval_data=rows[9:],
        training_config={"max_steps": 2, "learning_rate": 1e-2},
        peft_config={"r": 2},
        evaluation={"max_answers": 2, "max_new_tokens": 4},
        output=tmp_path / "run",
        display=QUIET,
    )
    assert run.report is not None
    done = invoke("evaluate", tmp_path / "run", "--max-answers", 0, "--json")
    assert done.code == 0, done.err
    done = invoke("merge", tmp_path / "run", "-o", tmp_path / "merged", "--json")
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config


@pytest.mark.parametrize("setting", [{"quantization": "nf4"}, {"storage_dtype": "int8"}])
def test_it_is_not_rounded_a_second_time(
    packed_folder: tuple[Path, dict[str, Tensor]], setting: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="quantised already"):
        load_model(str(packed_folder[0]), device="cpu", **setting)


def test_what_is_missing_is_named(packed_folder: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder = shutil.copytree(packed_folder[0], tmp_path / "part")
    weights = load_file(folder / "model.safetensors")
    whole = dict(weights)
    del weights["model.layers.0.mlp.down_proj.scales"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model.layers.0.mlp.down_proj lacks scales"):
        load_model(str(folder), device="cpu")
    name = "model.layers.1.self_attn.o_proj.qweight"
    save_file({**whole, name: whole[name][:-1].contiguous()}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="o_proj has the shapes"):
        load_model(str(folder), device="cpu")
    save_file(
        {n: t for n, t in whole.items() if "layers.1.mlp.down_proj" not in n}, folder / "model.safetensors"
    )
    with pytest.raises(ModelError, match="not those that the configuration calls for"):
        load_model(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("qweight", lambda t: t.long(), r"has the shapes qweight .* int64.*\n.*bits, in int32"),
        ("qweight", lambda t: t.float(), r"has the shapes qweight .* float32"),
        ("qzeros", lambda t: t.short(), r"has the shapes .* int16"),
        ("scales", lambda t: t.int(), r"has the shapes .* int32"),
    ],
)
def test_numbers_of_another_kind_are_named(
    packed_folder: tuple[Path, dict[str, Tensor]], tmp_path: Path, part: str, change: Any, said: str
) -> None:
    folder = shutil.copytree(packed_folder[0], tmp_path / "part")
    weights = load_file(folder / "model.safetensors")
    name = f"model.layers.0.mlp.down_proj.{part}"
    save_file({**weights, name: change(weights[name])}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=said):
        load_model(str(folder), device="cpu")


@pytest.mark.parametrize("group", [-1, 4, 1 << 20])
def test_columns_of_groups_that_there_are_not_are_named(tmp_path: Path, group: int) -> None:
    layer, file = "model.layers.0.mlp.down_proj", tmp_path / "model.safetensors"
    parts, dense = parts_of(torch.randn(32, 64), "gptq", bits=4, group=16)

    def read() -> Tensor:
        save_file({f"{layer}.{part}": tensor for part, tensor in parts.items()}, file)
        stored = Checkpoint((file,), _entries(file) or {})
        return open_packed(stored, Packing("gptq"), where="here").read(f"{layer}.weight")

    assert torch.equal(read(), dense)
    parts["g_idx"][5] = group
    with pytest.raises(ModelError, match=rf"{layer} has columns of groups .*\n.*0 to 3"):
        read()


@pytest.mark.parametrize("method", ["compressed-tensors", "hqq", "eetq", "aqlm", "nonsense"])
def test_another_method_is_one_error(
    packed_folder: tuple[Path, dict[str, Tensor]], tmp_path: Path, method: str
) -> None:
    folder = changed(packed_folder[0], tmp_path / "other", quant_method=method)
    with pytest.raises(PhloraError) as error:
        load_model(str(folder), device="cpu")
    assert isinstance(error.value, EnvironmentProblem | ModelError)
    assert "16-bit original" in str(error.value) and method in str(error.value)


@pytest.mark.skipif(find_spec("auto_round") is None, reason="auto-round is not installed")
@pytest.mark.parametrize("format", ["auto_gptq", "auto_awq", "auto_round"])
def test_what_auto_round_writes_is_what_it_computes_with(
    model_folder: Path, tmp_path: Path, format: str
) -> None:
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM

    loaded = load_model(str(model_folder), dtype="float32", device="cpu")
    ids = [torch.randint(5, 60, (1, 32)) for _ in range(4)]
    rounding = AutoRound(
        loaded.model,
        loaded.tokenizer.tokenizer,
        bits=4,
        group_size=32,
        dataset=ids,
        nsamples=4,
        seqlen=32,
        iters=1,
    )
    rounding.quantize_and_save(str(tmp_path / "out"), format=format)
    folder = next((tmp_path / "out").rglob("config.json")).parent
    ours = load_model(str(folder), dtype="float32", device="cpu").model
    if format == "auto_awq":
        return  # its own reader needs another package
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layer = theirs.model.layers[0].self_attn.qkv_proj
    assert torch.equal(
        layer(torch.eye(layer.infeatures)).T, ours.get_parameter("model.layers.0.self_attn.qkv_proj.weight")
    )
