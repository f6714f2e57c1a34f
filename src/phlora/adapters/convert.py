"""One adapter in two formats: loralib's state dict, and PEFT's folder.

For a layer `X` with weight (N, K) and `s = lora_alpha / r`:

    loralib   X.lora_A (r, K), X.lora_B (N, r)                        Linear
              X.lora_A (n·r, K), X.lora_B (ΣN_i, r)                   MergedLinear, n of its row blocks enabled
    PEFT      base_model.model.X.lora_A.weight, ….lora_B.weight       always of the shapes of Linear

PEFT knows no row blocks, so a MergedLinear becomes the block-diagonal form: A as it is, B (N, n·r) with `B_i` at the
rows of block i and its own r columns, zero elsewhere, and alpha times n, which leaves `s` as it was. Both ways only
copy numbers, so there and back is bit-equal.

A loralib file knows neither `lora_alpha`, nor how large the blocks are, nor which are enabled; a Phlora adapter has
the blocks written down beside it. An embedding is told from a linear layer by its name, since loralib's shapes are
the same, and a convolution by the kernel that the caller names. For a kernel (k_1, ..., k_d) with `n = k_1···k_(d-1)`:

    loralib   X.lora_A (r·k_d, in·k_d), X.lora_B (out·n, r·k_d)       ΔW = (B A) in the shape (out, in, k_1, ..., k_d)
    PEFT      ….lora_A.weight (R, in, k_1, ..., k_d), ….lora_B.weight (out, R, 1, ..., 1)

In loralib n rows of B, one after the other, make one output channel, each with the same A. So PEFT's A is n copies of A
on a diagonal, its B the n rows side by side, R = n·r·k_d, and alpha grows by as much. This too only copies numbers. The
way back takes no other A than such a one; groups are left out.
"""

from __future__ import annotations

import itertools
import math
import pickle
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from phlora.adapters.base_view import BASE_CHANGING_INITS
from phlora.adapters.blockform import from_block_diagonal, to_block_diagonal
from phlora.adapters.saved_config import read_adapter_config
from phlora.errors import ConfigError, ModelError, did_you_mean
from phlora.files import ADAPTER_FACTS, read_json, write_json
from phlora.lora.blocks import RowBlock, row_blocks, split_rows
from phlora.models.families import FUSED

# Row blocks by the last part of a layer's name: Phi-3's, and GPT-2's, on which loralib is used most.
BLOCK_NAMES = {**FUSED, "c_attn": FUSED["qkv_proj"]}
CONFIG_FILE = "adapter_config.json"
_TENSOR_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_FIX_LORALIB = "where it was made: torch.save(lora.lora_state_dict(model), FILE)"
_PREFIX = "base_model.model."
_EMBEDDING_NAMES = ("wte", "wpe")
# What changes the meaning of A and B without leaving a tensor of its own.
_FOREIGN = ("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora", "arrow_config")

BlockSizes = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The row blocks of one fused weight: their sizes in the order of the rows, and which are adapted."""

    sizes: dict[str, int]
    enabled: tuple[str, ...]

    def blocks(self, r: int, lora_alpha: float) -> tuple[RowBlock, ...]:
        """The adapted blocks, each of rank `r`."""
        return row_blocks(self.sizes, self.enabled, r=r, scaling=lora_alpha / r)


@dataclass(frozen=True, kw_only=True)
class AdaptedLayer:
    """One layer's A and B as loralib stores them.

    Attributes:
        name: of the layer in the base model.
        r: of each block; of the layer where it has none.
        lora_alpha: `s · r`.
        layout: its row blocks; None for a layer without.
        kernel: of a convolution, one size for each dimension.
    """

    name: str
    lora_A: Tensor
    lora_B: Tensor
    r: int
    lora_alpha: float
    layout: Layout | None = None
    is_embedding: bool = False
    kernel: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter apart from any format: its layers, and the biases that were trained with them."""

    layers: tuple[AdaptedLayer, ...]
    biases: dict[str, Tensor]

    def tensors(self) -> list[Tensor]:
        """Every tensor, as loralib stores them."""
        return [
            *(part for layer in self.layers for part in (layer.lora_A, layer.lora_B)),
            *self.biases.values(),
        ]

    def describe(self) -> list[str]:
        """How the layers of each kind have to be built in loralib to load the file."""
        kinds: Counter[str] = Counter()
        for layer in self.layers:
            arguments = f"r={layer.r}, lora_alpha={layer.lora_alpha:g}"
            kind = "Embedding" if layer.is_embedding else "Linear"
            if layer.kernel:
                kind, arguments = (
                    f"Conv{len(layer.kernel)}d",
                    f"kernel_size={_size(layer.kernel)}, {arguments}",
                )
            if layer.layout:
                enabled = [name in layer.layout.enabled for name in layer.layout.sizes]
                sizes = list(layer.layout.sizes.values())
                kind, arguments = "MergedLinear", f"{arguments}, enable_lora={enabled}"
                # loralib itself knows blocks of equal size only.
                arguments += "" if len(set(sizes)) == 1 else f", out_features_per_block={sizes}"
            kinds[f"{_leaf(layer.name)}: {kind}({arguments})"] += 1
        return [f"{count} × {text}" for text, count in kinds.items()]


