"""Loading from shards: what transformers loads, tensor for tensor, and never more memory than the stored model asks."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Phi3Config

from phlora.config import ModelConfig
from phlora.errors import ConfigError, EnvironmentProblem, ModelError
from phlora.extras import is_installed
from phlora.models import load as loading
from phlora.models.fingerprint import IdentityMaker
from phlora.models.load import load_model
from phlora.models.quantization import dequantize
from phlora.models.tokenizer import find_files
from phlora.testing import tiny_folder, tiny_llama, tiny_phi3


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The tiny model in several files."""
    folder = tiny_folder(tmp_path / "shards")
    (folder / "model.safetensors").unlink()
    tiny_phi3()[0].save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return folder


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers reads no weights."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("transformers was asked for the weights")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("longrope", [False, True])
def test_one_file_gives_what_transformers_gives(tmp_path: Path, longrope: bool) -> None:
    folder = tiny_folder(tmp_path)
    tiny_phi3(longrope=longrope)[0].save_pretrained(folder)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = load_model(folder, device="cpu", dtype="float32").model
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert all(p.requires_grad for p in found.parameters()) and not found.training
    assert found.name_or_path == expected.name_or_path == str(folder)
    assert found.config.to_dict() == expected.config.to_dict() | {
        key: getattr(found.config, key) for key in ("pad_token_id", "use_cache")
    }
    ids = torch.arange(3, 90)[None]
    with torch.no_grad():
        assert torch.equal(found(ids).logits, expected(ids).logits)


@pytest.mark.usefixtures("streamed")
def test_several_files_give_the_same_without_transformers(shards: Path, tmp_path: Path) -> None:
    one = load_model(tiny_folder(tmp_path / "one"), device="cpu", dtype="float32")
    many = load_model(shards, device="cpu", dtype="float32")
    assert many.fingerprint == one.fingerprint
    assert all(torch.equal(p, one.model.get_parameter(n)) for n, p in many.model.named_parameters())


