"""What a trainer puts on a model while it computes, and takes off when it is done.

The fused head of TRL, the losses of `phlora.SFTTrainer` and accelerate's mixed precision all replace `forward` on the
module itself. Left there, a replaced `forward` follows the model wherever it goes: `copy.deepcopy` copies the
reference, and the copy computes with the weights of the original; a pickle fails. Gradient checkpointing is a flag on
every layer, and a hook on the embedding that no pickle can hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from torch import nn

_NAMES = (
    *("forward", "_original_forward", "_is_accelerate_prepared"),
    *(
        "gradient_checkpointing",
        "_gradient_checkpointing_func",
        "_require_grads_hook",
        "_require_grads_hooks",
    ),
)
# What registers hooks that are the trainer's.
_HOOKS_OF = "enable_input_require_grads"


@dataclass
class _Attributes:
    values: dict[str, Any] = field(default_factory=dict)
    hooks: dict[int, Any] = field(default_factory=dict)


class Worn:
    """A context in which a model carries what a trainer put on it; it nests, and every exit leads back.

    What is put on inside the context (accelerate prepares a model when the training starts) is worn again the next
    time.

    Args:
        model: as it is before the trainer touches it; None where the trainer makes it.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._modules = list(model.modules()) if model is not None else []
        self._before = [_own(module) for module in self._modules]
        self._worn: list[_Attributes] = []
        self._depth = 0

    def take_off(self, model: nn.Module | None = None) -> None:
        """Put by what the model carries now, and give back what it carried before.

        Args:
            model: around the one that was there before; all that its new modules carry is the trainer's.
        """
        known = {id(module) for module in self._modules}
        made = [module for module in model.modules() if id(module) not in known] if model is not None else []
        self._modules += made
        self._before += [_Attributes() for _ in made]
        self._worn = [_own(module) for module in self._modules]
        for module, worn, before in zip(self._modules, self._worn, self._before, strict=True):
            _exchange(module, worn, before)

    def __enter__(self) -> None:
        if self._depth == 0:
            self._before = [_own(module) for module in self._modules]
            for module, worn, before in zip(self._modules, self._worn, self._before, strict=True):
                _exchange(module, before, worn)
        self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.take_off()


def _own(module: nn.Module) -> _Attributes:
    hooks = {
        number: hook
        for number, hook in module._forward_hooks.items()
        if _HOOKS_OF in getattr(hook, "__qualname__", "")
    }
    return _Attributes({name: module.__dict__[name] for name in _NAMES if name in module.__dict__}, hooks)


def _exchange(module: nn.Module, old: _Attributes, new: _Attributes) -> None:
    for name in old.values.keys() - new.values.keys():
        module.__dict__.pop(name, None)
    module.__dict__.update(new.values)
    for number in old.hooks.keys() - new.hooks.keys():
        module._forward_hooks.pop(number, None)
    module._forward_hooks.update(new.hooks)
