"""The speed pass over a loaded model: what its layers compute stays, what they keep and touch on the way shrinks.

Legend: `T` tokens (any leading dimensions), `D` model width, `I` width inside the MLP, `H` query heads, `G` kv heads,
`E` head width.

Chosen once, after the adapter is in place, and undone by `slow_down`. The
classes of modules are exchanged, never their parameters, hooks or names, so that whatever holds them (PEFT, an
optimizer, a checkpoint) sees no difference.

- `FrozenLinear`: a frozen linear layer keeps nothing for backward but its weight.
- `LeanRMSNorm`: keeps its input and one number per token. Its output says how to compute it again (`lora.recompute`),
  so that a LoRA layer behind it keeps nothing more.
- `LeanMLP`: keeps the output of gate_up and nothing else of width I; the gated product is made again for `down_proj`.
  Where it is told to (`models.activation_memory`) it makes that output again too.
- `LeanAttention`: q, k and v are rotated and laid out in one pass and the fused qkv is let go.
- `LastLayer`: what follows the last attention runs only on the positions that `models.lm_head` asks for, those that
  predict a trained token.

All compute in the same precision as the layers that they stand for: with torch's own operations on any device, and
where there is a compiler with chains of them in one pass over memory (`models.kernels`).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.phi3.modeling_phi3 import (
    ALL_ATTENTION_FUNCTIONS,
    Phi3Attention,
    Phi3DecoderLayer,
    Phi3MLP,
    Phi3Model,
    Phi3RMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from phlora.lora import matmul
from phlora.lora.autograd import is_recorded_backward, recorded_gradients, sees_through
from phlora.lora.frozen import FrozenLinear
from phlora.lora.recompute import Recompute, attach_recompute, recompute_of
from phlora.models import kernels
from phlora.models.activation_memory import computed_again, with_same_randomness
from phlora.models.allocator import keep_freed_memory


@dataclass(frozen=True)
class SpeedPass:
    """What was chosen for a model on this machine.

    Attributes:
        layers: name of the replacement -> how many layers it stands for.
        products: the library that multiplies matrices.
        threads: threads of a product on the CPU.
        chains: what computes chains of element-wise operations.
        keeps_memory: whether freed memory is kept for the next step instead of being given back to the system.
    """

    layers: dict[str, int]
    products: str
    threads: int
    chains: str
    keeps_memory: bool

    def describe(self) -> str:
        """One line for the log."""
        layers = ", ".join(f"{count} {name}" for name, count in self.layers.items()) or "no layers replaced"
        memory = ", freed memory kept" if self.keeps_memory else ""
        return f"{layers}; products by {self.products}, {self.threads} threads; {self.chains}{memory}"


def speed_pass(model: nn.Module) -> SpeedPass:
    """Exchange the layers of a model, with its adapters in place, for their lean forms; see the module.

    Call it once the parameters that train are known: a layer whose own weight trains is left as it is.
    """
    replaced = exchange_layers(model)
    device = next(model.parameters()).device
    return SpeedPass(
        layers=replaced,
        products=matmul.backend(device),
        threads=torch.get_num_threads(),
        chains=_describe_chains(device),
        keeps_memory=device.type == "cpu" and keep_freed_memory(),
    )


def _describe_chains(device: torch.device) -> str:
    if device.type != "cpu":
        return "element-wise chains by torch"
    obstacle = kernels.obstacle()
    return "element-wise chains compiled" if obstacle is None else f"element-wise chains by torch: {obstacle}"


def chains_of(model: nn.Module, *, dtype: torch.dtype, device: torch.device) -> int:
    """How many layers of a model have chains of element-wise operations computed by `models.kernels`, where it can."""
    chained = (LeanRMSNorm, LeanMLP, LeanAttention)
    return sum(isinstance(m, chained) for m in model.modules()) if kernels.takes(dtype, device) else 0


def exchange_layers(model: nn.Module) -> dict[str, int]:
    """The part of `speed_pass` that concerns the model alone; how many layers each replacement stands for."""
    replaced: Counter[str] = Counter()
    for module in model.modules():
        lean = _LEAN.get(type(module))
        if lean is not None and lean.fits(module):
            module.__class__ = lean
            replaced[lean.label] += 1
        if isinstance(module, Phi3Model) and type(module.layers[-1]) is Phi3DecoderLayer:
            module.layers[-1].__class__ = LastLayer
    return dict(replaced)


def slow_down(model: nn.Module) -> nn.Module:
    """Undo `speed_pass` on the layers; the same model."""
    originals = {lean: original for original, lean in _LEAN.items()} | {LastLayer: Phi3DecoderLayer}
    for module in model.modules():
        module.__class__ = originals.get(type(module), type(module))
    return model


class LeanRMSNorm(Phi3RMSNorm):
    """`y = w · x / sqrt(mean(x²) + eps)`, the mean in fp32, over the last dimension."""

    label = "RMS norms"

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return not module.weight.requires_grad

    def forward(self, x: Tensor) -> Tensor:
        if not _is_recorded(x) or self.weight.requires_grad:
            return super().forward(x)
        y, rstd = _RMSNorm.apply(x, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
        again = functools.partial(_normalize_again, eps=self.variance_epsilon)
        # Not detached: a second derivative goes through what was computed again.
        return attach_recompute(y, Recompute(again, (x, rstd, self.weight)))


class LeanMLP(Phi3MLP):
    """`down(up · silu(gate))` with `gate, up` the halves of `gate_up(x)`.

    Attributes:
        recomputes: whether backward computes gate_up again, from what makes `x` again where `x` says so, else from `x`
            (`models.activation_memory`).
    """

    label = "gated MLPs"
    recomputes = False

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return isinstance(module, Phi3MLP) and module.config.hidden_act in ("silu", "swish")

    def forward(self, hidden_states: Tensor) -> Tensor:
        if sees_through():
            return super().forward(hidden_states)
        again = self._gate_up_again(hidden_states) if self.recomputes and torch.is_grad_enabled() else None
        gate_up = self.gate_up_proj(hidden_states)
        if not _is_recorded(gate_up):
            projected: Tensor = self.down_proj(_gate(gate_up))
            return projected
        with computed_again(gate_up, again) if again else nullcontext():
            product = _Gate.apply(gate_up)  # type: ignore[no-untyped-call]
            projected = self.down_proj(attach_recompute(product, Recompute(_gate, (gate_up,))))
        return projected

    def _gate_up_again(self, x: Tensor) -> Callable[[], Tensor]:
        """How gate_up is computed again from what is kept anyway."""
        note = recompute_of(x) or Recompute(lambda x: x, (x,))
        kept = tuple(tensor.detach() for tensor in note.inputs)
        return with_same_randomness(
            self.gate_up_proj, lambda: self.gate_up_proj(note.function(*kept)), device=x.device
        )


class LeanAttention(Phi3Attention):
    """Phi-3's attention; differs from it in how q, k and v come out of the fused projection, in training."""

    label = "attentions"

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return True

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        *,
        wanted: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        # transformers declares three results and returns two: the states and, if asked for, the attention weights.
        recorded = torch.is_grad_enabled() and not sees_through()
        if (past_key_values is not None or not recorded) and wanted is None:
            return super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
        q, k, v = _SplitAndRotate.apply(  # type: ignore[no-untyped-call]
            self.qkv_proj(hidden_states), *position_embeddings, self.num_key_value_heads, self.head_dim
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=getattr(self.config, "sliding_window", None),
            **kwargs,
        )
        output = output.flatten(-2)
        return self.o_proj(output if wanted is None else _at(output, wanted)), weights