def test_a_tied_head_is_tied(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    model = tiny_phi3()[0]
    model.config.tie_word_embeddings = True
    model.tie_weights(recompute_mapping=True)
    model.save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    found = load_model(folder, device="cpu", dtype="float32").model
    assert found.lm_head.weight is found.get_input_embeddings().weight
    stored = load_model(folder, device="cpu", dtype="float32", storage_dtype="bfloat16").model
    assert stored.lm_head.weight is stored.get_input_embeddings().weight
    assert stored.lm_head.weight.dtype == torch.bfloat16


def llama_folder(path: Path) -> Path:
    folder = tiny_folder(path)
    tiny_llama(attention_bias=True).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("streamed")
def test_llama_is_streamed_too(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path)
    found = load_model(folder, device="cpu", dtype="float32", storage_dtype="bfloat16").model
    assert found.model.layers[0].self_attn.q_proj.bias.dtype == torch.float32
    assert torch.isfinite(found(torch.arange(3, 9)[None]).logits).all()


@pytest.mark.parametrize("trusted", [False, True])
def test_wider_storage_than_computation_is_refused_however_a_model_is_read(
    tmp_path: Path, trusted: bool
) -> None:
    with pytest.raises(ConfigError, match="stored in float32 cannot be computed with in bfloat16"):
        load_model(
            llama_folder(tmp_path),
            device="cpu",
            dtype="bfloat16",
            storage_dtype="float32",
            trust_remote_code=trusted,
        )


def test_weights_that_are_no_safetensors_load_as_before(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    weights = {name: w.bfloat16() for name, w in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    loaded = load_model(folder, device="cpu", dtype="float32", storage_dtype="bfloat16")
    for name, parameter in loaded.model.named_parameters():
        assert parameter.dtype == (torch.float32 if "norm" in name else torch.bfloat16)
        assert torch.equal(parameter.float(), weights[name].float())


@pytest.mark.parametrize("files", [1, 2])
def test_a_configuration_that_says_bfloat16_rounds_no_norm(tmp_path: Path, files: int) -> None:
    folder = tiny_folder(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += torch.linspace(0, 0.1, 64)
    (folder / "model.safetensors").unlink()
    names = (
        [f"pytorch_model-{n + 1:05}-of-00002.bin" for n in range(2)] if files == 2 else ["pytorch_model.bin"]
    )
    parts = {name: list(weights)[n :: len(names)] for n, name in enumerate(names)}
    for name, part in parts.items():
        torch.save({key: weights[key] for key in part}, folder / name)
    if files == 2:
        weight_map = {key: name for name, part in parts.items() for key in part}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert loading.stored_dtype(find_files(ModelConfig(name=str(folder)))) == torch.float32
    loaded = load_model(folder, device="cpu", dtype="float32", storage_dtype="bfloat16")
    assert torch.equal(loaded.model.get_parameter("model.norm.weight"), weights["model.norm.weight"])
    matrix = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(loaded.model.get_parameter(matrix), weights[matrix].bfloat16())


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "nf4"])
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_every_tensor_is_counted_once(
    tmp_path: Path, storage: str, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if storage == "nf4":
        pytest.importorskip("bitsandbytes")
    folder = tiny_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    if format == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    counted: list[str] = []
    add = IdentityMaker.add

    def record(self: IdentityMaker, name: str, tensor: torch.Tensor) -> None:
        counted.append(name)
        add(self, name, tensor)

    monkeypatch.setattr(IdentityMaker, "add", record)
    load_model(folder, device="cpu", dtype="float32", storage_dtype=storage)
    assert sorted(counted) == sorted(tensors)


def test_what_is_quantised_does_not_depend_on_the_kind_of_file(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = {"device": "cpu", "dtype": "float32", "storage_dtype": "bfloat16", "quantization": "nf4"}
    folder = tiny_folder(tmp_path)
    streamed = load_model(folder, **settings)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    whole = load_model(folder, **settings)
    theirs = dict(streamed.model.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in whole.model.named_parameters())
    assert whole.notes == streamed.notes and whole.fingerprint == streamed.fingerprint


# -------------------------------------------------------------------------------------------------- bad files


def edit_index(folder: Path, **changes: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    path.write_text(json.dumps(index))


def test_an_index_that_names_what_a_file_lacks_is_refused(shards: Path) -> None:
    first = sorted(shards.glob("model-*.safetensors"))[0].name
    edit_index(shards, **{"model.layers.7.mlp.down_proj.weight": first})
    with pytest.raises(ModelError, match="does not hold it"):
        load_model(shards, device="cpu", dtype="float32")


def test_a_tensor_in_two_files_is_refused(shards: Path) -> None:
    first, second = sorted(shards.glob("model-*.safetensors"))[:2]
    save_file({**load_file(first), **load_file(second)}, second, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="stands in"):
        load_model(shards, device="cpu", dtype="float32")


@pytest.mark.parametrize("shown", [[], ["index"], ["index", "first"]], ids=["nothing", "index", "one"])
def test_what_the_weights_are_in_is_not_downloaded(
    shards: Path, shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model of a hub whose files are not all on this machine, its configuration tells it."""
    files = find_files(ModelConfig(name=str(shards)))
    index, first = shards / "model.safetensors.index.json", sorted(shards.glob("model-*.safetensors"))[0]
    here = {path.name: path for name, path in (("index", index), ("first", first)) if name in shown}

    def cached_file(path: str, name: str, *, local_files_only: bool = False, **_: object) -> str | None:
        assert local_files_only, f"{name} is downloaded"
        return str(here[name]) if name in here else None

    monkeypatch.setattr("phlora.models.checkpoint.cached_file", cached_file)
    location = dataclasses.replace(files.location, path="owner/name", kwargs={"local_files_only": False})
    files.config.dtype = torch.float16
    assert loading.stored_dtype(dataclasses.replace(files, location=location)) == torch.float16


def test_a_shard_that_ends_early_is_refused(shards: Path) -> None:
    first = sorted(shards.glob("model-*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(shards, device="cpu", dtype="float32")
    with pytest.raises(ModelError, match="cannot be read"):
        loading.stored_dtype(find_files(ModelConfig(name=str(shards))))


@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "float16"},
        {"dtype": "float32", "storage_dtype": "float16"},
        {"dtype": "float32", "storage_dtype": "int8"},
    ],
)
def test_numbers_that_float16_cannot_hold_are_refused(
    tmp_path: Path, format: str, settings: dict[str, str]
) -> None:
    if settings.get("storage_dtype") == "int8":
        pytest.importorskip("bitsandbytes")
    folder = tiny_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 5] = -70_000.0
    if format == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name} has numbers beyond 65504"):
        load_model(folder, device="cpu", **settings)
    tensors[name][3, 5] = -65_504.0
    if format == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = dequantize(load_model(folder, device="cpu", **settings).model)
    assert model.get_parameter(name)[3, 5].item() == pytest.approx(-65_504)


def test_missing_and_unused_tensors_are_told_as_ever(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "extra": torch.ones(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert any("1 tensors of the file are not used, such as extra" in n for n in load_model(folder).notes)
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lack 1 tensors.*model.norm.weight"):
        load_model(folder)


# ------------------------------------------------------------------------------------------- quantised already


def test_whole_numbers_that_nothing_explains_are_no_weights(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].mul(100).to(torch.int8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name} is stored in int8(?s:.*)quantization_config"):
        load_model(folder, device="cpu", dtype="float32")


def test_a_base_that_bitsandbytes_quantised_loads_and_trains(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    from phlora.models.bnb import Linear4bit

    dense = tiny_folder(tmp_path / "dense")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    folder = tiny_folder(tmp_path / "nf4")
    quantized = AutoModelForCausalLM.from_pretrained(dense, quantization_config=settings, dtype=torch.float32)
    quantized.save_pretrained(folder)
    loaded = load_model(folder, device="cpu", dtype="float32")
    assert loaded.storage.value == "bitsandbytes"
    assert isinstance(loaded.model.model.layers[0].mlp.down_proj, Linear4bit)
    ours = load_model(dense, device="cpu", dtype="float32", storage_dtype="nf4").model
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, ours(ids).logits)
    for setting in ({"storage_dtype": "bfloat16"}, {"storage_dtype": "nf4"}, {"quantization": "int8"}):
        with pytest.raises(ConfigError, match="quantised already"):
            load_model(folder, device="cpu", dtype="float32", **setting)


@pytest.mark.parametrize("method", ["hqq", "torchao"])
def test_a_base_whose_package_is_missing_is_one_error(tmp_path: Path, method: str) -> None:
    if is_installed(method):
        pytest.skip(f"{method} is installed, and this is about its absence")
    folder = tiny_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "quant_type": "int4_weight_only"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EnvironmentProblem, match=rf"(?i)cannot be read .*{method}"):
        load_model(folder, device="cpu", dtype="float32")


# --------------------------------------------------------------------------------------------- memory, progress

PEAK = """
import sys, threading, time
from pathlib import Path
import torch
from phlora.models.load import load_model
import phlora.models.streaming, bitsandbytes

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def watch():
    while not done.is_set():
        seen.append(resident())
        time.sleep(0.001)

torch.set_num_threads(1)
load_model(sys.argv[3], device="cpu", dtype="float32", storage_dtype=sys.argv[2])
done, seen = threading.Event(), []
before = resident()
threading.Thread(target=watch, daemon=True).start()
loaded = load_model(sys.argv[1], device="cpu", dtype="float32", storage_dtype=sys.argv[2])
done.set()
from phlora.models.quantization import stored_bytes
largest = max(p.numel() for p in loaded.model.parameters())
print(max(seen) - before, stored_bytes(loaded.model))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A model of 200 MB in bfloat16 in four files, and the numbers of its largest matrix."""
    from phlora.models.tiny import tiny_tokenizer

    folder = tmp_path_factory.mktemp("large")
    config = Phi3Config(
        vocab_size=320,
        hidden_size=1024,
        intermediate_size=2560,
        num_hidden_layers=8,
        num_attention_heads=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    names, index = list(shapes), {}
    for number in range(4):
        part = names[number::4]
        file = f"model-{number + 1:05}-of-00004.safetensors"
        tensors = {name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02) for name in part}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config.dtype = torch.bfloat16
    config.architectures = ["Phi3ForCausalLM"]
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder, max(shape.numel() for shape in shapes.values())


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("storage", ["bfloat16", "float32", "nf4", "int8"])
def test_loading_takes_the_stored_model_and_a_layer(
    large: tuple[Path, int], storage: str, model_folder: Path
) -> None:
    if storage in ("nf4", "int8"):
        pytest.importorskip("bitsandbytes")
    folder, numbers = large
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), storage, str(model_folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    taken, stored = map(int, done.stdout.split())
    # The largest matrix as it is read, the next one as it is read meanwhile, and the first in float32, with room for
    # what holes the C library leaves between them.
    layer = numbers * (2 + 2 + 4 + 4)
    assert taken < stored + layer + 20e6, f"{taken / 1e6:.0f} MB for {stored / 1e6:.0f} MB stored"


def test_progress_is_shown_for_what_takes_long(tmp_path: Path, monkeypatch, capsys) -> None:
    from phlora.display import Display

    folder = tiny_folder(tmp_path)
    load_model(folder, display=Display())
    assert "Reading" not in capsys.readouterr().err
    monkeypatch.setattr(loading, "_WORTH_SHOWING", 0)
    monkeypatch.setattr(loading, "_MEGABYTE", 1_000)
    load_model(folder, display=Display())
    assert "Reading the weights: " in capsys.readouterr().err