# ------------------------------------------------------------------------------------------------ loralib


def read_loralib(
    file: str | Path,
    *,
    lora_alpha: float,
    enable: Sequence[str] = (),
    blocks: BlockSizes | None = None,
    kernels: Mapping[str, Sequence[int]] | None = None,
) -> Adapter:
    """Read what `torch.save(lora.lora_state_dict(model), file)` wrote.

    Args:
        lora_alpha: that of the layers; the file does not know it.
        enable: names of the adapted row blocks (`q` or `q_proj`); not needed where the shapes leave one possibility.
        blocks: last part of a layer's name -> its blocks' rows by name, in the order of the rows; without it blocks
            are equal, as in loralib.
        kernels: last part of a convolution's name -> its kernel, (3, 3) for one of 3 × 3.

    Raises:
        ModelError: the file cannot be read, holds code or anything but a LoRA state dict, or its shapes do not fit.
        ConfigError: the blocks or a kernel cannot be told, or are named wrongly.
    """
    state = _load_tensors(Path(file))
    pairs, biases = _sort_tensors(state, "{}.lora_A", "{}.lora_B", where=str(file), fix=_FIX_LORALIB)
    enable, kernels = _full_names(enable, pairs, blocks or {}), kernels or {}
    _require_kernels(kernels, pairs, biases)
    layers = []
    for name, (A, B) in pairs.items():
        if kernel := kernels.get(_leaf(name)):
            layers.append(_stacked_convolution(name, A, B, lora_alpha=lora_alpha, kernel=tuple(kernel)))
        else:
            layers.append(
                _stacked_layer(name, A, B, lora_alpha=lora_alpha, enable=enable, blocks=blocks or {})
            )
    # loralib keeps a convolution inside of its layer.
    inner = {f"{layer.name}.conv.bias": f"{layer.name}.bias" for layer in layers if layer.kernel}
    biases = {inner.get(name, name): value for name, value in biases.items()}
    return Adapter(layers=tuple(layers), biases=biases)


def write_loralib(adapter: Adapter, file: str | Path) -> None:
    """Write a state dict for `load_state_dict(..., strict=False)`; `Adapter.describe` says for which layers."""
    state: dict[str, Tensor] = {}
    for layer in adapter.layers:
        state |= {f"{layer.name}.lora_A": layer.lora_A, f"{layer.name}.lora_B": layer.lora_B}
    inner = {f"{layer.name}.bias": f"{layer.name}.conv.bias" for layer in adapter.layers if layer.kernel}
    state |= {inner.get(name, name): value for name, value in adapter.biases.items()}
    # A view would drag the whole of its storage into the file.
    torch.save({name: value.clone() for name, value in state.items()}, file)


def _stacked_layer(
    name: str, A: Tensor, B: Tensor, *, lora_alpha: float, enable: Sequence[str], blocks: BlockSizes
) -> AdaptedLayer:
    num_blocks, rest = divmod(A.shape[0], max(1, B.shape[1]))
    if rest or not num_blocks:
        raise ModelError(
            f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} do not belong together",
            where=name,
            expected="lora_A (n·r, in_features) and lora_B (rows, r)",
        )
    layout, leaf = _stacked_layout(name, num_blocks, B.shape[0], enable=enable, blocks=blocks), _leaf(name)
    return AdaptedLayer(
        name=name,
        lora_A=A,
        lora_B=B,
        r=B.shape[1],
        lora_alpha=lora_alpha,
        layout=layout,
        is_embedding="embed" in leaf or leaf in _EMBEDDING_NAMES,
    )


