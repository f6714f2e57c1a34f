"""A model in 4 bits for ONNX Runtime: written by onnxruntime-genai's builder, and what that runtime makes of tokens."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from phlora.data.table import IGNORED
from phlora.data.tokenize import TokenizedRow
from phlora.errors import EnvironmentProblem, ModelError

# Begins to generate behind some tokens.
Start: TypeAlias = Callable[[Sequence[int]], Any]


def write_onnx(merged: Path, output: Path) -> None:
    """Write the model in a folder in 4 bits for ONNX Runtime, rounded to the nearest.

    Raises:
        EnvironmentProblem: the builder failed; it says how.
    """
    # The builder is a program: its settings and what it leaves in the process stay its own.
    cache = output / "cache"
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", str(merged), "-o", str(output), "-p", "int4", "-e", "cpu", "-c", str(cache)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    shutil.rmtree(cache, ignore_errors=True)
    if done.returncode or not (output / "genai_config.json").is_file():
        last = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:] or ["it says nothing"]
        raise EnvironmentProblem(
            f"onnxruntime-genai's builder cannot write this model: {last[0]}",
            where="--quantize",
            fix="merge without --quantize, or with another format",
        )


def onnx_starts(folder: Path) -> Start:
    """What begins to generate behind some tokens, with the model in a folder.

    Raises:
        ModelError: ONNX Runtime cannot load it.
    """
    import onnxruntime_genai as genai

    try:
        model = genai.Model(str(folder))
    except RuntimeError as error:
        raise ModelError(f"What was written cannot be loaded: {error}", where=str(folder)) from error
    limit = int(
        json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["context_length"]
    )

    def start(ids: Sequence[int]) -> Any:
        settings = genai.GeneratorParams(model)
        settings.set_search_options(max_length=limit, do_sample=False)
        generator = genai.Generator(model, settings)
        generator.append_tokens(list(ids))
        return generator

    return start


def onnx_logits(start: Start, row: TokenizedRow) -> Tensor:
    """The logits (S, V) at the trained tokens of a row, each after all tokens before it."""
    trained = [place for place, label in enumerate(row.labels) if label != IGNORED and place]
    found: list[Tensor] = []
    generator = start(row.input_ids[: trained[0]]) if trained else None
    last = trained[-1] if trained else 0
    for place in range(trained[0], last + 1) if trained else ():
        assert generator is not None
        if row.labels[place] != IGNORED:
            found.append(torch.tensor(generator.get_logits()).float().reshape(-1))
        if place < last:
            generator.append_tokens([row.input_ids[place]])
    return torch.stack(found) if found else torch.zeros(0, 1)


def onnx_answer(
    start: Start, prompt_ids: Sequence[int], *, most: int, stop_token_ids: Sequence[int]
) -> list[int]:
    """The likeliest tokens behind a prompt, at most so many, without the one that ends the reply."""
    answer: list[int] = []
    generator = start(prompt_ids)
    while len(answer) < most and not generator.is_done():
        generator.generate_next_token()
        token = int(generator.get_next_tokens()[0])
        if token in stop_token_ids:
            break
        answer.append(token)
    return answer
