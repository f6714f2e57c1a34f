"""What a Phlora step costs against its size: each axis beside the floor of its GEMMs, with a plot.

    python benchmarks/scaling.py [--axis rank --axis modules] [--rounds 3] [--no-plots]

The embedded model, forward and backward, rows of random tokens of which the last quarter is trained. One axis varies,
the rest stands still (r=16, all linears, nothing shared):

tokens    tokens per batch, in rows of 128
length    tokens per row, 2,048 tokens in all
modules   adapted linears: qkv_proj of each layer, then o_proj, gate_up_proj and down_proj too
rank      r on all linears, 1,024 tokens
shared    share of each of 8 rows of 128 tokens that all of them begin with

The cases of an axis run in turn in every round; seconds are medians. `floor` is the time that the FLOPs which no exact
step can leave out take at the rate of the model's own GEMMs, measured in the same rounds. `step` is what a step adds
to the resident memory. Plots go to benchmarks/results/plots/. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import (
    Shapes,
    gemm_rate,
    median,
    num_trained,
    print_table,
    quiet,
    step_flops,
    work_of_segments,
)
from peer import LINEARS, RANK, Row, lora_settings, set_adapter
from resident import forget_peak, peak_bytes

PLOTS = Path(__file__).parent / "results" / "plots"
AXES = {
    "tokens": "tokens per batch",
    "length": "tokens per row",
    "modules": "adapted linears",
    "rank": "rank r",
    "shared": "shared part of each row, %",
}


@dataclass
class Case:
    """One point of an axis: the step, its work, and what was measured."""

    value: int
    rows: list[Row]
    model: Any
    flops: int
    positions: int
    seconds: list[float] = field(default_factory=list)
    step_bytes: list[int] = field(default_factory=list)

    def run(self) -> None:
        """Forward and backward, as the trainer takes them."""
        from phlora.data.collate import SharedPrefixCollator
        from phlora.models.lm_head import token_losses

        held = forget_peak(trim=not self.seconds)
        started = time.perf_counter()
        losses, _, weights = token_losses(self.model, SharedPrefixCollator()(self.rows))
        ((losses * weights).sum() / weights.sum()).backward()
        self.seconds.append(time.perf_counter() - started)
        self.step_bytes.append(peak_bytes() - held)
        self.model.zero_grad(set_to_none=True)


class Cases:
    """Makes the cases of an axis on one base, whose weights they share."""

    def __init__(self, size: str, scale: int) -> None:
        from candidates import build_base

        self.base = build_base(size)
        self.shapes = Shapes.of(self.base.config)
        self.scale = scale

    def of(self, axis: str) -> list[Case]:
        """The cases; a scale of k divides all tokens by k."""
        batch, row = 1024 // self.scale, 128 // self.scale
        if axis == "tokens":
            model = self.model()
            return [self.case(n * row, [row] * n, model=model) for n in (1, 2, 4, 8, 16)]
        if axis == "length":
            model = self.model()
            lengths = [length // self.scale for length in (64, 128, 256, 512, 1024, 2048)]
            return [self.case(n, [n] * (2 * batch // n), model=model) for n in lengths]
        if axis == "modules":
            layers = self.shapes.layers
            return [
                self.case(layers * count, [row] * 8, targets=LINEARS[:count])
                for count in range(1, 1 + len(LINEARS))
            ]
        if axis == "rank":
            return [self.case(rank, [row] * 8, rank=rank) for rank in (4, 16, 64, 128, 256)]
        model = self.model()
        return [
            self.case(percent, [row] * 8, model=model, shared=row * percent // 100)
            for percent in (0, 25, 50, 75, 90)
        ]

    def model(self, rank: int = RANK, targets: tuple[str, ...] = LINEARS) -> Any:
        from candidates import with_phlora

        base = copy.deepcopy(self.base, memo={id(weight): weight for weight in self.base.parameters()})
        model = with_phlora(base, lora_settings(rank, targets))
        set_adapter(model)
        return model.train()

    def case(
        self,
        value: int,
        lengths: list[int],
        *,
        model: Any = None,
        rank: int = RANK,
        targets: tuple[str, ...] = LINEARS,
        shared: int = 0,
    ) -> Case:
        from phlora.data.collate import SharedPrefixCollator
        from rowsets import random_rows

        # Of short tails the last half, so that only tails are trained.
        trained = 0.25 if not shared else min(0.25, (1 - shared / lengths[0]) / 2)
        rows = random_rows(lengths, vocab=self.shapes.vocab, shared=shared, trained=trained)
        segments = SharedPrefixCollator()(rows)["segments"]
        work = work_of_segments(segments, sum(map(num_trained, rows)))
        flops = sum(step_flops(self.shapes, work, rank=rank, targets=targets).values())
        return Case(value, rows, model or self.model(rank, targets), flops, work.positions)


def measure(cases: list[Case], shapes: Shapes, *, rounds: int) -> dict[str, Any]:
    """All cases in turn in every round, after one round that is not counted of the smallest case."""
    smallest = min(cases, key=lambda case: case.flops)
    smallest.run()
    smallest.seconds.clear()
    smallest.step_bytes.clear()
    rates = []
    for _ in range(rounds):
        rates.append(gemm_rate(shapes, min(1024, cases[-1].positions)))
        for case in cases:
            case.run()
    return {"gemm_gflops": round(median(rates) / 1e9, 1), "points": [_point(c, median(rates)) for c in cases]}


def _point(case: Case, rate: float) -> dict[str, Any]:
    tokens = sum(len(row["input_ids"]) for row in case.rows)
    seconds = median(case.seconds)
    return {
        "value": case.value,
        "tokens": tokens,
        "positions": case.positions,
        "seconds": round(seconds, 4),
        "floor_seconds": round(case.flops / rate, 4),
        "floor_share": round(case.flops / rate / seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "step_gb": round(max(case.step_bytes) / 1e9, 3),
    }


def show(axis: str, measured: dict[str, Any]) -> None:
    print(f"\n{axis}; GEMMs at {measured['gemm_gflops']:,} GFLOP/s")
    rows = [
        [
            f"{point['value']:,}",
            f"{point['tokens']:,}",
            f"{point['positions']:,}",
            point["seconds"],
            point["floor_seconds"],
            f"{point['floor_share']:.0%}",
            point["tokens_per_second"],
            f"{point['step_gb']} GB",
        ]
        for point in measured["points"]
    ]
    print_table((AXES[axis], "tokens", "positions", "s", "floor s", "floor", "tokens/s", "step"), rows)


def plot(axis: str, measured: dict[str, Any], folder: Path) -> Path:
    """Seconds of a step and its floor on the left, the memory that it adds on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = measured["points"]
    values = [point["value"] for point in points]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    (step,) = axes.plot(values, [p["seconds"] for p in points], "o-", color="#1f5fa8", label="step")
    (floor,) = axes.plot(
        values, [p["floor_seconds"] for p in points], "--", color="#777777", label="GEMM floor"
    )
    memory_axes = axes.twinx()
    (memory,) = memory_axes.plot(
        values, [p["step_gb"] for p in points], "s:", color="#c46a1b", label="memory added (right)"
    )
    if axis in ("tokens", "length", "rank"):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xticks(values)
    axes.minorticks_off()
    axes.set(xlabel=AXES[axis], ylabel="seconds per step", title=f"Step time against {AXES[axis]}")
    axes.set_ylim(0, 1.1 * max(max(p["seconds"], p["floor_seconds"]) for p in points))
    memory_axes.set_ylim(0, 1.1 * max(p["step_gb"] for p in points))
    memory_axes.set_ylabel("GB above the resting process")
    axes.grid(alpha=0.3)
    figure.legend(handles=[step, floor, memory], loc="outside lower center", ncols=3)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"scaling_{axis}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axis", action="append", choices=sorted(AXES), help="may be given several times")
    parser.add_argument("--size", choices=("smollm2-135m", "tiny"), default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a quarter of the tokens, one round")
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument("--plots", type=Path, default=PLOTS, help="folder of the plots")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    if not options.no_plots and find_spec("matplotlib") is None:
        parser.error(
            "the plots need matplotlib: pip install -e '.[bench]', or leave them out with --no-plots"
        )
    quiet()
    cases = Cases(options.size, 4 if options.quick else 1)
    results = {}
    for axis in options.axis or AXES:
        rounds = 1 if options.quick else options.rounds
        results[axis] = measure(cases.of(axis), cases.shapes, rounds=rounds)
        show(axis, results[axis])
        if not options.no_plots:
            print(f"plot: {plot(axis, results[axis], options.plots)}")
    document = json.dumps({"benchmark": "scaling", "size": options.size, "axes": results})
    if options.out:
        options.out.write_text(document + "\n", encoding="utf-8")
    print(document)


if __name__ == "__main__":
    main()
