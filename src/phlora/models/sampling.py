"""How the next token is chosen: the likeliest one, or drawn from what temperature, top_k and top_p leave.

As in transformers, the logits are divided by the temperature first, then the `top_k` likeliest tokens stay, and of
those the nucleus: the fewest whose probabilities reach `top_p`.

Legend: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from phlora.errors import ConfigError, shown

# From the logits of the next token (V) to its id.
Pick: TypeAlias = Callable[[torch.Tensor], int]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of replies are chosen, checked when it is made.

    Attributes:
        temperature: 0 always takes the likeliest token; otherwise logits are divided by it and a token is drawn.
        top_p: draw among the fewest tokens whose probabilities reach this sum; 1: among all.
        top_k: draw among so many of the likeliest tokens; 0: among all.
        seed: of the first reply's draws, and one more for each further reply; None draws anew each time.

    Raises:
        ConfigError: a value out of range, or one that only draws can heed where nothing is drawn.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks: dict[str, tuple[bool, str]] = {
            "temperature": (_is_number(self.temperature) and 0 <= self.temperature < math.inf, "0 or more"),
            "top_p": (_is_number(self.top_p) and 0 < self.top_p <= 1, "above 0, and 1 at most"),
            "top_k": (_is_whole(self.top_k) and self.top_k >= 0, "a whole number: 0 for all tokens, or more"),
            "seed": (
                self.seed is None or (_is_whole(self.seed) and self.seed >= 0),
                "a whole number from 0 on",
            ),
        }
        for name, (holds, expected) in checks.items():
            if not holds:
                raise ConfigError(f"{shown(getattr(self, name))} was given", where=name, expected=expected)
        if self.is_greedy and (self.top_p < 1 or self.top_k > 0):
            name = "top_p" if self.top_p < 1 else "top_k"
            raise ConfigError(
                f"{name}={getattr(self, name)} does nothing at temperature 0, which takes the likeliest token",
                fix=f"set a temperature, such as 0.7, or leave {name} out",
            )

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    def picker(self, reply: int = 0) -> Pick:
        """What chooses the tokens of one reply; the draws of one do not depend on those of another."""
        return _greedy if self.is_greedy else _sampler(self, reply)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _greedy(logits: torch.Tensor) -> int:
    return int(logits.argmax())


def _sampler(sampling: Sampling, reply: int) -> Pick:
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed((sampling.seed + reply) % 2**63)

    def draw(logits: torch.Tensor) -> int:
        probs, order = _left_to_draw_from(logits, sampling)
        return int(order[torch.multinomial(probs, 1, generator=generator)])

    return draw


def _left_to_draw_from(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of tokens from the likeliest down, 0 for those that are left out, and the tokens' ids."""
    # On the CPU, so that a seed means the same on every device; from the largest down, in fp64, so that
    # next to no temperature is next to greedy and not infinite.
    scores, order = logits.double().cpu().sort(descending=True)
    if sampling.top_k:
        scores, order = scores[: sampling.top_k], order[: sampling.top_k]
    probs = ((scores - scores[0]) / sampling.temperature).float().softmax(-1)
    # A token is in the nucleus while the sum before it has not reached top_p; the first always is.
    probs[1:][(probs.cumsum(-1) - probs >= sampling.top_p)[1:]] = 0
    return probs, order


GREEDY = Sampling()