class LastLayer(Phi3DecoderLayer):
    """Phi-3's layer, which leaves out what nobody reads: (B, T, D) -> (1, S, D) for S `asked` positions.

    The keys and values of all positions are needed, and nothing else of the others. Where dropout is at work all
    positions are computed, so that each has the mask that it would have in the plain layer.
    """

    takes_asked = True

    def forward(
        self, hidden_states: Tensor, *args: Any, asked: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        plain = args or not isinstance(self.self_attn, LeanAttention) or _drops(self) or sees_through()
        if asked is None or plain:
            return super().forward(hidden_states, *args, **kwargs)
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), wanted=asked, **kwargs)
        x = _at(hidden_states, asked) + self.resid_attn_dropout(attended)
        y: Tensor = x + self.resid_mlp_dropout(self.mlp(self.post_attention_layernorm(x)))
        return y


_LEAN: dict[type[nn.Module], Any] = {
    nn.Linear: FrozenLinear,
    Phi3RMSNorm: LeanRMSNorm,
    Phi3MLP: LeanMLP,
    Phi3Attention: LeanAttention,
}


def _drops(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in module.modules())


def _at(x: Tensor, positions: Tensor) -> Tensor:
    """(B, T, ...) -> (1, S, ...): those of S positions, counted along the rows."""
    return x.flatten(0, 1).index_select(0, positions).unsqueeze(0)


