"""What keeps a run from being continued, and what does not."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from phlora.config import build_config, resolved
from phlora.runs.identity import changes


def test_a_digest_is_the_same_in_every_process() -> None:
    sets = "{'q_proj', 'v_proj', 'o_proj'}, frozenset({'b', 'a'})"
    code = (
        f"from phlora.runs.folder import digest; print(*(digest({{'target_modules': s}}) for s in ({sets})))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "3")
    }
    assert len(seen) == 1
    assert [len(digest) for digest in seen.pop().split()] == [16, 16]


def facts(digest: str, *, targets: list[str], peft: str = "0.21.2", **more: Any) -> dict[str, Any]:
    return {
        "identity": {"peft_config": digest},
        "config": {"peft_config": {"target_modules": targets}},
        "environment": {"packages": {"peft": peft}},
        **more,
    }


@pytest.mark.parametrize("more", [{}, {"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}])
def test_a_digest_that_followed_the_order_of_a_set_keeps_nobody_from_going_on(more: dict[str, Any]) -> None:
    before, now = (facts(digest, targets=["q_proj", "v_proj"], **more) for digest in ("one", "other"))
    assert changes(before, now) == []


def test_other_values_and_other_defaults_are_told() -> None:
    before = facts("one", targets=["q_proj"])
    assert changes(before, facts("two", targets=["v_proj"])) == [
        "peft_config.target_modules: ['q_proj'] -> ['v_proj']"
    ]
    [told] = changes(before, facts("two", targets=["q_proj"], peft="0.22.0"))
    assert "the defaults of PEFT or Phlora are others" in told and "peft 0.21.2 -> 0.22.0" in told


@pytest.mark.parametrize("name", ["hub_token", "push_to_hub_token"])
def test_what_is_written_down_holds_no_token(name: str) -> None:
    config = build_config(
        {"model": "m", "data": "d.jsonl", "training_config": {name: "hf_secret", "seed": 1}}
    )
    assert resolved(config)["training_config"] == {"seed": 1}
    assert config.training_config[name] == "hf_secret"


def stored_run(fingerprint: str, storage: str) -> dict:
    return {
        "config": {"model": {"name": "m", "quantization": None}},
        "identity": {"base model": fingerprint},
        "model": {"storage": storage},
    }


def test_another_storage_of_the_same_weights_is_called_that() -> None:
    before = stored_run("bfloat16:0/bfloat16:1+nf4", "nf4")
    assert changes(before, stored_run("bfloat16:0/bfloat16:1", "bfloat16")) == [
        "model.storage_dtype: nf4 -> bfloat16"
    ]
    (told,) = changes(before, stored_run("bfloat16:0/bfloat16:2", "bfloat16"))
    assert "the weights of m are others now" in told


def test_the_fingerprint_of_an_earlier_version_is_no_change() -> None:
    before, now = stored_run("bfloat16:0", "bfloat16"), stored_run("bfloat16:0/bfloat16:1", "bfloat16")
    assert changes(before, now) == []
