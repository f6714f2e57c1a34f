"""A name for a base model's weights, by which an adapter knows its base again.

    bfloat16:0123456789abcdef/float32:<32 digits>/bfloat16:<32 digits>+nf4

Between the first `/` and the `+` stands a digest of every byte of every tensor, each in the narrowest dtype that holds
it without rounding; where that is not bfloat16 for all, another one of the values rounded to it follows. So one
checkpoint has one fingerprint whatever it is loaded and stored as, and what loading rounded can still be compared.

Before it stands the digest of 256 values of each tensor, by which earlier versions knew a base; behind it how the base
was quantised. Names and shapes are in all digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from phlora.models.device import DTYPES

# Where a loaded model keeps what it was made from; on the module, so that it survives PEFT and deepcopy.
_KEPT = "weights_identity"
_SAMPLES = 256
# A tensor is looked at in pieces, so that no second one of its size is needed.
_PIECE = 1 << 24
# From the narrowest; a tensor counts as what is the first to hold it.
_EXACT = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class WeightsIdentity:
    """What the tensors of a model are, in digests.

    Attributes:
        whole: a dtype's name -> digest of every byte; first the dtype that loses nothing, then those that the values
            were rounded to: bfloat16, and for weights of float32 float16 too.
        samples: a tensor's name -> its shape and evenly spaced values.
        storage: what the weights were quantised to; empty: they were not.
    """

    whole: Mapping[str, str]
    samples: Mapping[str, tuple[tuple[int, ...], Tensor]] = field(repr=False)
    storage: str = ""

    def __str__(self) -> str:
        narrow = any(values.dtype == torch.float16 for _, values in self.samples.values())
        parts = [self.sampled("float16" if narrow else "bfloat16")]
        exact = next(iter(self.whole))
        parts += [f"{dtype}:{self.whole[dtype]}" for dtype in dict.fromkeys((exact, "bfloat16"))]
        return "/".join(parts) + (f"+{self.storage}" if self.storage else "")

    def sampled(self, precision: str) -> str:
        """`<precision>:<digest>` of the samples rounded to it: the fingerprint of earlier versions."""
        digest = hashlib.sha256()
        for name, (shape, values) in sorted(self.samples.items()):
            digest.update(f"{name} {shape}".encode())
            digest.update(values.to(DTYPES[precision]).float().numpy().tobytes())
        return f"{precision}:{digest.hexdigest()[:16]}"


class IdentityMaker:
    """Gathers the tensors of a model, in any order, each under the name that it has in the bare model.

    Args:
        whole: the digests of every byte where they are known already; then only samples are taken.
    """

    def __init__(self, whole: Mapping[str, str] | None = None) -> None:
        self._whole = whole
        self._exact: dict[str, tuple[torch.dtype, str, bytes]] = {}
        self._rounded: dict[torch.dtype, dict[str, tuple[torch.dtype, str, bytes]]] = {
            torch.bfloat16: {},
            torch.float16: {},
        }
        self._samples: dict[str, tuple[tuple[int, ...], Tensor]] = {}

    @torch.no_grad()
    def add(self, name: str, tensor: Tensor) -> None:
        """Count one tensor; nothing of it but samples is kept."""
        shape, flat = tuple(tensor.shape), tensor.detach().reshape(-1).cpu()
        self._samples[name] = shape, flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].clone()
        if self._whole is not None:
            return
        exact = self._exact[name] = _described(f"{name} {shape}", flat)
        for narrow, digests in self._rounded.items():
            wide = exact[0] in (torch.float32, torch.float64)
            rounds = wide or (exact[0] == torch.float16 and narrow == torch.bfloat16)
            digests[name] = _described(f"{name} {shape}", flat.to(narrow)) if rounds else exact

    def result(self) -> WeightsIdentity:
        """What the tensors that were counted are."""
        if self._whole is not None:
            return WeightsIdentity(whole=self._whole, samples=self._samples)
        dtypes = {dtype for dtype, _, _ in self._exact.values()}
        widest = max(filter(_EXACT.__contains__, dtypes), key=_EXACT.index, default=torch.bfloat16)
        digests = {_name(widest): _digest_of_all(self._exact)}
        if widest != torch.bfloat16:
            digests["bfloat16"] = _digest_of_all(self._rounded[torch.bfloat16])
        if widest in (torch.float32, torch.float64):
            digests["float16"] = _digest_of_all(self._rounded[torch.float16])
        return WeightsIdentity(whole=digests, samples=self._samples)


def fingerprint(model: nn.Module, *, trusted: bool = True) -> str:
    """The fingerprint of a base model's weights, see the module; the base alone and under an adapter agree.

    A quantised model has the one of the weights that were quantised.

    Args:
        model: a transformers model, bare or under PEFT.
        trusted: whether what was seen when Phlora loaded the model may be taken, as long as its weights are those that
            were loaded; else every byte is read again.
    """
    return str(identity_of(model, trusted=trusted))


def identity_of(model: nn.Module, *, trusted: bool = True) -> WeightsIdentity:
    """As `fingerprint`."""
    kept: tuple[WeightsIdentity, dict[str, Any]] | None = getattr(model, _KEPT, None)
    if kept is not None and (kept[0].storage or (trusted and kept[1] == _marks(model))):
        return kept[0]
    maker = IdentityMaker()
    for name, tensor in _tensors(model):
        maker.add(name, tensor)
    return maker.result()


def keep_identity(model: nn.Module, identity: WeightsIdentity, *, storage: str = "") -> None:
    """Remember what a model was made from, and what it is stored as now."""
    setattr(model, _KEPT, (replace(identity, storage=storage), _marks(model)))


def split_fingerprint(recorded: str) -> tuple[str, str]:
    """The fingerprint of the weights, and the storage that they were quantised to (empty: none)."""
    weights, _, storage = recorded.partition("+")
    return weights, storage


def are_same(recorded: str, base: WeightsIdentity) -> bool | None:
    """Whether a recorded fingerprint is one of these weights, whatever they are stored as; None: it cannot be told.

    That of an earlier version is compared by the values that it sampled.
    """
    sampled, *whole = split_fingerprint(recorded)[0].split("/")
    theirs = dict(part.partition(":")[::2] for part in whole)
    # The one in which nothing was rounded comes first, and decides where both have it.
    shared = [dtype for dtype in theirs if dtype in base.whole]
    if shared:
        if base.whole[shared[0]] == theirs[shared[0]]:
            # What one side rounded away to be so, the other may have had otherwise.
            return True if next(iter(theirs)) == next(iter(base.whole)) else None
        across = _across_float16(next(iter(theirs)), next(iter(base.whole)))
        return None if across and shared[0] != "float16" else False
    precision = sampled.partition(":")[0]
    if precision in DTYPES and base.sampled(precision) == sampled:
        return True
    kinds = {str(values.dtype).removeprefix("torch.") for _, values in base.samples.values()}
    return None if {precision, *kinds} >= {"float16", "bfloat16"} else False


def same_fingerprints(recorded: str, other: str) -> bool:
    """Whether two fingerprints say the same of the same weights, one of them perhaps written by an earlier version."""
    if recorded == other:
        return True
    (first, *whole), (second, *others) = (split_fingerprint(text)[0].split("/") for text in (recorded, other))
    same_storage = split_fingerprint(recorded)[1] == split_fingerprint(other)[1]
    return same_storage and first == second and not (whole and others)


def _across_float16(recorded: str, here: str) -> bool:
    """Whether one was rounded to float16 and the other was not, so that their bfloat16 values differ anyway."""
    return (recorded == "float16") != (here == "float16")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _described(text: str, flat: Tensor) -> tuple[torch.dtype, str, bytes]:
    """The narrowest dtype that holds a tensor, what it is in words, and the digest of its bytes."""
    dtype = _narrowest(flat)
    return dtype, f"{text} {_name(dtype)}", _digest(flat, dtype)


def _digest_of_all(tensors: Mapping[str, tuple[torch.dtype, str, bytes]]) -> str:
    digest = xxhash.xxh3_128()
    for _, (_, text, own) in sorted(tensors.items()):
        digest.update(text.encode() + own)
    return digest.hexdigest()


def _narrowest(flat: Tensor) -> torch.dtype:
    """The narrowest dtype that holds these values as they are."""
    if not flat.is_floating_point() or flat.dtype not in _EXACT:
        return flat.dtype
    for dtype in _EXACT:
        if flat.dtype == dtype or all(
            torch.equal(piece.to(dtype).to(piece.dtype), piece) for piece in flat.split(_PIECE)
        ):
            return dtype
    return flat.dtype


def _digest(flat: Tensor, dtype: torch.dtype) -> bytes:
    digest = xxhash.xxh3_128()
    for piece in flat.split(_PIECE):
        digest.update(piece.to(dtype).contiguous().view(torch.uint8).numpy())
    return digest.digest()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and saved buffers of the base by the names that they have without an adapter, each once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        own = {**module._parameters, **module._buffers}
        for name, tensor in own.items():
            key = f"{prefix}.{name}" if prefix else name
            foreign = "lora_" in key or ".modules_to_save." in key
            if tensor is None or foreign or name in module._non_persistent_buffers_set or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            yield _base_name(key), tensor


def _marks(model: nn.Module) -> dict[str, Any]:
    """Where the tensors lie and how often each was written to: while these are the same, so are their values."""
    return {name: (tensor.data_ptr(), _version(tensor)) for name, tensor in _tensors(model)}


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _base_name(key: str) -> str:
    key = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return key.replace(".original_module.", ".")
