"""Rows per second from a chat file to packs, and the memory that takes, beside what TRL does for the same rows.

    python benchmarks/data_pipeline.py [--rows 100000] [--max-length 2048] [--quick]

Stages of Phlora: `read+check` finds everything that is wrong with the file (schema, roles, turns, duplicates);
`tokenise` reads the rows a second time, renders, encodes and labels them; `pack` lays out one epoch. TRL's are loading
the file with `datasets`, and what `SFTTrainer` does to it before training: tokenise, then pack with best-fit
decreasing, in its default number of processes. TRL checks nothing and trains every token of a chat by default; Phlora
checks every row and labels the answers only.

Every measurement runs in a process of its own, with all rows and with a tenth of them: what the peak of resident memory
grows by between the two is what rows cost beside their token ids. CPU time tells a busy machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = "smollm2-135m"
SYSTEM = (
    "You are a careful home assistant. Answer shortly, in the language of the question, and invent no device."
)
WORDS = {
    "en": "the kitchen light is on and every window looks over a long green field where people work until the evening "
    "while children play near the water and the system answers each question with a value from the list of settings",
    "fa": "چراغ آشپزخانه روشن است و هر پنجره رو به دشت سبز بلندی باز می‌شود که مردم تا غروب در آن کار می‌کنند",
    "hi": "रसोई की बत्ती जल रही है और हर खिड़की एक लंबे हरे मैदान की ओर खुलती है जहाँ लोग शाम तक काम करते हैं",
    "sr": "светло у кухињи је упаљено и сваки прозор гледа на дуго зелено поље где људи раде до вечери",
    "tr": "mutfağın ışığı açık ve her pencere insanların akşama kadar çalıştığı uzun yeşil bir tarlaya bakıyor",
    "vi": "đèn trong bếp đang bật và mỗi cửa sổ đều nhìn ra một cánh đồng xanh dài nơi mọi người làm việc đến tối",
}
# English words a turn, and how many of another language have about as many tokens.
QUESTION_WORDS, ANSWER_WORDS, FOREIGN_SHARE = 25, 50, 0.35


def write_chats(path: Path, num_rows: int) -> None:
    """Chats of one to three exchanges, half of them in English, two in five with the same system prompt."""
    generator = random.Random(0)

    def text(language: str, mean: int) -> str:
        share = 1.0 if language == "en" else FOREIGN_SHARE
        length = max(3, round(share * mean * generator.lognormvariate(0, 0.6)))
        words = generator.choices(WORDS[language].split(), k=length)
        return " ".join([*words, str(generator.randrange(10_000))])

    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_rows):
            language = generator.choices(list(WORDS), [5, 1, 1, 1, 1, 1])[0]
            messages = [{"role": "system", "content": SYSTEM}] if generator.random() < 0.4 else []
            for _ in range(generator.choice((1, 1, 1, 2, 3))):
                messages.append({"role": "user", "content": text(language, QUESTION_WORDS)})
                messages.append({"role": "assistant", "content": text(language, ANSWER_WORDS)})
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def peak_mb() -> float:
    """The most memory this process has held."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1e3
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def measure_phlora(path: Path, max_length: int) -> dict[str, object]:
    from phlora.data.checks import check
    from phlora.data.dataset import read_rows
    from phlora.data.packing import epoch_packs
    from phlora.data.tokenize import tokenize_rows
    from phlora.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(MODEL).tokenizer
    before, cpu = peak_mb(), time.process_time()
    times = [time.perf_counter()]
    report = check(path)
    times.append(time.perf_counter())
    tokens = tokenize_rows(read_rows(path), tokenizer, max_length=max_length)
    times.append(time.perf_counter())
    packs = epoch_packs(tokens.rows.lengths.tolist(), max_length=max_length, seed=0, epoch=0)
    times.append(time.perf_counter())
    table = tokens.rows
    return {
        "rows": report.num_usable_rows,
        "tokens": tokens.num_tokens,
        "packs": len(packs),
        "seconds": dict(zip(("read+check", "tokenise", "pack"), deltas(times), strict=True)),
        "peak_mb": peak_mb(),
        "before_mb": before,
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "ids_mb": (table.input_ids.nbytes + table.trained.nbytes) / 1e6,
    }


