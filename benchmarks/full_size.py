"""The whole flow with a Phi-3-mini at full size: seconds and peak memory of every part, beside PEFT, TRL and Unsloth.

    python benchmarks/full_size.py [--work FOLDER] [--model FOLDER] [--unsloth-python PYTHON]
    python benchmarks/full_size.py --only train --only steps --storage nf4      parts; the others keep what was measured
    python benchmarks/full_size.py --show                                       what was measured so far
    python benchmarks/full_size.py --size tiny                                  the same flow in minutes, for its tests

The model has random weights of Phi-3-mini's exact configuration (32 layers, 3.8 billion parameters in bf16), written
once as safetensors shards, and a Phi-3 tokenizer; `--model` takes any real folder. Rows are those of
examples/home_assistant: one prompt of 157 tokens, which all rows share, and tails of some 40. Every part runs in
processes of its own, mostly the commands that a user types, and for each way to store the frozen weights:

load      the model alone
plan      `phlora plan`, and what it forecasts of the run
train     `phlora train`, so many steps with a checkpoint on the way; seconds of a step from the run's own log
resume    the same run, killed by SIGKILL after that checkpoint and continued: the adapter must be the same, bit by bit
evaluate  `phlora evaluate` on a few held-out rows, base against tuned
chat      time to the first token and tokens a second, beside what reading all weights once for each token takes
merge     `phlora merge`, with its own proof
reload    the merged model loaded alone
steps     forward and backward of 8 rows, beside the floor: the products that no exact step can leave out, timed alone
          in the same process, with shared starts counted once
peft, trl, unsloth
          the same 8 rows, weights, adapter and loss, without checkpointing, at the faster of two layouts (row by row,
          padded), in bf16. Peers compute every row whole: `real tokens/s` counts each token of each row, `positions/s`
          what went through the layers
profile   where the seconds of such a step go, operation by operation
curve     the loss of 10 optimizer steps beside PEFT's, the same rows in the same order

Peaks are resident memory of the process, libraries included. The benchmark says which goals were reached and which were
missed. The last line is JSON; it also stands in the work folder.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import add_unsloth_option, find_unsloth, quiet
from full_size_parts import PEERS, STORAGES, Bench, Failed
from full_size_shown import goals_of, has_bf16_units, show, show_goals
from phi3_folder import LAYERS, model_folder
from phlora.files import cache_root

PARTS = (
    "load",
    "plan",
    "train",
    "resume",
    "evaluate",
    "chat",
    "merge",
    "reload",
    "steps",
    "profile",
    *PEERS,
    "curve",
)
# A part that stands on the run, or on the merged model, of another.
NEEDS = {"resume": "train", "evaluate": "train", "chat": "train", "merge": "train", "reload": "merge"}
ONLY_TRAINED = ("recompute", "auto")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the random model")
    parser.add_argument("--model", type=Path, help="a real folder, in the place of the random model")
    parser.add_argument(
        "--work", type=Path, help="folder of model, runs and results [default: the user's cache]"
    )
    parser.add_argument("--only", action="append", choices=PARTS, help="may be given several times")
    parser.add_argument(
        "--storage", action="append", choices=sorted(STORAGES), help="[default: bf16 and nf4]"
    )
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--steps", type=int, default=10, help="of the training run")
    parser.add_argument("--save-after", type=int, default=5, help="steps before the checkpoint")
    parser.add_argument("--rounds", type=int, default=3, help="steps beside their floor")
    parser.add_argument("--curve-steps", type=int, default=10)
    parser.add_argument("--curve-rows", type=int, default=4, help="of a step of the loss curve")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate")
    parser.add_argument("--held-out", type=int, default=8, help="rows evaluated")
    parser.add_argument("--new-tokens", type=int, default=32, help="of the chat's reply")
    parser.add_argument("--keep", action="store_true", help="keep the merged model")
    parser.add_argument("--show", action="store_true", help="measure nothing; show what was measured")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    add_unsloth_option(parser)
    options = parser.parse_args(arguments)
    options.unsloth_python = find_unsloth(options.unsloth_python)
    if options.model and not (options.model / "config.json").is_file():
        parser.error(f"--model {options.model}: no folder of a model, it has no config.json")
    if not 0 < options.save_after < options.steps:
        parser.error("--save-after must be less than --steps: the run is killed between the two")
    return options


def main() -> None:
    options = parse()
    quiet()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    work = options.work or cache_root() / "full_size"
    work.mkdir(parents=True, exist_ok=True)
    folder = options.model or model_folder(work, options.size, options.layers)
    work = work / f"results-{folder.name}"
    work.mkdir(exist_ok=True)
    kept = work / "results.json"
    results: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    bench = Bench(options, folder, work)
    for storage in [] if options.show else options.storage or ["bf16", "nf4"]:
        for part in options.only or PARTS:
            if skipped(part, storage, options, results):
                continue
            results[f"{part}/{storage}"] = measure(bench, part, storage)
            kept.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(f"{part}, {storage}: {_short(results[f'{part}/{storage}'])}", flush=True)
    results = {key: results[key] for key in sorted(results, key=_place)}
    show(results)
    is_whole = options.size == "full" and options.layers == LAYERS
    goals = goals_of(results) if is_whole else []
    show_goals(goals)
    facts = {"machine": f"{platform.machine()}, {os.cpu_count()} cores, bf16 units: {has_bf16_units()}"}
    document = json.dumps(
        {"benchmark": "full_size", **facts, "model": folder.name, "results": results, "goals": goals}
    )
    if options.out:
        options.out.write_text(document + "\n", encoding="utf-8")
    print(document)
    own = {key: found for key, found in results.items() if key.partition("/")[0] not in PEERS}
    sys.exit(int(any("failed" in found for found in own.values())))


def measure(bench: Bench, part: str, storage: str) -> dict[str, Any]:
    """A part, or why there is no figure of it."""
    found: dict[str, Any] = {"at": datetime.datetime.now().isoformat(timespec="minutes"), "commit": _commit()}
    try:
        return found | (bench.peer(part, storage) if part in PEERS else getattr(bench, part)(storage))
    except (Failed, RuntimeError) as error:
        print(f"{part}, {storage}: {error}", file=sys.stderr, flush=True)
        return found | {"failed": str(error)[:500]}


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def skipped(part: str, storage: str, options: argparse.Namespace, results: dict[str, Any]) -> bool:
    """Parts that make no sense here: said where they were asked for by name."""
    why = None
    if part == "unsloth" and options.unsloth_python is None:
        why = "Unsloth is not installed; --unsloth-python names where it is"
    elif storage in ONLY_TRAINED and part not in ("plan", "train"):
        why = f"`{storage}` is trained only"
    elif part in NEEDS and "seconds" not in results.get(f"{NEEDS[part]}/{storage}", {}):
        why = f"it needs `{NEEDS[part]}` first"
    if why and options.only:
        print(f"{part}, {storage}: left out, {why}", flush=True)
    return why is not None


def _place(key: str) -> tuple[int, int]:
    part, _, storage = key.partition("/")
    return list(STORAGES).index(storage), PARTS.index(part)


def _short(found: dict[str, Any]) -> str:
    shown = {key: round(value, 3) for key, value in found.items() if isinstance(value, float)}
    return json.dumps(shown | {key: found[key] for key in ("failed", "same_bits", "layout") if key in found})


if __name__ == "__main__":
    main()
