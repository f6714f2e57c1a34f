"""The bytes that a training step holds, counted on the model's own layers without computing one number.

The layers run forward and backward over torch's fake tensors, which have a shape, a dtype, a device and a lifetime, and
no numbers; every storage that an operation makes is counted from its birth to its death. So whatever the layers keep,
recompute or need on the way is counted as it is, by the code that trains.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phlora.adapters.peft_layer import fuse_lora, unfuse_lora
from phlora.config import Speed
from phlora.forecast.blueprint import Blueprint
from phlora.models.activation_memory import recomputing_mlps
from phlora.models.cpu_attention import forget_masks
from phlora.models.lean_layers import exchange_layers
from phlora.models.lm_head import LossTerms, head_losses, rows_of_a_chunk, trunk_and_head
from phlora.models.prefix_attention import lay_out, segment_inputs


@dataclass(frozen=True)
class PassShape:
    """The shape of one forward pass.

    Attributes:
        rows: of the batch; 1 for a stream.
        length: positions of each row.
        trained: positions that predict a trained token.
        segments: how rows lie in a stream that shares starts; None for padded rows and packs.
        masked: whether rows are padded, so that attention has a mask.
    """

    rows: int
    length: int
    trained: int
    segments: Any = None
    masked: bool = False

    @property
    def positions(self) -> int:
        """Positions that are computed."""
        return self.rows * self.length


@dataclass(frozen=True)
class StepBytes:
    """What a forward and backward pass holds, in bytes, weights and adapter not counted.

    Attributes:
        kept: alive between forward and backward, logits and loss not counted.
        kept_by_attention: of these, by attention with its projections; `kept_by_mlp`: by the MLPs with theirs.
        head: what the head and the loss add at most, their gradient that is kept included.
        peak: the most alive at once, gradients that are there then included.
        gradients: of the adapter, after backward.
        backward: what backward adds at most to what is alive before it: a layer that is computed again, for one.
    """

    kept: int
    kept_by_attention: int
    kept_by_mlp: int
    head: int
    peak: int
    gradients: int
    backward: int


def step_bytes(
    blueprint: Blueprint,
    shape: PassShape,
    *,
    device: torch.device,
    level: str = "keep",
    speed: Speed = "auto",
    accumulates: bool = False,
) -> StepBytes:
    """What one pass of this shape holds.

    Of a model whose layers are all alike four are traced, and the rest is laid on: each adds what the fourth added.
    Fewer would not do, since the first layer and the last one are unlike those between.

    Args:
        level: of `models.activation_memory`.
        accumulates: whether gradients of an earlier pass of the same step are there already.
    """
    layers = blueprint.num_layers

    def traced(count: int, model: PeftModel) -> StepBytes:
        return _trace(model, shape, device=device, level=level, speed=speed, accumulates=accumulates)

    if layers <= 4 or blueprint.layers_differ:
        return traced(layers, blueprint.with_layers(layers))
    few, more = (traced(count, blueprint.with_layers(count)) for count in (3, 4))
    values = {
        name: getattr(few, name) + (layers - 3) * (getattr(more, name) - getattr(few, name))
        for name in StepBytes.__dataclass_fields__
    }
    return StepBytes(**values)


def _trace(
    model: PeftModel, shape: PassShape, *, device: torch.device, level: str, speed: Speed, accumulates: bool
) -> StepBytes:
    segments = shape.segments
    if segments is not None:
        # Index tensors with numbers in them, made before numbers are gone.
        lay_out(segments, torch.device("cpu"))
    forget_masks()
    try:
        return _traced(model, shape, device=device, level=level, speed=speed, accumulates=accumulates)
    finally:
        forget_masks()


def _traced(
    model: PeftModel, shape: PassShape, *, device: torch.device, level: str, speed: Speed, accumulates: bool
) -> StepBytes:
    segments = shape.segments
    fake, live = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
    with fake, _ready(model, device, level=level, speed=speed) as ready, contextlib.ExitStack() as stack:
        if accumulates:
            for parameter in ready.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
        ids = torch.empty(shape.rows, shape.length, dtype=torch.long, device=device)
        asked = torch.empty(max(1, shape.trained), dtype=torch.long, device=device)
        trunk, head = trunk_and_head(ready)
        inputs: dict[str, Any] = {"input_ids": ids, "position_ids": torch.empty_like(ids)}
        if segments is not None:
            inputs = segment_inputs(trunk, {**inputs, "segments": segments})
        if getattr(trunk.layers[-1], "takes_asked", False):
            inputs["asked"] = asked
        shares = {name: 0 for name in ("attention", "mlp")}
        _count_shares(trunk, live, shares)
        gradients = [p.grad for p in ready.parameters() if p.grad is not None]
        live.leave_out([ids, asked, *ready.parameters(), *ready.buffers(), *gradients])
        stack.enter_context(live)
        if shape.masked and segments is None:
            size = shape.rows, 1, shape.length, shape.length
            inputs["attention_mask"] = torch.empty(size, dtype=torch.bool, device=device)
        hidden = trunk(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        kept = live.now
        selected = hidden if len(hidden) == len(asked) else hidden[asked]
        with live.highest() as highest:
            chunk = rows_of_a_chunk(trunk.config.get_text_config().vocab_size)
            losses = head_losses(head, selected, asked, chunk, LossTerms(), entropy=True)[0]
        in_head = highest[0] - kept
        total = losses.sum()
        del inputs, hidden, selected, losses
        before = live.now
        with live.highest() as highest:
            total.backward()
        in_backward = highest[0] - before
        gradient_bytes = sum(p.grad.nbytes for p in ready.parameters() if p.grad is not None)
    return StepBytes(
        kept=kept,
        # What is alive when a layer's parts end is not kept where the layer as a whole is computed again.
        kept_by_attention=0 if level == "recompute" else shares["attention"],
        kept_by_mlp=0 if level == "recompute" else shares["mlp"],
        head=in_head,
        peak=live.peak + (gradient_bytes if accumulates else 0),
        gradients=gradient_bytes,
        backward=in_backward,
    )


@contextlib.contextmanager
def _ready(model: PeftModel, device: torch.device, *, level: str, speed: Speed) -> Iterator[PeftModel]:
    """The model on a device and made ready as a run makes it, but for what a process has once."""
    _put_on(model, device)
    if speed == "auto":
        exchange_layers(fuse_lora(model))
    else:
        unfuse_lora(model)
    model.train()
    if level == "recompute":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    with recomputing_mlps(model) if level == "recompute_mlp" else contextlib.nullcontext():
        yield model


def _put_on(model: nn.Module, device: torch.device) -> None:
    """Exchange every tensor of a model on the meta device for one on `device`, shared ones for shared ones."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    there = torch.empty_like(tensor, device=device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(there, tensor.requires_grad) if is_parameter else there
                store[name] = made[id(tensor)]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._others: set[int] = set()
        self._watched: list[list[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], FakeTensor):
            if func is torch.ops.aten._local_scalar_dense.default:
                # The seed of a mask: any will do.
                return 0
            if func is torch.ops.aten.nonzero.default:
                # What is looked for in numbers are rare cases; there is none among no numbers.
                return args[0].new_empty(0, args[0].dim(), dtype=torch.long)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._born(tensor.untyped_storage())
        return result

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that live longer than what is counted, views of them included."""
        self._others |= {tensor.untyped_storage()._cdata for tensor in tensors}

    @contextlib.contextmanager
    def highest(self) -> Iterator[list[int]]:
        """A list whose one number is the most alive at once inside the context."""
        self._watched.append([self.now])
        try:
            yield self._watched[-1]
        finally:
            self._watched.pop()

    def _born(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._sizes or key in self._others:
            return
        self._sizes[key] = storage.nbytes()
        self.now += self._sizes[key]
        self.peak = max(self.peak, self.now)
        for number in self._watched:
            number[0] = max(number[0], self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _count_shares(trunk: Any, live: LiveBytes, shares: dict[str, int]) -> None:
    """Have each attention and each MLP add to its share what is alive when it ends and was not when it began."""
    began: list[int] = []
    for layer in trunk.layers:
        for name, kind in (("self_attn", "attention"), ("mlp", "mlp")):
            module = getattr(layer, name, None)
            if module is None:
                continue

            def add(*_: Any, kind: str = kind) -> None:
                shares[kind] += live.now - began.pop()

            module.register_forward_pre_hook(lambda *_: began.append(live.now))
            module.register_forward_hook(add)