def measure_trl(path: Path, max_length: int) -> dict[str, object]:
    import datasets
    import trl

    from phlora.models.tiny import tiny_phi3
    from phlora.models.tokenizer import load_tokenizer

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(MODEL).tokenizer
    model = tiny_phi3()[0]
    before, cpu = peak_mb(), time.process_time()
    times = [time.perf_counter()]
    rows = datasets.load_dataset("json", data_files=str(path), split="train")
    times.append(time.perf_counter())
    with tempfile.TemporaryDirectory() as folder:
        args = trl.SFTConfig(
            output_dir=folder, max_length=max_length, packing=True, use_cpu=True, bf16=False, report_to="none"
        )
        trainer = trl.SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    times.append(time.perf_counter())
    packs = trainer.train_dataset
    return {
        "rows": len(rows),
        "tokens": sum(map(sum, packs["seq_lengths"])),
        "packs": len(packs),
        "seconds": dict(zip(("load", "tokenise+pack"), deltas(times), strict=True)),
        "peak_mb": peak_mb(),
        "before_mb": before,
        "cpu_seconds": round(time.process_time() - cpu, 3),
    }


def deltas(times: list[float]) -> list[float]:
    return [round(end - start, 3) for start, end in zip(times[:-1], times[1:], strict=True)]


def in_own_process(side: str, path: Path, max_length: int, folder: Path) -> dict[str, object]:
    command = [
        sys.executable,
        __file__,
        "--measure",
        side,
        "--file",
        str(path),
        "--max-length",
        str(max_length),
    ]
    # Nothing prepared by an earlier run may be found again.
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / f"{side}-{path.stem}")}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    result["total_seconds"] = round(sum(result["seconds"].values()), 3)
    result["rows_per_second"] = round(result["rows"] / result["total_seconds"])
    return result


def show(side: str, result: dict[str, object]) -> None:
    for stage, seconds in {**result["seconds"], "all": result["total_seconds"]}.items():
        print(
            f"{side:<8}{result['rows']:>9,}  {stage:<14}{seconds:>9.2f} s{result['rows'] / seconds:>12,.0f} rows/s"
        )
    print(
        f"{'':<19}{result['cpu_seconds']:.2f} s of CPU time; {result['peak_mb']:,.0f} MB at the peak, "
        f"{result['before_mb']:,.0f} before the first row",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--quick", action="store_true", help="a smoke test with few rows")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    parser.add_argument("--measure", choices=("phlora", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure = {"phlora": measure_phlora, "trl": measure_trl}[options.measure]
        print(json.dumps(measure(options.file, options.max_length)))
        return
    rows = 1000 if options.quick else options.rows
    results: dict[str, list[dict[str, object]]] = {"phlora": [], "trl": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for number in (rows // 10, rows):
            path = folder / f"chats-{number}.jsonl"
            write_chats(path, number)
            for side, found in results.items():
                found.append(in_own_process(side, path, options.max_length, folder))
                show(side, found[-1])
    (small, large), (_, theirs) = results["phlora"], results["trl"]
    growth = (large["peak_mb"] - small["peak_mb"]) - (large["ids_mb"] - small["ids_mb"])
    summary = {
        "benchmark": "data_pipeline",
        "rows": large["rows"],
        "tokens_per_row": round(large["tokens"] / large["rows"]),
        "rows_per_second": large["rows_per_second"],
        "faster_than_trl": round(theirs["total_seconds"] / large["total_seconds"], 2),
        "peak_growth_mb": round(large["peak_mb"] - small["peak_mb"]),
        "peak_growth_beside_ids_mb": round(growth),
        "results": results,
    }
    print(
        f"{summary['tokens_per_row']} tokens a row; {summary['faster_than_trl']}× TRL; ten times the rows take "
        f"{summary['peak_growth_mb']} MB more at the peak, {summary['peak_growth_beside_ids_mb']} of them not token ids"
    )
    document = json.dumps(summary)
    if options.out:
        options.out.write_text(document + "\n", encoding="utf-8")
    print(document)


if __name__ == "__main__":
    main()
