"""Runs the benchmarks of `make bench` in turn; keeps the JSON line of each in results/, with commit and versions.

python benchmarks/run.py [--only train_step --only scaling]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BENCHMARKS = ("lora_layers", "train_step", "scaling", "end_to_end", "data_pipeline", "memory")
PACKAGES = ("phlora", "torch", "transformers", "peft", "trl", "loralib")


def facts() -> dict[str, Any]:
    """What the figures depend on beside the code of the benchmark."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return {
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }


def run(name: str) -> dict[str, Any]:
    """Show what a benchmark prints, and return the JSON of its last line."""
    lines = []
    command = [sys.executable, str(HERE / f"{name}.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        for line in running.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    if running.returncode:
        sys.exit(running.returncode)
    return json.loads(lines[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="may be given several times")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for name in options.only or BENCHMARKS:
        print(f"== {name}", flush=True)
        document = facts() | run(name)
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
