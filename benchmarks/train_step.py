"""A training step, forward and backward: Phlora against TRL + PEFT, PEFT alone and loralib, beside the GEMM floor.

    python benchmarks/train_step.py [--set mixed --set shared] [--size smollm2-135m] [--steps 3] [--quick]

All candidates have the same base weights, the same non-zero adapter (r=16 on all linears), rows, order and loss, and
each lives in a process of its own. In every round each takes one step on all rows of the set, in turn. The candidates
that no goal is about (`phlora` where `phlora-shared` is the default, TRL's defaults, PEFT, loralib) do so in the first
round only. TRL's best settings are searched for on the first rows of each set, among the layouts that do not leak.

tokens/s   tokens of the rows, without padding, each counted once for its row, per second; the median over rounds
vs TRL     the median over rounds of the ratio within a round
positions  what goes through the layers: with padding, or with shared starts once
floor      FLOPs that no exact step of that layout can leave out, by the rate of the model's own GEMMs in the same round
           and by 160 GFLOP/s. The floor of `phlora-shared` counts shared starts once, that of the others each row
peak       resident memory of the process, with weights and libraries; `step` is what the first step added to it, from
           the state in which free memory was given back. Later rounds find it warm, as training does
loss       that of PEFT, and the relative difference of each candidate's from it; `gradient`: that of the norm of the
           gradient of all LoRA parameters

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common import (
    FIXED_RATE,
    LAYOUTS,
    SETS,
    SIDES,
    SIZES,
    Row,
    Shapes,
    Work,
    Worker,
    available_sides,
    gemm_rate,
    median,
    num_trained,
    print_table,
    quiet,
    step_flops,
    work_of_rows,
    work_of_segments,
)
from phlora.data.collate import SharedPrefixCollator

# The sets of each size unless --set names others.
DEFAULT_SETS = {
    "smollm2-135m": ["mixed", "shared", "multi_turn", "turns", "long_row", "full_loss"],
    "phi3-layers": ["full_loss"],
    "phi3-mini": ["pack_4k", "pack_16k", "pack_64k"],
    "tiny": ["mixed", "shared", "multi_turn", "turns", "long_row", "full_loss"],
}
EVERY_ROUND = ("phlora-shared", "trl-best")
PROBED_ROWS = 8


def measure(
    workers: dict[str, Worker], rows: list[Row], *, size: str, shapes: Shapes, steps: int, device: str
) -> dict[str, Any]:
    """All candidates on one set; those that have no worker get one for their only step."""
    sides = available_sides(device)
    layout = best_layout(workers["trl-best"], rows, device=device)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    results: dict[str, Any] = {}
    rates: list[float] = []
    floor_rates: dict[str, list[float]] = {side: [] for side in sides}
    for round_number in range(steps):
        rates.append(gemm_rate(shapes, min(2048, sum(len(row["input_ids"]) for row in rows)), device=device))
        for side in sides if round_number == 0 else EVERY_ROUND:
            if side in workers:
                chosen = layout if side == "trl-best" else "padded"
                result = workers[side].call("step", rows, chosen, trim=round_number == 0)
            else:
                result = only_step(side, size, rows)
            if not result.get("out_of_memory"):
                seconds[side].append(result["seconds"])
                floor_rates[side].append(rates[-1])
            kept = results.setdefault(side, result)
            kept["peak"] = max(kept.get("peak", 0), result.get("peak", 0))
    plain = work_of_rows(rows)
    works = {side: shared_work(rows) if side == "phlora-shared" else plain for side in sides}
    return {
        "rows": len(rows),
        "lengths": [len(row["input_ids"]) for row in rows],
        "tokens": plain.positions,
        "trained_tokens": plain.trained,
        "trl_layout": layout,
        "gemm_gflops": round(median(rates) / 1e9, 1),
        "sides": {
            side: _row_of(
                results[side], seconds, side, tokens=plain.positions, flops=flops_of(shapes, works[side])
            )
            | {"floor_share": _share(flops_of(shapes, works[side]), seconds[side], floor_rates[side])}
            for side in sides
        },
        "loss": results["peft"].get("loss"),
        "loss_differences": _differences(results, "loss"),
        "gradient_differences": _differences(results, "gradient"),
    }


def start_worker(side: str, size: str) -> Worker:
    """A process with one candidate, warmed up by a short step."""
    worker = Worker("candidates", "Candidate", side, size)
    worker.call("step", worker.call("rows", "mixed", scale=0.1))
    return worker


def only_step(side: str, size: str, rows: list[Row]) -> dict[str, Any]:
    """One step in a process that ends with it: side by side, those of all candidates would not fit into memory."""
    worker = start_worker(side, size)
    result: dict[str, Any] = worker.call("step", rows, "padded", trim=True)
    worker.close()
    return result


def _differences(results: dict[str, Any], key: str) -> dict[str, float]:
    """Relative to PEFT."""
    if key not in results["peft"]:
        return {}
    return {
        side: abs(result[key] / results["peft"][key] - 1) for side, result in results.items() if key in result
    }


def best_layout(worker: Worker, rows: list[Row], *, device: str) -> str:
    """The fastest of TRL's layouts on the first rows, leaving out those that mix rows."""
    if len({len(row["input_ids"]) for row in rows}) == 1:
        return "padded"
    seconds = {}
    for layout, (kind, size) in LAYOUTS.items():
        if size == 0 and device == "cpu":
            continue  # the attention mask of one long stream is its squared length
        if kind == "padding-free" and worker.call("leaks", layout):
            continue
        probed = worker.call("step", rows[:PROBED_ROWS] if device == "cpu" else rows, layout)
        seconds[layout] = probed.get("seconds", float("inf"))
    return min(seconds, key=seconds.__getitem__)


