"""The one plain `weight` of modules that hold their parameters by row blocks: what it means to write into it.

`PlainWeight` is what `layer.lora_B.default.weight` gives; `PartsOf` is how accelerate's offloading, which knows the
plain weight, finds the parts.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


class ByRows(Protocol):
    """What a module of row blocks does for its plain weight."""

    @property
    def parts(self) -> list[Tensor]: ...

    @property
    def part_names(self) -> list[str]: ...

    def joined(self) -> Tensor: ...

    def take(self, plain: Tensor, *, swaps: bool = True) -> None: ...

    def requires_grad_(self, requires_grad: bool = True) -> Any: ...


class Offloadable(Protocol):
    """What it does for offloading."""

    @property
    def part_names(self) -> list[str]: ...

    def receive(self, plain: Tensor) -> Sequence[Tensor]: ...


# What fills a tensor without looking at its places: done to each block as to a tensor of its own.
_FILLS = frozenset(
    f"{name}_"
    for name in ("normal uniform fill zero random exponential bernoulli cauchy log_normal geometric".split())
)


_SET_DATA = Tensor.__dict__.get("data", torch._C.TensorBase.__dict__["data"]).__set__
_GET_DATA = Tensor.__dict__.get("data", torch._C.TensorBase.__dict__["data"]).__get__
_SET_REQUIRES_GRAD = torch._C.TensorBase.__dict__["requires_grad"].__set__


class PlainWeight(Tensor):
    """The plain `lora_B (N, R)` of a `BlockUp` or `lora_A (R, K)` of a `StartedDown`, put together when asked for.

    What is written into it, or into a view of it, goes on into the blocks. What fills all of it, `nn.init` for one,
    fills each block and leaves the zeros between them. Other values between the blocks are an error, but for those
    written into `data`, as hot swapping does: they make another adapter of it.
    """

    _up: ByRows
    _whole: Tensor
    _swaps: bool
    _kept: weakref.ref[Tensor]

    @classmethod
    def of(cls, up: ByRows, plain: Tensor, whole: Tensor, *, swaps: bool = False) -> PlainWeight:
        """`plain` is `whole`, or a view of it; `swaps`: it was reached by `data`."""
        self = plain.as_subclass(cls)
        # PEFT's hot swapping exchanges the insides of tensors where shapes differ, and a copy would be all that gets
        # them. torch does not do so with a tensor that has weak references; then `data` is set instead.
        self._up, self._whole, self._swaps, self._kept = up, whole, swaps, weakref.ref(self)
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        plains = [x for x in tree_leaves((args, kwargs)) if isinstance(x, cls)]
        self, owner = (args[0] if args else None), plains[0]._up
        with torch._C.DisableTorchFunctionSubclass():
            if isinstance(self, cls) and func == _SET_DATA:
                return owner.take(args[1])
            if func in (_SET_REQUIRES_GRAD, Tensor.requires_grad_):
                owner.requires_grad_(*args[1:], **kwargs)
                return self
            whole = plains[0]._whole.shape == plains[0].shape
            if whole and (
                getattr(func, "__module__", None) == "torch.nn.init"
                or (isinstance(self, cls) and name in _FILLS)
            ):
                return plains[0]._fill(func, args, kwargs)
            versions = [_version(plain) for plain in plains]
            result = func(*args, **kwargs)
            in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
            for plain, version in zip(plains, versions, strict=True):
                if _version(plain) != version or (in_place and plain is self):
                    plain._up.take(plain._whole, swaps=plain._swaps)
            if isinstance(result, Tensor):
                return plains[0]._followed(result, swaps=plains[0]._swaps or func == _GET_DATA)
            if func in (Tensor.numpy, Tensor.__array__):
                # Nobody would notice what is written into it.
                result.setflags(write=False)
            return result

    def _fill(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        with torch.no_grad():
            for part in self._up.parts:
                values, named = tree_map_only(PlainWeight, functools.partial(_instead, part), (args, kwargs))
                func(*values, **named)
            self.copy_(self._up.joined())
        return self

    def _followed(self, result: Tensor, *, swaps: bool) -> Tensor:
        """The result, whose writes are followed too where it is a view of the whole."""
        if isinstance(result, PlainWeight) or result.device.type == "meta":
            return result
        shared = result.untyped_storage().data_ptr() == self._whole.untyped_storage().data_ptr()
        return PlainWeight.of(self._up, result, self._whole, swaps=swaps) if shared else result

    def _plainly(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self._plainly(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain: Any = self._plainly()
        return plain.__reduce_ex__(protocol)


def _instead(part: Tensor, _: Tensor) -> Tensor:
    return part


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class PartsOf(Mapping[str, Any]):
    """An offloaded `weights_map` of accelerate, which knows one plain `weight`, as that of the parts."""

    def __init__(self, weights: Mapping[str, Any], module: Offloadable) -> None:
        self._weights, self._module = weights, module

    def __getitem__(self, name: str) -> Any:
        names = self._module.part_names
        try:
            return self._weights[name]
        except KeyError:
            if name not in names:
                raise
        return self._module.receive(self._weights["weight"])[names.index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