def _stacked_convolution(
    name: str, A: Tensor, B: Tensor, *, lora_alpha: float, kernel: tuple[int, ...]
) -> AdaptedLayer:
    *outer, last = kernel
    r, rest = divmod(A.shape[0], last)
    if rest or B.shape[1] != A.shape[0] or A.shape[1] % last or B.shape[0] % math.prod(outer):
        raise ModelError(
            f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are not those of a kernel of {_size(kernel)}",
            where=name,
            expected=f"lora_A (r·{last}, in·{last}) and lora_B (out·{math.prod(outer)}, r·{last})",
        )
    return AdaptedLayer(name=name, lora_A=A, lora_B=B, r=r, lora_alpha=lora_alpha, kernel=kernel)


def _require_kernels(
    kernels: Mapping[str, Sequence[int]], layers: Iterable[str], biases: Iterable[str]
) -> None:
    """Every named kernel is a layer's, and every convolution that can be told is named."""
    leaves = {_leaf(name) for name in layers}
    for leaf in kernels:
        if leaf not in leaves:
            raise ConfigError(
                f"The adapter has no layer `{leaf}`", where="kernels", fix=did_you_mean(leaf, leaves)
            )
    for name in layers:
        if f"{name}.conv.bias" in biases and _leaf(name) not in kernels:
            raise ConfigError(
                "The layer is a convolution, and the file does not know its kernel",
                where=name,
                fix=f"name it: kernels={{{_leaf(name)!r}: (3, 3)}}",
            )


def _stacked_layout(
    name: str, num_blocks: int, num_rows: int, *, enable: Sequence[str], blocks: BlockSizes
) -> Layout | None:
    """The one layout that a stacked B of `num_rows` can have; None for a plain linear layer."""
    leaf = _leaf(name)
    names = list(blocks.get(leaf) or BLOCK_NAMES.get(leaf, ()))
    wanted = [part for part in names if part in enable]
    if num_blocks == 1 and not wanted and (leaf not in blocks or sum(blocks[leaf].values()) == num_rows):
        return None
    sizes = dict(blocks[leaf]) if leaf in blocks else _equal_sizes(name, names, num_blocks, num_rows)
    possible = [
        chosen
        for chosen in itertools.combinations(names, num_blocks)
        if sum(sizes[part] for part in chosen) == num_rows and (not wanted or list(chosen) == wanted)
    ]
    if len(possible) == 1:
        return Layout(sizes=sizes, enabled=possible[0])
    shown = ", ".join(f"{part} {size}" for part, size in sizes.items())
    found = f"lora_B has {num_rows} rows of {num_blocks} blocks; the weight is {shown}"
    if possible:
        choices = " or ".join(f"--enable {','.join(chosen)}" for chosen in possible)
        raise ConfigError(f"{found}, and several choices fit", where=name, fix=f"say which: {choices}")
    raise ConfigError(
        f"{found}" + (f", and {', '.join(wanted)} do not fit" if wanted else ", and no choice fits"),
        where=name,
        fix="correct --enable, or give the rows of each block: --blocks qkv_proj=3072,1024,1024",
    )