def shared_work(rows: Sequence[Row]) -> Work:
    segments = SharedPrefixCollator()(rows)["segments"]
    return work_of_segments(segments, sum(map(num_trained, rows)))


def flops_of(shapes: Shapes, work: Work) -> int:
    return sum(step_flops(shapes, work).values())


def _row_of(
    result: dict[str, Any], seconds: dict[str, list[float]], side: str, *, tokens: int, flops: int
) -> dict[str, Any]:
    if not seconds[side]:
        return {"out_of_memory": True}
    reference = seconds["trl-best"]
    pairs = zip(reference, seconds[side], strict=False)
    return {
        "seconds": round(median(seconds[side]), 4),
        "tokens_per_second": round(tokens / median(seconds[side]), 1),
        "faster_than_trl": round(median(trl / own for trl, own in pairs), 3) if reference else None,
        "positions": result["positions"],
        "floor_tflop": round(flops / 1e12, 4),
        "floor_share_at_160": round(flops / FIXED_RATE / median(seconds[side]), 3),
        "peak_gb": round(result["peak"] / 1e9, 3),
        "step_gb": round(result["step_bytes"] / 1e9, 3),
    }


def _share(flops: int, seconds: Sequence[float], rates: Sequence[float]) -> float | None:
    if not seconds:
        return None
    return round(median(flops / rate / own for own, rate in zip(seconds, rates, strict=True)), 3)


def show(name: str, size: str, measured: dict[str, Any], *, device: str) -> None:
    print(
        f"\n{size}, {name}: {SETS[name]}\n"
        f"{measured['rows']} rows, {measured['tokens']:,} tokens, {measured['trained_tokens']:,} trained; "
        f"GEMMs at {measured['gemm_gflops']:,} GFLOP/s; TRL's best layout: {measured['trl_layout']}; "
        f"loss of PEFT {measured['loss'] or float('nan'):.6f}"
    )
    rows = []
    for side, values in measured["sides"].items():
        if values.get("out_of_memory"):
            rows.append([side, "out of memory", *[""] * 9])
            continue
        rows.append(
            [
                side,
                values["seconds"],
                values["tokens_per_second"],
                f"{values['faster_than_trl']}×",
                f"{values['positions']:,}",
                f"{values['floor_share']:.0%}",
                f"{values['floor_share_at_160']:.0%}" if device == "cpu" else "",
                f"{values['peak_gb']:.2f} GB",
                f"{values['step_gb']:.2f} GB",
                f"{measured['loss_differences'].get(side, float('nan')):.1e}",
                f"{measured['gradient_differences'].get(side, float('nan')):.1e}",
            ]
        )
    print_table(
        ("", "s", "tokens/s", "vs TRL", "positions", "floor", "at 160", "peak", "step", "loss", "gradient"),
        rows,
    )


