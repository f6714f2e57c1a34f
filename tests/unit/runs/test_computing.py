"""What run.json says of how a run computes, against what the model and torch say of themselves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from phlora.adapters.speed import at_speed
from phlora.lora import matmul
from phlora.lora.matmul import Library
from phlora.models import kernels
from phlora.runs.computing import Computing, changed
from phlora.testing import tiny_phi3

needs_compiler = pytest.mark.skipif(kernels.obstacle() is not None, reason=str(kernels.obstacle()))


@pytest.fixture(scope="module")
def model() -> Any:
    return get_peft_model(tiny_phi3()[0], LoraConfig(r=2, target_modules=["qkv_proj"]))


@pytest.fixture(autouse=True)
def libraries_left() -> Iterator[None]:
    before = matmul.libraries()
    yield
    matmul.use_libraries(before)


def of(model: Any, dtype: torch.dtype = torch.float32) -> Computing:
    return Computing.of(model, dtype=dtype, storage="bfloat16")


@needs_compiler
def test_layers_that_are_made_lean_compute_with_compiled_kernels(model: Any) -> None:
    with at_speed(model, "auto"):
        found = of(model)
    library = kernels._library()
    assert found.kernels == "compiled" and not isinstance(library, str)
    assert found.kernels_digest == hashlib.sha256(Path(library._name).read_bytes()).hexdigest()[:16]
    assert of(model, torch.bfloat16).kernels == "compiled"


def test_layers_of_transformers_dtypes_without_kernels_and_no_compiler_are_torch_s(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with at_speed(model, "auto"):
        assert of(model, torch.float16).kernels == "torch"
        monkeypatch.setattr(kernels, "_library", lambda: "no C compiler")
        without = of(model)
    monkeypatch.undo()
    with at_speed(model, "reference"):
        reference = of(model)
    for found in (without, reference):
        assert (found.kernels, found.kernels_digest) == ("torch", None)
    assert reference.products == Library.BLAS


def test_dtypes_libraries_and_threads_are_those_in_force(model: Any) -> None:
    matmul.use_libraries(dict.fromkeys(matmul.Kind, Library.BLAS))
    found = of(model, torch.bfloat16).to_json()
    assert found == json.loads(json.dumps(found))
    assert (found["dtype"], found["storage"], found["adapter_dtypes"]) == (
        "bfloat16",
        "bfloat16",
        ["float32"],
    )
    assert found["products"] == matmul.backend() == Library.BLAS
    assert found["threads"] == torch.get_num_threads()
    assert found["matmul_precision"] == torch.get_float32_matmul_precision()


def test_a_continued_run_says_what_it_computes_with_otherwise(model: Any) -> None:
    now = of(model)
    assert changed(now.to_json(), now) is None
    assert changed({}, now) is None, "an older version recorded nothing"
    other = replace(now, threads=now.threads + 1, kernels="abacus").to_json()
    said = changed(other, now)
    assert said is not None and f"threads {now.threads + 1} -> {now.threads}" in said
    assert f"kernels abacus -> {now.kernels}" in said and "storage" not in said
