"""How far is each kind of adapter, once exported and opened in its client, from the run's own model?

python benchmarks/exports.py [--model tiny|FOLDER|NAME] [--steps 6]

`tiny` is a random Phi-3 of two layers: what a format can carry does not depend on what was learned. Each row is one
`phlora export`, whose verdict is shown: the client, prompts with other tokens, answers that changed, and the largest
difference of a log-probability, in nats. What a target refuses is a row as well.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from phlora import export_run, finetune
from phlora.display import Display
from phlora.errors import ConfigError, ModelError
from phlora.testing import chat_rows, tiny_folder

QUIET = Display(quiet=True)
NAMES = ["q_proj", "v_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "whole weights": {"peft_config": {"r": 8, "target_modules": "all-linear"}},
    "q and v alone": {"peft_config": {"r": 8, "target_modules": NAMES}},
    "unequal ranks": {
        "peft_config": {
            "r": 8,
            "lora_alpha": 12,
            "target_modules": [*NAMES, "down_proj"],
            "rank_pattern": {"v_proj": 4},
        }
    },
    "DoRA": {"peft_config": {"r": 8, "target_modules": "all-linear", "use_dora": True}},
    "trained on NF4": {
        "peft_config": {"r": 8, "target_modules": "all-linear"},
        "model": {"quantization": {"type": "nf4"}},
    },
}
TARGETS: dict[str, dict[str, Any]] = {
    "peft": {"target": "peft"},
    "vllm": {"target": "vllm"},
    "vllm before 0.32, sglang": {"target": "vllm", "vllm_before": "0.32"},
    "loralib": {"target": "loralib"},
    "merged": {"target": "merged", "type": "float32"},
    "gguf f32": {"target": "gguf", "type": "f32"},
    "gguf f16": {"target": "gguf", "type": "f16"},
    "gguf q8_0": {"target": "gguf", "type": "q8_0"},
    "gguf q4_k_m": {"target": "gguf", "type": "q4_k_m"},
    "gguf, adapter alone": {"target": "gguf", "adapter_only": True},
    "ollama": {"target": "ollama", "type": "f16"},
}


def trained(model: str, kind: dict[str, Any], folder: Path, steps: int) -> Path:
    """A run with a few held-out rows."""
    rows = chat_rows(24)
    done = finetune(
        model={"name": model, "dtype": "float32", "device": "cpu", **kind.get("model", {})},
        data=rows[:16],
        eval_data=rows[16:],
        training_config={"max_steps": steps, "learning_rate": 1e-2},
        evaluation={"enabled": False},
        output=folder,
        display=QUIET,
        peft_config=kind["peft_config"],
    )
    assert done.folder is not None
    return done.folder


def measured(run: Path, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """One export's verdict, or what was said instead."""
    try:
        verdict = export_run(run, folder, display=QUIET, **options).verdict
    except (ModelError, ConfigError) as refusal:
        return {"client": "refused", "why": refusal.found}
    return {
        "client": verdict.client,
        "verified": verdict.verified,
        "prompts_differing": verdict.prompts_differing,
        "changed_answers": verdict.changed_answers,
        "num_prompts": verdict.num_prompts,
        "largest_difference": verdict.largest_difference,
        "losses": dict(verdict.losses),
    }


def shown(found: dict[str, Any]) -> str:
    """A row's cells."""
    if found["client"] == "refused":
        return f"refused: {found['why'].splitlines()[0]} | | |"
    count = found["num_prompts"]
    if not count:
        return f"{found['client']} | equal to the bit | | |"
    largest = found["largest_difference"]
    return (
        f"{found['client']} | {found['prompts_differing']} of {count} | {found['changed_answers']} of {count} | "
        f"{'-' if largest is None else format(largest, '.1e')} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", choices=KINDS, action="append", help="kinds of adapters; repeatable")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    print("| adapter | target | client | other prompt tokens | changed answers | largest difference |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        model = str(tiny_folder(place / "tiny")) if options.model == "tiny" else options.model
        for number, kind in enumerate(options.only or KINDS):
            run = trained(model, KINDS[kind], place / f"run{number}", options.steps)
            for target, asked in TARGETS.items():
                found = measured(run, place / f"out{number}-{target}", asked)
                print(f"| {kind} | {target} | {shown(found)}", flush=True)
                results.append({"adapter": kind, "target": target, **found})
    print(json.dumps({"model": options.model, "exports": results}))


if __name__ == "__main__":
    main()