def _equal_sizes(name: str, names: Sequence[str], num_blocks: int, num_rows: int) -> dict[str, int]:
    if not names:
        raise ConfigError(
            f"The layer is a MergedLinear of {num_blocks} enabled blocks, and what blocks it has is not known",
            where=name,
            fix=f"give the rows of each block, for example --blocks {_leaf(name)}=768,768,768",
        )
    if num_rows % num_blocks:
        raise ConfigError(
            f"lora_B has {num_rows} rows, which are no {num_blocks} equal blocks",
            where=name,
            fix=f"name the base model (--model), or the rows of each block (--blocks {_leaf(name)}=…)",
        )
    return dict.fromkeys(names, num_rows // num_blocks)


# --------------------------------------------------------------------------------------------------- PEFT


def read_peft(folder: str | Path, *, enable: Sequence[str] = (), blocks: BlockSizes | None = None) -> Adapter:
    """Read a PEFT adapter folder, row blocks as Phlora wrote them down beside it.

    Args:
        enable, blocks: the row blocks of an adapter that has none written down, as for `read_loralib`; a layer
            without any is a plain linear layer.

    Raises:
        ModelError: no LoRA adapter there, tensors that have no place in loralib, or a B that is not zero outside of
            the blocks.
        ConfigError: blocks are named wrongly.
    """
    folder = Path(folder)
    config = read_peft_config(folder)
    _refuse_foreign(config, folder)
    tensors = read_peft_tensors(folder)
    state = {_plain_key(key): value for key, value in tensors.items()}
    embeddings = {
        _plain_key(key).removesuffix(".lora_A.weight") for key in tensors if "lora_embedding_A" in key
    }
    names = ("{}.lora_A.weight", "{}.lora_B.weight")
    pairs, biases = _sort_tensors(state, *names, where=str(folder), fix="use it with PEFT")
    layouts = _recorded_layouts(folder)
    enable = _full_names(enable, pairs, blocks or {})
    layers = []
    for name, (A, B) in pairs.items():
        layout = layouts.get(name) or _named_layout(name, enable, blocks or {})
        layer = _layer_of(name, A, B, _alpha(config, name, A.shape[0]), layout)
        layers.append(replace(layer, is_embedding=name in embeddings))
    return Adapter(layers=tuple(layers), biases=biases)


def write_peft(adapter: Adapter, folder: str | Path, *, base_model: str | None = None) -> None:
    """Write a plain PEFT adapter, and beside it what PEFT does not know about its row blocks."""
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    ranks, alphas, layouts = {}, {}, {}
    for layer in adapter.layers:
        kind = ("lora_embedding_{}" if layer.is_embedding else "lora_{}.weight").format
        A, B, alpha = _plain_form(layer)
        tensors |= {f"{_PREFIX}{layer.name}.{kind(part)}": value for part, value in (("A", A), ("B", B))}
        ranks[layer.name] = A.shape[0]
        alphas[layer.name] = int(alpha) if alpha == int(alpha) else alpha
        if layer.layout:
            layouts[layer.name] = {"sizes": layer.layout.sizes, "enabled": list(layer.layout.enabled)}
    adapted = set(ranks)
    for name, value in adapter.biases.items():
        owner = name.removesuffix(".bias")
        tensors[f"{_PREFIX}{owner}.base_layer.bias" if owner in adapted else f"{_PREFIX}{name}"] = value
    write_peft_tensors(tensors, folder)
    _peft_config(ranks, alphas, adapter.biases, base_model).save_pretrained(str(folder))
    facts = {"base_model": base_model, "converted_from": "loralib", "blocks": layouts}
    write_json(folder / ADAPTER_FACTS, facts)


def read_peft_config(folder: Path) -> LoraConfig:
    """The adapter's configuration.

    Raises:
        ModelError: there is none, or it is no LoRA adapter's.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise ModelError(f"The folder holds no adapter: it lacks {CONFIG_FILE}", where=str(folder))
    read_adapter_config(file)
    config = LoraConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    return config


def read_peft_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder; a pickle is read only if it holds nothing but tensors.

    Raises:
        ModelError: there are none, or they cannot be read.
    """
    for name in _TENSOR_FILES:
        if (folder / name).is_file():
            return _load_tensors(folder / name)
    raise ModelError(f"The folder holds no adapter: it lacks {_TENSOR_FILES[0]}", where=str(folder))


def write_peft_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write the tensors of an adapter folder as PEFT does."""
    # safetensors takes no two tensors of one storage.
    own = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    save_file(own, folder / _TENSOR_FILES[0], metadata={"format": "pt"})


def _peft_config(
    ranks: dict[str, int], alphas: dict[str, float], biases: Mapping[str, Tensor], base_model: str | None
) -> LoraConfig:
    # Together, so that a runtime that reads these two alone has the scaling of as many layers as possible.
    (r, alpha), _ = Counter((rank, alphas[name]) for name, rank in ranks.items()).most_common(1)[0]
    owners = {name.removesuffix(".bias") for name in biases}
    return LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        rank_pattern={name: rank for name, rank in ranks.items() if rank != r},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
        target_modules=sorted(ranks),
        bias="none" if not owners else "lora_only" if owners <= set(ranks) else "all",
        base_model_name_or_path=base_model,
        # Whether the layers belong to a chat model is known with the model only.
        task_type="CAUSAL_LM" if base_model else None,
        inference_mode=True,
    )


def _plain_key(key: str) -> str:
    """A key of a PEFT file with the name that the layer has in the base model, and linear layers' endings."""
    key = key.removeprefix(_PREFIX).replace(".base_layer.bias", ".bias")
    for part in ("A", "B"):
        key = key.replace(f".lora_embedding_{part}", f".lora_{part}.weight")
    return key


def _alpha(config: LoraConfig, name: str, rank: int) -> float:
    """`lora_alpha` of a layer such that `lora_alpha / rank` is PEFT's scaling."""
    patterns = config.alpha_pattern or {}
    alpha: float = patterns.get(get_pattern_key(list(patterns), name), config.lora_alpha)
    return alpha * math.sqrt(rank) if config.use_rslora else alpha


def _refuse_foreign(config: LoraConfig, folder: Path) -> None:
    used = [key for key in _FOREIGN if getattr(config, key, None)]
    init = str(config.init_lora_weights).lower()
    if init.startswith(BASE_CHANGING_INITS):
        used.append(f"init_lora_weights={init}, which changes the base's weights")
    if used:
        raise ModelError(
            f"loralib has no counterpart of {used[0]}",
            where=str(folder / CONFIG_FILE),
            fix="use it with PEFT",
        )


def _recorded_layouts(folder: Path) -> dict[str, Layout]:
    file = folder / ADAPTER_FACTS
    if not file.is_file():
        return {}
    recorded = read_json(file, ModelError).get("blocks") or {}
    try:
        return {
            name: Layout(sizes=dict(entry["sizes"]), enabled=tuple(entry["enabled"]))
            for name, entry in recorded.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ModelError(
            "The row blocks cannot be read",
            where=str(file),
            expected='"blocks": {layer: {"sizes": {block: rows}, "enabled": [block]}}',
        ) from None


def _named_layout(name: str, enable: Sequence[str], blocks: BlockSizes) -> Layout | None:
    """The layout that the options name for a layer of a PEFT adapter."""
    leaf = _leaf(name)
    if leaf not in blocks:
        if any(part in enable for part in BLOCK_NAMES.get(leaf, ())):
            raise ConfigError(
                f"Blocks of {leaf} are named, and their sizes are not known",
                where=name,
                fix=f"name the base model (--model), or the rows of each block (--blocks {leaf}=…)",
            )
        return None
    enabled = tuple(part for part in blocks[leaf] if part in enable)
    return Layout(sizes=dict(blocks[leaf]), enabled=enabled) if enabled else None


# ------------------------------------------------------------------------------------- the block-diagonal form


def _block_diagonal(*blocks: Tensor) -> Tensor:
    whole: Tensor = torch.block_diag(*blocks)
    return whole


def _plain_form(layer: AdaptedLayer) -> tuple[Tensor, Tensor, float]:
    """A, B and lora_alpha of a layer as PEFT has them."""
    if layer.kernel:
        A = _block_diagonal(*[layer.lora_A] * math.prod(layer.kernel[:-1]))
        B = layer.lora_B.reshape(-1, len(A), *[1] * len(layer.kernel))
        return A.view(len(A), -1, *layer.kernel), B, layer.lora_alpha * math.prod(layer.kernel)
    if layer.layout is None:
        return layer.lora_A, layer.lora_B, layer.lora_alpha
    blocks = layer.layout.blocks(layer.r, layer.lora_alpha)
    out_features = sum(layer.layout.sizes.values())
    B = to_block_diagonal(split_rows(layer.lora_B, blocks), blocks, out_features=out_features)
    return layer.lora_A, B, layer.lora_alpha * len(blocks)


def _layer_of(name: str, A: Tensor, B: Tensor, lora_alpha: float, layout: Layout | None) -> AdaptedLayer:
    """A layer as loralib has it, from PEFT's A, B and lora_alpha."""
    if A.ndim > 2:
        return _convolution_of(name, A, B, lora_alpha)
    if layout is None:
        return AdaptedLayer(name=name, lora_A=A, lora_B=B, r=A.shape[0], lora_alpha=lora_alpha)
    count, rows = len(layout.enabled), sum(layout.sizes.values())
    r, rest = divmod(A.shape[0], count)
    if rest or B.shape != (rows, A.shape[0]):
        raise ModelError(
            f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are not those of {count} blocks of {rows} rows",
            where=name,
        )
    alpha = lora_alpha / count
    try:
        own = from_block_diagonal(B, layout.blocks(r, alpha))
    except ModelError as error:
        raise ModelError(
            error.found,
            where=name,
            expected=error.expected,
            fix="convert it as one linear layer, without --enable",
        ) from None
    return AdaptedLayer(name=name, lora_A=A, lora_B=torch.cat(own), r=r, lora_alpha=alpha, layout=layout)


def _convolution_of(name: str, A: Tensor, B: Tensor, lora_alpha: float) -> AdaptedLayer:
    """A convolution as loralib has it; see the module for which A it can have."""
    *outer, last = kernel = tuple(A.shape[2:])
    count, rank = math.prod(outer), A.shape[0]
    own, flat = A.flatten(1)[: rank // count, : A.shape[1] * last], A.flatten(1)
    grouped = B.shape[1:] != (rank, *[1] * len(kernel))
    if grouped or rank % math.prod(kernel) or not torch.equal(flat, _block_diagonal(*[own] * count)):
        raise ModelError(
            f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are no convolution of loralib",
            where=name,
            expected=f"no groups, a rank that {math.prod(kernel)} divides, and an A of {count} equal diagonal blocks",
            fix="use it with PEFT",
        )
    return AdaptedLayer(
        name=name,
        lora_A=own,
        lora_B=B.reshape(-1, rank // count),
        r=rank // math.prod(kernel),
        lora_alpha=lora_alpha / math.prod(kernel),
        kernel=kernel,
    )


# ------------------------------------------------------------------------------------------- files, names


def _load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a pickle without code."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError("The file does not exist", where=str(file)) from None
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error).upper():
            raise ModelError(
                "The file holds Python objects, which could run code while they are loaded; it was not opened",
                where=str(file),
                expected="a file of tensors alone",
                fix=_FIX_LORALIB,
            ) from None
        raise _unreadable(file, error) from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _unreadable(file, error) from None
    return _require_flat(state, file)


def _unreadable(file: Path, error: Exception) -> ModelError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ModelError(
        f"The file cannot be read ({lines[0].rstrip('.')})",
        where=str(file),
        fix="it may be incomplete: copy it again",
    )


def _require_flat(state: Any, file: Path) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        raise ModelError(f"The file holds a {type(state).__name__}", where=str(file), expected="a state dict")
    other = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise ModelError(
            f"{len(other)} of {len(state)} entries are no tensors, `{other[0]}` among them",
            where=str(file),
            expected="a LoRA state dict: names with tensors",
            fix=f"save the state dict inside alone, such as checkpoint[{other[0]!r}]",
        )
    return {str(name): value.detach() for name, value in state.items()}


def _sort_tensors(
    state: Mapping[str, Tensor], name_A: str, name_B: str, *, where: str, fix: str
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """The (A, B) of each layer, and the biases; every tensor is one of them."""
    ending = name_A.format("")
    names = [key.removesuffix(ending) for key in state if key.endswith(ending)]
    pairs = {
        name: (state[name_A.format(name)], state[name_B.format(name)])
        for name in names
        if name_B.format(name) in state
    }
    biases = {key: value for key, value in state.items() if _leaf(key) == "bias" and ".lora_" not in key}
    used = {form.format(name) for name in pairs for form in (name_A, name_B)} | biases.keys()
    unused = [key for key in state if key not in used]
    if unused or not pairs:
        raise ModelError(
            f"{len(unused)} of {len(state)} tensors are not part of a lora_A with its lora_B"
            + (f", {unused[0]} among them" if unused else ""),
            where=where,
            expected="lora_A and lora_B of linear layers or embeddings, and biases",
            fix=fix,
        )
    for name, (A, B) in pairs.items():
        if A.ndim != B.ndim or A.ndim < 2 or (A.ndim > 2 and name_A.endswith("lora_A")):
            raise ModelError(
                f"lora_A has {A.ndim} dimensions and lora_B {B.ndim}", where=name, expected="two of each"
            )
    return pairs, biases


def _full_names(enable: Sequence[str], layers: Iterable[str], blocks: BlockSizes) -> list[str]:
    """`q` -> `q_proj`; every name has to be a block of some layer."""
    leaves = {_leaf(name) for name in layers}
    known = {part for leaf in leaves for part in (blocks.get(leaf) or BLOCK_NAMES.get(leaf, ()))}
    full = []
    for name in enable:
        match = next((part for part in (name, f"{name}_proj") if part in known), None)
        if match is None:
            raise ConfigError(
                f"`{name}` is no row block of any layer in the adapter",
                where="--enable",
                fix=did_you_mean(name, known) if known else "leave it out",
            )
        full.append(match)
    return full


def _size(kernel: Sequence[int]) -> str:
    """`3`, or `(3, 5)` where not all sizes are one."""
    return str(kernel[0]) if len(set(kernel)) == 1 else str(tuple(kernel))


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