def goals_of(sets: dict[str, Any], *, device: str) -> list[dict[str, Any]]:
    """Each goal with its figure, for the sets that were measured."""
    goals = []

    def add(name: str, key: str, side: str, goal: float) -> None:
        value = sets[name]["sides"][side].get(key)
        if value is not None:
            goals.append(
                {
                    "set": name,
                    "side": side,
                    "figure": key,
                    "value": value,
                    "goal": goal,
                    "reached": value >= goal,
                }
            )

    if device != "cpu":
        for name in sets:
            add(name, "faster_than_trl", "phlora-shared", 1.5)
            add(name, "floor_share", "phlora-shared", 0.6)
        return goals
    for name, goal in (("mixed", 3.0), ("shared", 8.0)):
        if name in sets:
            add(name, "faster_than_trl", "phlora-shared", goal)
    for name in ("full_loss", "shared"):
        if name in sets:
            add(name, "floor_share_at_160", "phlora-shared", 0.85)
            sides = sets[name]["sides"]
            value = round(sides["phlora-shared"]["peak_gb"] / sides["peft"]["peak_gb"], 3)
            goals.append(
                {
                    "set": name,
                    "side": "phlora-shared",
                    "figure": "peak_of_peft",
                    "value": value,
                    "goal": 0.55,
                    "reached": value <= 0.55,
                }
            )
    return goals


def show_goals(size: str, goals: list[dict[str, Any]]) -> None:
    for goal in goals:
        sign = "<=" if goal["figure"] == "peak_of_peft" else ">="
        print(
            f"goal, {size}, {goal['set']}: {goal['figure']} {sign} {goal['goal']}: {goal['value']}, "
            f"{'reached' if goal['reached'] else 'missed'}"
        )


def run_size(size: str, names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    device = "cuda" if size == "phi3-mini" else "cpu"
    scale = 0.2 if options.quick else 1.0
    sets = {}
    for name in names:
        # New processes for each set, so that no peak holds what an earlier set left behind.
        workers = {side: start_worker(side, size) for side in EVERY_ROUND}
        any_worker = workers[EVERY_ROUND[0]]
        rows = any_worker.call("rows", name, scale=scale, long_row=options.long_row)
        rows = rows[: 8 if options.quick else None]
        shapes = any_worker.call("shapes")
        sets[name] = measure(workers, rows, size=size, shapes=shapes, steps=options.steps, device=device)
        show(name, size, sets[name], device=device)
        for worker in workers.values():
            worker.close()
    # The goals were set for the embedded model and for Phi-3-mini on a GPU, on whole sets.
    goals = [] if size in ("phi3-layers", "tiny") or options.quick else goals_of(sets, device=device)
    return {"sets": sets, "goals": goals}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", action="append", choices=sorted(SETS), help="may be given several times")
    parser.add_argument("--size", action="append", choices=sorted(SIZES), help="may be given several times")
    parser.add_argument("--steps", type=int, default=3, help="rounds")
    parser.add_argument("--long-row", type=int, default=2048, help="tokens of the row of `long_row`")
    parser.add_argument("--quick", action="store_true", help="a fifth of each length, 8 rows, one round")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    quiet()
    if options.quick:
        options.steps = 1
    on_gpu = torch.cuda.is_available()
    sizes = options.size or ["smollm2-135m", "phi3-layers", *(["phi3-mini"] if on_gpu else [])]
    if "phi3-mini" in sizes and not on_gpu:
        parser.error("phi3-mini needs a GPU")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians of {options.steps} rounds")
    print("\n".join(f"{side:<14} {text}" for side, text in SIDES.items()))
    results = {size: run_size(size, options.set or DEFAULT_SETS[size], options) for size in sizes}
    print()
    for size, result in results.items():
        show_goals(size, result["goals"])
    document = json.dumps(
        {"benchmark": "train_step", "steps": options.steps, "quick": options.quick, "sizes": results}
    )
    if options.out:
        options.out.write_text(document + "\n", encoding="utf-8")
    print(document)


if __name__ == "__main__":
    main()