def _is_recorded(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad and not sees_through()


def _normalize(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    if kernels.fits(x, weight):
        return kernels.normalize(x, rstd, weight)
    return weight * (x.float() * rstd).to(x.dtype)


def _normalize_again(x: Tensor, rstd: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """`_normalize`, of which `rstd` is a part where the derivative counts."""
    return _normalize(x, _rstd(x, eps) if torch.is_grad_enabled() else rstd, weight)


def _rstd(x: Tensor, eps: float) -> Tensor:
    """`1 / rms (..., 1)` in fp32."""
    return x.float().square().mean(-1, keepdim=True).add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    """x (..., D), weight (D,) frozen -> y (..., D) and 1 / rms (..., 1) in fp32.

    With `n = x · rstd` and `c = w · dy`: `dx = rstd · (c - n · mean(c · n))`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        rstd = _rstd(x, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps = eps
        ctx.mark_non_differentiable(rstd)
        return _normalize(x, rstd, weight), rstd

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        if is_recorded_backward():
            (dx,) = recorded_gradients(lambda x: _normalize(x, _rstd(x, ctx.eps), weight), [x], dy)
            return dx, None, None
        if kernels.fits(dy, x, weight):
            return kernels.normalize_backward(dy, x, rstd, weight), None, None
        c, n = dy.float() * weight.float(), x.float() * rstd
        mean = (c * n).mean(-1, keepdim=True)
        return c.addcmul_(n, mean, value=-1).mul_(rstd).to(x.dtype), None, None


def _gate(gate_up: Tensor) -> Tensor:
    if kernels.fits(gate_up):
        return kernels.gate(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class _Gate(torch.autograd.Function):
    """gate_up (..., 2I) -> `up · silu(gate)` (..., I); the gradient is written into one buffer."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _gate(gate_up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor | None:
        (gate_up,) = ctx.saved_tensors
        if is_recorded_backward():
            return recorded_gradients(_gate, [gate_up], dy)[0]
        if kernels.fits(dy, gate_up):
            return kernels.gate_backward(dy, gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        gradient = torch.empty_like(gate_up)
        d_gate, d_up = gradient.chunk(2, dim=-1)
        torch.mul(dy, F.silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=d_gate)
        return gradient


class _SplitAndRotate(torch.autograd.Function):
    """qkv (B, T, (H + 2G) E), cos and sin (B, T, R) with R <= E -> q (B, H, T, E), k and v (B, G, T, E).

    Rotary embedding of the first R numbers of each head: `x cos + (-x₂, x₁) sin` for halves `x₁, x₂`.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, num_kv_heads: int, head_dim: int
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.num_kv_heads = num_kv_heads
        heads: tuple[Tensor, ...]
        if kernels.fits(qkv, cos, sin):
            heads = kernels.split_and_rotate(qkv, cos, sin, num_kv_heads, head_dim)
        else:
            q, k, v = _heads(qkv, num_kv_heads, head_dim)
            # Gaps between the rows of v would keep the whole of qkv.
            heads = *(_rotate(x, cos, sin, direction=1) for x in (q, k)), v.contiguous()
        return tuple(x.transpose(1, 2) for x in heads)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        if is_recorded_backward():
            return _recorded_join(gradients, cos, sin, ctx.num_kv_heads), None, None, None, None
        dq, dk, dv = (x.transpose(1, 2) for x in gradients)
        if kernels.fits(dq, dk, dv, cos, sin):
            return kernels.join_and_rotate_back(dq, dk, dv, cos, sin), None, None, None, None
        num_heads = dq.shape[2] + 2 * ctx.num_kv_heads
        d_qkv = dq.new_empty(*dq.shape[:2], num_heads * dq.shape[3])
        q, k, v = _heads(d_qkv, ctx.num_kv_heads, dq.shape[3])
        _rotate(dq, cos, sin, direction=-1, out=q)
        _rotate(dk, cos, sin, direction=-1, out=k)
        v.copy_(dv)
        return d_qkv, None, None, None, None


def _recorded_join(
    gradients: tuple[Tensor, ...], cos: Tensor, sin: Tensor, num_kv_heads: int
) -> Tensor | None:
    """The gradient of qkv by transformers' own rotation; linear, so that qkv itself does not count."""
    rows, num_heads, tokens, head_dim = gradients[0].shape
    qkv = gradients[0].new_zeros(rows, tokens, (num_heads + 2 * num_kv_heads) * head_dim).requires_grad_()

    def formula(qkv: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (x.transpose(1, 2) for x in _heads(qkv, num_kv_heads, head_dim))
        return (*apply_rotary_pos_emb(q, k, cos, sin), v)

    return recorded_gradients(formula, [qkv], gradients)[0]


def _heads(qkv: Tensor, num_kv_heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """Views of q (B, T, H, E), k and v (B, T, G, E)."""
    heads = qkv.unflatten(-1, (-1, head_dim))
    counts = [heads.shape[2] - 2 * num_kv_heads, num_kv_heads, num_kv_heads]
    parts: tuple[Tensor, ...] = heads.split(counts, dim=2)
    return parts


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, *, direction: int, out: Tensor | None = None) -> Tensor:
    """The rotary embedding of x (B, T, heads, E), or with direction -1 its transpose, which is its inverse too."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    width, half = cos.shape[-1], cos.shape[-1] // 2
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    torch.mul(x[..., :width], cos, out=out[..., :width])
    # The transpose takes the other half of sin along with the sign.
    first, second = (sin[..., :half], sin[..., half:])[::direction]
    out[..., :half].addcmul_(x[..., half:width], first, value=-direction)
    out[..., half:width].addcmul_(x[..., :half], second, value=direction)
    out[..., width:] = x[..., width:]
    return out
