"""The demo's task on a base in NF4: does it learn as on the base in float32, and does the merge keep its answers?

    python benchmarks/qlora_demo.py [--quantization nf4] [--with-fp32 | --fp32-run runs/demo] [--output FOLDER]

Trains examples/quickstart.yaml with `model.quantization: nf4` and nothing else changed, merges the adapter (`--base
auto`), and lets the merged model answer the same held-out requests. The exact match of the run in float32 is read from
the report of a run folder, or measured by training that run too. A finished run in the output folder is taken as it is.
The goal: NF4 within 5 points of float32, and the answers kept after the merge. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_MOST_POINTS = 5.0


def train(folder: Path, quantization: str | None) -> None:
    """The demo's run in `folder`, unless it is there already."""
    from phlora.config import load_config
    from phlora.runs.folder import RunFolder
    from phlora.train.finetune import finetune

    run = RunFolder(folder)
    if run.has_facts and run.facts()["status"] == "finished":
        return
    overrides = [f"output={folder}"] + ([f"model.quantization={quantization}"] if quantization else [])
    finetune(load_config("examples/quickstart.yaml", overrides), overwrite=folder.exists())


def tuned_scores(run: Path) -> dict[str, float]:
    """Exact match in percent, and held-out loss, of a run's tuned model."""
    tuned = json.loads((run / "report.json").read_text(encoding="utf-8"))["tuned"]
    return {"exact_match": 100 * tuned["exact_match"], "loss": tuned["loss"]}


def answers(model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    from phlora.models.generate import generate

    replies = generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_token_ids=tokenizer.stop_token_ids,
        pad_token_id=tokenizer.tokenizer.pad_token_id,
    )
    return [tokenizer.tokenizer.decode(reply, skip_special_tokens=True) for reply in replies]


def answer_with_both(run: Path, merged: Path, quantization: str) -> dict[str, Any]:
    """The answers of the adapter on its quantised base, and of the merged model, to all held-out requests."""
    from phlora.adapters.load import load_adapter
    from phlora.config import load_config
    from phlora.data.dataset import load_rows
    from phlora.data.prompts import encode_prompt
    from phlora.evaluate.metrics import exact_match
    from phlora.models.load import load_model

    most = load_config("examples/quickstart.yaml").evaluation.max_new_tokens
    loaded = load_model("smollm2-135m", dtype="float32", quantization=quantization)
    rows = load_rows(run / "heldout.jsonl").rows
    encoded = [prompt for row in rows if (prompt := encode_prompt(row, loaded.tokenizer.tokenizer))]
    prompts, references = [list(p.prompt_ids) for p in encoded], [p.reference for p in encoded]
    tuned = load_adapter(loaded.model, run / "adapter" / "best").model
    before = answers(tuned, loaded.tokenizer, prompts, most)
    del tuned, loaded
    again = load_model(merged, dtype="float32")
    after = answers(again.model, again.tokenizer, prompts, most)

    def score(replies: list[str]) -> float:
        return 100 * sum(map(exact_match, replies, references)) / len(references)

    return {
        "answers": len(references),
        "same_answers": sum(map(str.__eq__, before, after)),
        "adapter": score(before),
        "merged": score(after),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quantization", choices=("nf4", "int8"), default="nf4")
    parser.add_argument("--output", type=Path, help="keep the runs here; a finished one is taken as it is")
    fp32 = parser.add_mutually_exclusive_group()
    fp32.add_argument("--fp32-run", type=Path, help="a finished run of the demo in float32")
    fp32.add_argument("--with-fp32", action="store_true", help="train that run too")
    options = parser.parse_args()
    paths = {
        name: path and path.absolute()
        for name, path in vars(options).items()
        if name in ("output", "fp32_run")
    }
    os.chdir(ROOT)
    logging.disable(logging.WARNING)

    with tempfile.TemporaryDirectory() as scratch:
        result = measure(options, paths["output"] or Path(scratch), paths["fp32_run"])
    show(result)
    print(json.dumps(result))


def measure(options: argparse.Namespace, output: Path, fp32_run: Path | None) -> dict[str, Any]:
    from phlora import merge_run

    storage = options.quantization
    run = output / storage
    train(run, storage)
    if options.with_fp32:
        fp32_run = output / "float32"
        train(fp32_run, None)
    with tempfile.TemporaryDirectory() as scratch:
        merged = Path(scratch) / "merged"
        report = merge_run(run, merged)
        kept = answer_with_both(run, merged, storage)
    fp32 = tuned_scores(fp32_run) if fp32_run else None
    within = fp32 and kept["adapter"] >= fp32["exact_match"] - _MOST_POINTS
    return {
        "benchmark": "qlora_demo",
        "quantization": storage,
        "exact_match": {
            "float32": fp32 and round(fp32["exact_match"], 1),
            storage: round(kept["adapter"], 1),
            "merged": round(kept["merged"], 1),
        },
        "losses": {name: round(loss, 6) for name, loss in report.losses.items()},
        "merged_into": report.base,
        "answers": kept["answers"],
        "same_answers": kept["same_answers"],
        "within_5_points": within,
    }


def show(result: dict[str, Any]) -> None:
    names = {"float32": "float32 base", "merged": f"merged into the {result['merged_into']} base"}
    print(f"Held-out requests answered exactly, of {result['answers']}")
    for name, score in result["exact_match"].items():
        label = names.get(name, f"{name} base, adapter")
        print(f"  {label:<34}{'not measured' if score is None else f'{score:5.1f} %'}")
    print(f"  the same answer before and after the merge: {result['same_answers']} of {result['answers']}")
    print("Loss of the answers")
    for name, loss in result["losses"].items():
        print(f"  {name:<34}{loss:.4f}")


if __name__ == "__main__":
    main()
