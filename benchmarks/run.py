"""Runs every benchmark in turn and keeps its JSON line, with commit and versions, in benchmarks/results/."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
BENCHMARKS = ("lora_layers.py", "train_step.py")


def main() -> None:
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    facts = {
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}",
        "packages": {
            name: metadata.version(name) for name in ("torch", "transformers", "peft", "trl", "phlora")
        },
    }
    for name in BENCHMARKS:
        print(f"== {name}", flush=True)
        lines = []
        with subprocess.Popen(
            [sys.executable, str(HERE / name)], stdout=subprocess.PIPE, text=True
        ) as running:
            for line in running.stdout or ():
                print(line, end="", flush=True)
                lines.append(line)
        if running.returncode:
            sys.exit(running.returncode)
        document = {**facts, **json.loads(lines[-1])}
        (results / f"{Path(name).stem}.json").write_text(
            json.dumps(document, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
