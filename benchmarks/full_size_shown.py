"""What `full_size.py` shows of what was measured: tables, and which goals were reached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import print_table
from full_size_parts import PEERS, STORAGES

DEMO_STEPS = 113
MACHINE_BYTES = 24 * 2**30

# ---------------------------------------------------------------------------------------------------------- tables


def show(results: dict[str, Any]) -> None:
    _show_flow(results)
    _show_steps(results)
    for key, found in results.items():
        part, _, storage = key.partition("/")
        if part == "profile" and "failed" not in found:
            _show_profile(storage, found)
        if part == "curve" and "failed" not in found:
            _show_curve(storage, found)


def _show_flow(results: dict[str, Any]) -> None:
    print("\nThe whole flow (peak: resident memory of the process)")
    rows = []
    for key, found in results.items():
        part, _, storage = key.partition("/")
        if part in PEERS or part in ("steps", "profile", "curve"):
            continue
        if "failed" in found:
            rows.append([part, storage, "failed", "", found["failed"][:60].replace("\n", " ")])
            continue
        seconds = found["seconds"] if "seconds" in found else found["loading_seconds"]
        rows.append([part, storage, f"{seconds:.1f}", f"{found['peak'] / 1e9:.2f}", _remark(part, found)])
    print_table(("part", "storage", "s", "peak GB", ""), rows)


def _show_steps(results: dict[str, Any]) -> None:
    print("\nForward and backward of the same rows")
    heads = (
        "storage",
        "layout",
        "s",
        "real tokens/s",
        "positions/s",
        "positions",
        "floor",
        "peak GB",
        "loss",
    )
    rows = []
    for key, found in results.items():
        part, _, storage = key.partition("/")
        if part not in (*PEERS, "steps"):
            continue
        if "failed" in found:
            rows.append([part, storage, *["failed"] * 8])
            continue
        reference = results.get(f"peft/{storage}", {}).get("loss")
        rows.append(
            [
                "phlora" if part == "steps" else part,
                storage,
                found.get("layout", "shared"),
                f"{found['seconds']:.2f}",
                f"{found['tokens_per_second']:.1f}",
                f"{found['positions_per_second']:.1f}",
                f"{found['positions']:,}",
                f"{found['floor_share']:.0%}" if "floor_share" in found else "",
                f"{found['peak'] / 1e9:.2f}",
                f"{abs(found['loss'] / reference - 1):.1e}" if reference else "",
            ]
        )
    print_table(("", *heads), rows)


def _show_profile(storage: str, found: dict[str, Any]) -> None:
    whole = found["seconds"]
    print(f"\nWhere the {whole:.2f} s of a step go, {storage}")
    rows = [
        (one["name"], f"{one['seconds']:.3f}", f"{one['seconds'] / whole:.1%}", one["calls"])
        for one in found["operations"]
    ]
    print_table(("operation", "s", "share", "calls"), rows)


def _show_curve(storage: str, found: dict[str, Any]) -> None:
    print(f"\nLoss of each step, {storage}, {found['rows_of_a_step']} rows a step")
    numbers = [str(n + 1) for n in range(len(found["phlora"]["losses"]))]
    rows = [[side, *(f"{loss:.5f}" for loss in found[side]["losses"])] for side in ("phlora", "peft")]
    print_table(("step", *numbers), rows)


def _remark(part: str, found: dict[str, Any]) -> str:
    if part == "train":
        return f"{found['median_step']:.2f} s a step, median of {len(found['step_seconds'])}"
    if part == "resume":
        return "the same bits" if found["same_bits"] else "OTHER BITS"
    if part == "chat":
        return (
            f"first token {found['first_token']:.2f} s, then {found['tokens_per_second']:.2f} tokens/s, "
            f"{found['bandwidth_share']:.0%} of {found['read_bandwidth'] / 1e9:.1f} GB/s"
        )
    if part == "plan":
        step = found["forecast_step"]
        return f"forecast: {found['forecast_peak'] / 1e9:.2f} GB" + (f", {step:.1f} s a step" if step else "")
    if part == "evaluate":
        return f"{found['rows']} rows"
    return ""


def show_goals(goals: Sequence[dict[str, Any]]) -> None:
    print()
    for goal in goals:
        value = goal["value"]
        shown = "not measured" if value is None else value if isinstance(value, bool) else f"{value:.4g}"
        verdict = {None: "", True: ", reached", False: ", missed"}[goal["reached"]]
        print(f"goal: {goal['goal']}: {shown}{verdict}")


# ---------------------------------------------------------------------------------------------------------- goals


def has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 in hardware, as far as the system says."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def goals_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal with what was measured; `value` is None where nothing was."""

    def figure(part: str, storage: str, key: str) -> Any:
        return results.get(f"{part}/{storage}", {}).get(key)

    goals: list[dict[str, Any]] = []

    def add(goal: str, value: float | bool | None, reached: bool | None) -> None:
        goals.append({"goal": goal, "value": value, "reached": reached})

    def at_most(goal: str, value: float | None, bound: float) -> None:
        add(f"{goal} <= {bound:g}", value, None if value is None else value <= bound)

    share = figure("steps", "bf16", "floor_share")
    add(
        "share of the product floor on the demo's rows >= 0.75",
        share,
        None if share is None else share >= 0.75,
    )
    peers = [
        results[f"{side}/{storage}"]
        for side in PEERS
        for storage in STORAGES
        if "seconds" in results.get(f"{side}/{storage}", {})
    ]
    fitting = [peer["seconds"] for peer in peers if peer["peak"] <= MACHINE_BYTES]
    own = figure("steps", "bf16", "seconds")
    ratio = min(fitting) / own if fitting and own else None
    add(
        "times as fast as the fastest peer that fits in 24 GiB >= 4",
        ratio,
        None if ratio is None else ratio >= 4,
    )
    at_most(
        "bf16: losses of 10 steps, largest relative difference from PEFT",
        figure("curve", "bf16", "largest_difference"),
        1e-3,
    )
    exact = figure("curve", "bf16-fp32", "largest_difference")
    at_most("stored in bf16, computed in fp32: the same", exact, 1e-5)
    units = has_bf16_units()
    step = figure("train", "bf16", "median_step")
    minutes = None if step is None else step * DEMO_STEPS / 60
    at_most(
        f"minutes of the demo's {DEMO_STEPS} steps by the median step, {'with' if units else 'no'} bf16 units",
        minutes,
        20 if units else 100,
    )
    for storage, bound in (("bf16", 10.5), ("recompute", 9.0), ("nf4", 5.0)):
        for part in ("load", "train"):
            peak = figure(part, storage, "peak")
            if storage != "recompute" or part == "train":
                at_most(f"peak GB of {part}, {storage}", None if peak is None else peak / 1e9, bound)
    for storage in ("bf16", "nf4"):
        same = figure("resume", storage, "same_bits")
        add(f"killed and resumed, {storage}: the same bits", same, same)
    return goals
