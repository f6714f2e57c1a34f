"""A model straight from its files into the storage chosen, one tensor after the other.

The layers are made without memory; each tensor is read, counted for the fingerprint, converted and put in its place,
and a linear layer that is to be quantised is so before the next one comes. At no time is there more than the stored
model, the tensor at hand and the one being read.

Only for layouts whose files hold exactly the tensors of the model: whatever transformers renames, splits or joins, it
reads itself.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from phlora.errors import ModelError
from phlora.models.allocator import return_at_once, return_freed_memory
from phlora.models.checkpoint import Checkpoint, StoredTensor
from phlora.models.families import block_linears, has_plain_layout
from phlora.models.fingerprint import IdentityMaker, WeightsIdentity
from phlora.models.known_digests import recall, remember, state_of
from phlora.models.locate import Location
from phlora.models.quantization import QuantizedLayers
from phlora.models.storage import Sizes, Storage
from phlora.models.stored_layers import as_stored, is_storable, rounded
from phlora.models.tokenizer import ModelFiles, generation_config_of

# Between weights that stay, what was freed leaves holes into which the next matrix does not fit.
_GIVEN_BACK_AFTER = 16 << 20
# Called with the bytes of each tensor once it is in its place.
Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """A model without its weights, and the files that have them.

    Attributes:
        names: tensor in the files -> what it is in the model.
        unused: tensors of the files for which the model has no place.
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    location: Location
    names: tuple[str, ...]
    unused: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum(self.checkpoint.tensors[name].num_bytes for name in self.names)


def empty_model(files: ModelFiles, *, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The model of a configuration, its parameters without memory; in a plain layout its buffers as they should be."""
    config = copy.deepcopy(files.config)
    config.name_or_path = files.location.path
    with init_empty_weights(include_buffers=not has_plain_layout(config)):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    # Under the context above every name got a parameter of its own.
    model.tie_weights()
    return model  # type: ignore[no-any-return]


def sizes_of(model: PreTrainedModel, stored: torch.dtype) -> Sizes:
    """How many numbers an `empty_model` has, in a checkpoint of this dtype."""
    names = set(block_linears(model))
    weights: dict[int, tuple[int, bool]] = {}
    for name, module in model.named_modules():
        if is_storable(module):
            weight = module.weight
            assert isinstance(weight, Tensor)
            weights[id(weight)] = weight.numel(), name in names
    total = sum(parameter.numel() for parameter in model.parameters())
    matrices = sum(count for count, _ in weights.values())
    return Sizes(
        linears=sum(count for count, is_linear in weights.values() if is_linear),
        matrices=matrices,
        rest=total - matrices,
        largest=max((count for count, _ in weights.values()), default=0),
        stored=stored,
    )


def skeleton(model: PreTrainedModel, checkpoint: Checkpoint | None, location: Location) -> Skeleton | None:
    """What is needed to load a model from these files; None where they are not of its own layout, tensor for tensor."""
    if checkpoint is None or not has_plain_layout(model.config):
        return None
    places = _places(model)
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    wanted = [name for name in places if name not in tied]
    have = checkpoint.tensors
    if tied & set(have):
        # transformers compares both, and unties them where they differ.
        return None
    if any(name not in have or tuple(places[name].shape) != have[name].shape for name in wanted):
        return None
    if getattr(model.config, "quantization_config", None) is None:
        _require_numbers(have, {name: places[name] for name in wanted}, where=location.source.location)
    unused = _without_expected(model, [name for name in have if name not in wanted])
    return Skeleton(
        model=model,
        checkpoint=checkpoint,
        location=location,
        names=tuple(wanted),
        unused=tuple(sorted(unused)),
    )


def fill(
    empty: Skeleton, storage: Storage, *, dtype: torch.dtype, device: torch.device, advance: Advance
) -> tuple[PreTrainedModel, WeightsIdentity, tuple[str, ...]]:
    """Read the weights into a skeleton, stored as asked; on `device` afterwards.

    Returns:
        The model, what its tensors are in the files, and notes.

    Raises:
        ModelError: a tensor is not whole, or has numbers that what it is to be stored as cannot hold.
    """
    files = empty.checkpoint.files
    state = state_of(files, empty.names)
    known = recall(state)
    model, maker = empty.model, IdentityMaker(known)
    quantized = None
    if storage.quantization is not None:
        quantized = QuantizedLayers(model, storage.quantization, device=device)
    passed = 0
    try:
        return_at_once()
        for name, tensor in empty.checkpoint.read_each(empty.names):
            num_bytes = tensor.nbytes
            maker.add(name, tensor)
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if quantized is not None and owner in quantized.names and leaf == "weight":
                quantized.put(owner, rounded(tensor, dtype, name=name))
            else:
                narrow = leaf == "weight" and is_storable(module)
                own = rounded(tensor, storage.dtype if narrow else dtype, name=name)
                _put(module, leaf, own.to(device))
                del own
            del tensor
            passed += num_bytes
            if passed > _GIVEN_BACK_AFTER:
                passed = 0
                return_at_once()
            advance(num_bytes)
    finally:
        return_freed_memory()
    model.tie_weights()
    for module in model.modules():
        if storage.dtype != dtype and is_storable(module):
            as_stored(module, dtype)
    # What `from_pretrained` leaves behind besides the weights.
    model._weight_conversions = []  # type: ignore[assignment]
    generation = generation_config_of(empty.location)
    if generation is not None:
        model.generation_config = generation
    notes = () if quantized is None else (str(quantized.report()),)
    identity = maker.result()
    if known is None:
        remember(files, empty.names, identity.whole, state=state)
    return model.eval(), identity, notes


def _require_numbers(have: Mapping[str, StoredTensor], places: Mapping[str, Tensor], *, where: str) -> None:
    """
    Raises:
        ModelError: a weight lies there in whole numbers, as quantised ones do, and nothing says how to read them.
    """
    for name, place in places.items():
        found = have[name].dtype
        if place.is_floating_point() and not found.is_floating_point:
            raise ModelError(
                f"The tensor {name} is stored in {str(found).removeprefix('torch.')}",
                where=where,
                expected="floating-point numbers, or a quantization_config in config.json that says how to read others",
                fix="save the model again, with its quantization_config or unquantised",
            )


def _places(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict(keep_vars=True))


def _put(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    else:
        module._buffers[leaf] = tensor


def _without_expected(model: Any, names: list[str]) -> list[str]:
    """Without the tensors that older files of this layout hold and nobody misses."""
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]
    return [name for name in names if name not in tied and not any(re.search(p, name) for p in ignored)]
