"""One adapted linear layer, forward and backward: Phlora against PEFT and loralib, beside the floor of the GEMMs.

    python benchmarks/lora_layers.py [--tokens 1024] [--rounds 7] [--device cpu|cuda]

All candidates of a shape run in turn in every round, and a ratio is the median over rounds of the ratio within a round,
so that a busy moment of the machine touches both. `floor` is the frozen weight's two GEMMs alone. `kept` counts
the bytes that autograd saves for backward, the weights left out; `in place` counts them for the layer with what stands
before it in the model, a norm or the gated product, as each of the two runs it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import loralib
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.phi3.modeling_phi3 import Phi3Config, Phi3MLP, Phi3RMSNorm

import phlora.lora as lora
from phlora.adapters.speed import speed_up

SHAPES = {
    "135M qkv": (576, 960),
    "135M gate_up": (576, 3072),
    "135M down": (1536, 576),
    "Phi-3-mini qkv": (3072, 9216),
    "Phi-3-mini gate_up": (3072, 16384),
    "Phi-3-mini down": (8192, 3072),
}
RANK, ALPHA = 16, 32


class _Peft(nn.Module):
    """One linear layer under the name that PEFT looks for."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def peft_layer(in_features: int, out_features: int, dropout: float) -> nn.Module:
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=["proj"])
    return get_peft_model(_Peft(in_features, out_features), settings)


def linear_of(package: object) -> Callable[[int, int, float], nn.Module]:
    def build(in_features: int, out_features: int, dropout: float) -> nn.Module:
        layer = package.Linear(
            in_features, out_features, r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, bias=False
        )
        package.mark_only_lora_as_trainable(layer)
        return layer

    return build


def merged_of(package: object) -> Callable[[int, int, float], nn.Module]:
    """q and v of a fused weight of three equal parts, which is all that loralib knows."""

    def build(in_features: int, out_features: int, dropout: float) -> nn.Module:
        layer = package.MergedLinear(
            in_features,
            out_features,
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=dropout,
            enable_lora=[True, False, True],
            bias=False,
        )
        package.mark_only_lora_as_trainable(layer)
        return layer

    return build


def in_its_place(layer: nn.Module, name: str, in_features: int) -> nn.Module:
    """The layer behind the norm, or the gated product, whose output it gets in Phi-3."""
    if name.endswith("down"):
        place = Phi3MLP(Phi3Config(hidden_size=8, intermediate_size=8))
        place.gate_up_proj, place.down_proj = nn.Identity(), layer
        return place
    return nn.Sequential(Phi3RMSNorm(in_features).requires_grad_(False), layer)


def kept_in_place(
    layers: dict[str, nn.Module], name: str, tokens: int, device: str, dtype: torch.dtype
) -> float:
    """Bytes that Phlora keeps of those that PEFT keeps, each with what stands before the layer."""
    in_features = SHAPES[name][0]
    width = 2 * in_features if name.endswith("down") else in_features
    x = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    places = {
        key: in_its_place(layers[key], name, in_features).to(device, dtype) for key in ("phlora", "peft")
    }
    speed_up(places["phlora"])
    return kept_bytes(places["phlora"], x) / kept_bytes(places["peft"], x)


def kept_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    weights = {p.data_ptr() for p in layer.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            seen[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x)
    del out
    return sum(seen.values())


def step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> None:
    layer(x).backward(dy)
    x.grad = None
    for p in layer.parameters():
        p.grad = None


def floor(weight: torch.Tensor, x: torch.Tensor, dy: torch.Tensor) -> None:
    with torch.no_grad():
        _ = x @ weight.t()
        _ = dy @ weight


def timed(function: Callable[[], None], device: str) -> float:
    started = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(
    name: str, dropout: float, tokens: int, rounds: int, device: str, dtype: torch.dtype
) -> dict[str, object]:
    in_features, out_features = SHAPES[name]
    builders = {"phlora": linear_of(lora), "peft": peft_layer}
    if out_features % 3 == 0:
        builders |= {"phlora q,v": merged_of(lora), "loralib q,v": merged_of(loralib)}
    layers = {
        key: build(in_features, out_features, dropout).to(device, dtype) for key, build in builders.items()
    }
    x = torch.randn(tokens, in_features, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, out_features, device=device, dtype=dtype)
    weight = torch.randn(out_features, in_features, device=device, dtype=dtype)
    kept = {key: kept_bytes(layer, x) for key, layer in layers.items()}
    candidates = {key: (lambda layer=layer: step(layer, x, dy)) for key, layer in layers.items()}
    candidates["floor"] = lambda: floor(weight, x, dy)
    for run in candidates.values():
        run()
    seconds = {key: [] for key in candidates}
    for _ in range(rounds):
        for key, run in candidates.items():
            seconds[key].append(timed(run, device))

    def ratio(slow: str, fast: str) -> float:
        pairs = zip(seconds[slow], seconds[fast], strict=True)
        return statistics.median(s / f for s, f in pairs)

    result: dict[str, object] = {
        "shape": name,
        "dropout": dropout,
        "ms": {key: round(1e3 * statistics.median(values), 2) for key, values in seconds.items()},
        "kept_mb": {key: round(value / 1e6, 2) for key, value in kept.items()},
        "faster_than_peft": round(ratio("peft", "phlora"), 3),
        "kept_of_peft": round(kept["phlora"] / kept["peft"], 3),
        "kept_in_place_of_peft": round(kept_in_place(layers, name, tokens, device, dtype), 3),
        "floor_share": round(1 / ratio("phlora", "floor"), 3),
    }
    if "loralib q,v" in layers:
        result["faster_than_loralib"] = round(ratio("loralib q,v", "phlora q,v"), 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    print(f"{options.tokens} tokens, r={RANK}, {dtype}, {options.device}, torch {torch.__version__}")
    print(
        f"{'shape':<20}{'dropout':>8}{'phlora':>10}{'peft':>10}{'floor':>10}{'vs peft':>9}{'kept':>7}"
        f"{'in place':>10}{'vs loralib':>12}"
    )
    results = []
    for dropout in (0.0, 0.05):
        for name in SHAPES:
            result = measure(name, dropout, options.tokens, options.rounds, options.device, dtype)
            results.append(result)
            ms = result["ms"]
            print(
                f"{name:<20}{dropout:>8}{ms['phlora']:>8} ms{ms['peft']:>8} ms{ms['floor']:>8} ms"
                f"{result['faster_than_peft']:>8}×{result['kept_of_peft']:>6}×"
                f"{result['kept_in_place_of_peft']:>9}×"
                f"{result.get('faster_than_loralib', '–'):>11}×",
                flush=True,
            )
    document = json.dumps({"benchmark": "lora_layers", "tokens": options.tokens, "results": results})
    if options.out:
        options.out.write_text(document + "\n", encoding="utf-8")
    print(document)


if __name__ == "__main__":
    main()
