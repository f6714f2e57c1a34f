"""The model that trains: a run that is continued computes with what it began with."""

from __future__ import annotations

import pytest

from phlora.config import ModelConfig, quantization_config
from phlora.train.base import as_before

FACTS = {"model": {"dtype": "bfloat16", "storage": "nf4"}}


def test_what_auto_chose_is_not_chosen_again() -> None:
    found = as_before(ModelConfig(name="m"), FACTS)
    assert (found.dtype, found.storage_dtype) == ("bfloat16", "nf4")


def test_what_is_asked_for_now_stays() -> None:
    asked = ModelConfig(name="m", dtype="float32", storage_dtype="bfloat16")
    assert as_before(asked, FACTS) == asked
    quantized = ModelConfig(name="m", dtype="float32", quantization=quantization_config("int8"))
    assert as_before(quantized, FACTS) == quantized


@pytest.mark.parametrize("facts", [{}, {"model": {}}, {"model": {"dtype": "gptq", "storage": "gptq"}}])
def test_what_an_older_run_did_not_record_is_chosen(facts: dict) -> None:
    assert as_before(ModelConfig(name="m"), facts) == ModelConfig(name="m")
