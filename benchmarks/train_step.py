"""A training step, forward and backward: Phlora against Unsloth, TRL + PEFT, PEFT alone and loralib, beside the floor.

    python benchmarks/train_step.py [--set mixed --set shared] [--size smollm2-135m] [--steps 3] [--quick] [--sweep]

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
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common import (
    FIXED_RATE,
    SETS,
    SIZES,
    SWEEP,
    PeerProcess,
    Shapes,
    Work,
    Worker,
    add_unsloth_option,
    available_sides,
    find_unsloth,
    flops_of,
    gemm_rate,
    median,
    num_trained,
    print_table,
    quiet,
    work_of_rows,
    work_of_segments,
)
from peer import LAYOUTS, Row
from phlora.data.collate import SharedPrefixCollator

# The sets of each size unless --set names others.
DEFAULT_SETS = {
    "smollm2-135m": ["mixed", "shared", "alpaca", "multi_turn", "turns", "long_row", "full_loss"],
    "phi3-layers": ["full_loss"],
    "phi3-mini": ["pack_4k", "pack_16k", "pack_64k"],
    "tiny": ["mixed", "shared", "alpaca", "multi_turn", "turns", "long_row", "full_loss"],
}
EVERY_ROUND = ("phlora-shared", "trl-best", "unsloth", "unsloth-compile")
PROBED_ROWS = 8


class Contest:
    """The candidates of one size on one set: who takes part, and where each of them runs.

    Args:
        folder: the base model for Unsloth, which loads models itself.
        unsloth_python: interpreter in which Unsloth is installed, or None.
        every_side: the slow candidates too, which step once.
        only: of all these the ones that are wanted; Phlora's stream and one peer to compare it with always are.
    """

    def __init__(
        self,
        size: str,
        *,
        device: str,
        folder: Path,
        unsloth_python: str | None,
        every_side: bool,
        only: Sequence[str] = (),
    ) -> None:
        self.size, self.device, self.folder, self.unsloth_python = size, device, folder, unsloth_python
        sides = available_sides(device, unsloth_python)
        wanted = {*(only or sides), "phlora-shared", "trl-best"}
        self.sides = [side for side in sides if side in wanted and (every_side or side in EVERY_ROUND)]
        # New processes for each set, so that no peak holds what an earlier set left behind.
        self.workers = {side: self.start(side) for side in self.sides if side in EVERY_ROUND}

    def start(self, side: str) -> Worker | PeerProcess:
        """A process with one candidate, warmed up by a short step."""
        if side.startswith("unsloth") and self.device == "cpu":
            assert self.unsloth_python is not None
            if not (self.folder / "config.json").exists():
                Worker("candidates", "save_base", self.size, str(self.folder)).close()
            peer = PeerProcess(
                self.unsloth_python, "unsloth", str(self.folder), compile=side == "unsloth-compile"
            )
            peer.call("step", _WARM_UP, "row by row")
            return peer
        worker = Worker("candidates", "Candidate", side, self.size)
        worker.call("step", worker.call("rows", "mixed", scale=0.1))
        return worker

    def only_step(self, side: str, rows: list[Row]) -> dict[str, Any]:
        """One step in a process that ends with it: side by side, those of all candidates would not fit into memory."""
        worker = self.start(side)
        result: dict[str, Any] = worker.call("step", rows, "padded", trim=True)
        worker.close()
        return result

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


_WARM_UP = [{"input_ids": list(range(5, 5 + n)), "labels": list(range(5, 5 + n))} for n in (20, 33, 48)]


def measure(contest: Contest, rows: list[Row], *, shapes: Shapes, steps: int) -> dict[str, Any]:
    """All candidates on one set; those that have no worker get one for their only step."""
    sides, device, workers = contest.sides, contest.device, contest.workers
    layouts = {
        side: best_layout(workers[side], rows, device=device) for side in workers if side != "phlora-shared"
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    results: dict[str, Any] = {}
    rates: list[float] = []
    floor_rates: dict[str, list[float]] = {side: [] for side in sides}
    for round_number in range(steps):
        rates.append(gemm_rate(shapes, min(2048, sum(len(row["input_ids"]) for row in rows)), device=device))
        for side in sides if round_number == 0 else workers:
            if side in workers:
                layout = layouts.get(side, "padded")
                result = workers[side].call("step", rows, layout, trim=round_number == 0)
            else:
                result = contest.only_step(side, rows)
            if not result.get("out_of_memory"):
                seconds[side].append(result["seconds"])
                floor_rates[side].append(rates[-1])
            kept = results.setdefault(side, result)
            kept["peak"] = max(kept.get("peak", 0), result.get("peak", 0))
    plain, shared = work_of_rows(rows), shared_work(rows)
    works = {side: shared if side == "phlora-shared" else plain for side in sides}
    reference = "peft" if "peft" in results else "trl-best"
    return {
        "rows": len(rows),
        "lengths": [len(row["input_ids"]) for row in rows],
        "tokens": plain.positions,
        "trained_tokens": plain.trained,
        "tokens_shared": tokens_shared(rows),
        "layouts": layouts,
        "gemm_gflops": round(median(rates) / 1e9, 1),
        "sides": {
            side: _row_of(
                results[side], seconds, side, tokens=plain.positions, flops=flops_of(shapes, works[side])
            )
            | {"floor_share": _share(flops_of(shapes, works[side]), seconds[side], floor_rates[side])}
            for side in sides
        },
        "reference": reference,
        "loss": results[reference].get("loss"),
        "loss_differences": _differences(results, "loss", reference),
        "gradient_differences": _differences(results, "gradient", reference),
    }


def tokens_shared(rows: Sequence[Row]) -> int:
    """Tokens that need no computation of their own, since another row begins with the same ones."""
    segments = SharedPrefixCollator()(rows)["segments"]
    # Laid out one by one, so that what no row needs (what follows its last target) is left out in the same way.
    alone = sum(SharedPrefixCollator()([row])["segments"].num_positions for row in rows)
    return alone - segments.num_positions


def _differences(results: dict[str, Any], key: str, reference: str) -> dict[str, float]:
    if key not in results[reference]:
        return {}
    return {
        side: abs(result[key] / results[reference][key] - 1)
        for side, result in results.items()
        if key in result
    }


def best_layout(worker: Worker | PeerProcess, rows: list[Row], *, device: str) -> str:
    """The fastest of a peer's layouts on the first rows, leaving out those that mix rows."""
    if len(rows) == 1:
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
    shared = measured["tokens_shared"] / measured["tokens"]
    layouts = ", ".join(f"{side} {layout}" for side, layout in measured["layouts"].items())
    print(
        f"\n{size}, {name}: {SETS[name]}\n"
        f"{measured['rows']} rows, {measured['tokens']:,} tokens, {measured['trained_tokens']:,} trained; "
        f"{f'shared: {shared:.0%} of the tokens stand in an earlier row' if shared else 'these rows share nothing'}\n"
        f"GEMMs at {measured['gemm_gflops']:,} GFLOP/s; best layouts: {layouts}; "
        f"loss of {measured['reference']} {measured['loss'] or float('nan'):.6f}"
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
    for name, goal in (("alpaca", 1.5), ("shared", 3.0)):
        if name in sets and "faster_than_unsloth" in sets[name]["sides"]["phlora-shared"]:
            add(name, "faster_than_unsloth", "phlora-shared", goal)
    for name in ("alpaca", *SWEEP):
        if name in sets:
            add(name, "floor_share", "phlora-shared", 0.85)
    for name in ("full_loss", "shared"):
        if name in sets and "peft" in sets[name]["sides"]:
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
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            contest = Contest(
                size,
                device=device,
                folder=Path(folder) / "base",
                unsloth_python=options.unsloth_python,
                every_side=name not in SWEEP,
                only=options.side or (),
            )
            worker = contest.workers["phlora-shared"]
            rows = worker.call("rows", name, scale=scale, long_row=options.long_row)
            rows = rows[: 8 if options.quick else None]
            sets[name] = measure(contest, rows, shapes=worker.call("shapes"), steps=options.steps)
            add_ratio_to_unsloth(sets[name])
            show(name, size, sets[name], device=device)
            contest.close()
    show_sweep(size, sets)
    # The goals were set for the embedded model and for Phi-3-mini on a GPU, on whole sets.
    goals = [] if size in ("phi3-layers", "tiny") or options.quick else goals_of(sets, device=device)
    return {"sets": sets, "goals": goals}


def add_ratio_to_unsloth(measured: dict[str, Any]) -> None:
    """Against the faster of Unsloth's two sides, by the medians of both."""
    sides = measured["sides"]
    peers = [
        sides[side]["seconds"] for side in ("unsloth", "unsloth-compile") if "seconds" in sides.get(side, {})
    ]
    if peers:
        own = sides["phlora-shared"]
        own["faster_than_unsloth"] = round(min(peers) / own["seconds"], 3)


def show_sweep(size: str, sets: dict[str, Any]) -> None:
    """Tokens a second and share of the floor against the length of the rows."""
    swept = {name: sets[name] for name in SWEEP if name in sets}
    if not swept:
        return
    sides = list(next(iter(swept.values()))["sides"])
    print(f"\n{size}: tokens/s and share of the floor against the length of the rows")
    print_table(
        ("tokens of a row", *sides),
        [
            [
                f"{measured['lengths'][0]:,}",
                *(f"{s['tokens_per_second']} ({s['floor_share']:.0%})" for s in measured["sides"].values()),
            ]
            for measured in swept.values()
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", action="append", choices=sorted(SETS), help="may be given several times")
    parser.add_argument("--size", action="append", choices=sorted(SIZES), help="may be given several times")
    parser.add_argument("--steps", type=int, default=3, help="rounds")
    parser.add_argument(
        "--side",
        action="append",
        help="only this candidate beside `phlora-shared` and `trl-best`; repeatable",
    )
    parser.add_argument("--sweep", action="store_true", help="also rows of 64 to 2,048 tokens")
    parser.add_argument("--long-row", type=int, default=2048, help="tokens of the row of `long_row`")
    parser.add_argument("--quick", action="store_true", help="a fifth of each length, 8 rows, one round")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    add_unsloth_option(parser)
    options = parser.parse_args()
    options.unsloth_python = find_unsloth(options.unsloth_python)
    quiet()
    if options.quick:
        options.steps = 1
    on_gpu = torch.cuda.is_available()
    sizes = options.size or ["smollm2-135m", "phi3-layers", *(["phi3-mini"] if on_gpu else [])]
    if "phi3-mini" in sizes and not on_gpu:
        parser.error("phi3-mini needs a GPU")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians of {options.steps} rounds")
    device = "cuda" if on_gpu and sizes == ["phi3-mini"] else "cpu"
    known = available_sides(device, options.unsloth_python)
    if unknown := set(options.side or ()) - set(known):
        parser.error(f"--side {', '.join(sorted(unknown))}: known here are {', '.join(known)}")
    for side, text in known.items():
        print(f"{side:<16} {text}")
    swept = list(SWEEP) if options.sweep else []
    results = {
        size: run_size(size, [*(options.set or ([] if swept else DEFAULT_SETS[size])), *swept], options)
        for size in sizes
    }
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
