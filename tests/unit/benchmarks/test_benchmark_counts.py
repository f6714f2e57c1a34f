"""The figures of the benchmarks mean what they say: FLOPs of the floor, lengths of the rows, the same step."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from phlora.data.collate import SharedPrefixCollator
from phlora.models.lm_head import token_losses
from phlora.testing import tiny_phi3, tiny_tokenizer

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Import a module of the benchmarks folder, which is no package."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module
    for name in ("candidates", "common", "rowsets"):
        sys.modules.pop(name, None)


class _Products(TorchDispatchMode):
    """Counts the FLOPs of all matrix products."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return out


@pytest.mark.parametrize("num_shared", [0, 24])
def test_the_floor_counts_the_products_of_a_step(load, num_shared: int) -> None:
    pytest.importorskip("loralib")
    common, candidates, rowsets = load("common"), load("candidates"), load("rowsets")
    base, _ = tiny_phi3()
    shapes = common.Shapes.of(base.config)
    model = candidates.with_phlora(base)
    candidates.set_adapter(model)
    rows = rowsets.random_rows([40, 33], vocab=200, shared=num_shared, trained=0.2)
    batch = SharedPrefixCollator()(rows)
    with _Products() as counter:
        losses, _, _ = token_losses(model.train(), batch)
        losses.sum().backward()
    work = common.work_of_segments(batch["segments"], sum(map(common.num_trained, rows)))
    floor = common.step_flops(shapes, work)
    # Attention aside, which is no matrix product of its own here.
    expected = floor["linears"] + floor["lora"] + floor["head"]
    assert counter.flops == expected


def test_shared_starts_lower_the_floor_and_nothing_shared_does_not(load) -> None:
    common, rowsets = load("common"), load("rowsets")
    for shared in (0, 30):
        rows = rowsets.random_rows([50, 40, 60], vocab=10_000, shared=shared)
        trained = sum(map(common.num_trained, rows))
        work = common.work_of_segments(SharedPrefixCollator()(rows)["segments"], trained)
        # The last token of a row predicts nothing and is not computed.
        plain = common.work_of_rows([{key: ids[:-1] for key, ids in row.items()} for row in rows])
        # The last common token stands in every tail: another token follows it in each row.
        assert work.positions == plain.positions - 2 * max(0, shared - 1)
        assert (work.pairs == plain.pairs) == (shared == 0)


def test_fewer_targets_need_less(load) -> None:
    common = load("common")
    shapes = common.Shapes.of(tiny_phi3()[0].config)
    work = common.Work(positions=10, pairs=55, trained=4)
    every, lowest = (common.step_flops(shapes, work, targets=t) for t in (common.LINEARS, ("down_proj",)))
    assert lowest["lora"] < every["lora"]
    # Nothing below the last linear of the first layer needs a gradient.
    saved = {name: every[name] - lowest[name] for name in ("linears", "attention", "head")}
    below = sum(a * b for name, (a, b) in shapes.linears.items() if name != "qkv_proj")
    assert saved == {"linears": 2 * 10 * below, "attention": 5 * 2 * shapes.query * 55, "head": 0}


def test_rows_have_the_lengths_that_their_set_states(load) -> None:
    rowsets = load("rowsets")
    tokenizer = tiny_tokenizer()

    def lengths(name: str, **options: float) -> list[int]:
        rows = rowsets.make_rows(name, tokenizer, vocab=120, **options)
        assert all(token < 120 for row in rows for token in row["input_ids"])
        assert all(len(row["labels"]) == len(row["input_ids"]) for row in rows)
        return [len(row["input_ids"]) for row in rows]

    wanted = [400, 40, 140, 600, 64, 280, 96, 200]
    assert all(abs(got - want) <= 20 for got, want in zip(lengths("mixed"), wanted, strict=True))
    assert lengths("full_loss") == [256] * 4
    assert abs(lengths("long_row", long_row=512)[0] - 512) <= 20
    assert abs(sum(lengths("pack_4k")) - 4096) <= 0.05 * 4096
    assert len(lengths("shared")) == 32
    turns = lengths("turns")
    assert all(abs(got - 150 - 60 * (1 + n % 4)) <= 30 for n, got in enumerate(turns)) and len(turns) == 24
    assert lengths("mixed") == lengths("mixed")


def _step(
    candidates: ModuleType, side: str, rows: list[dict[str, list[int]]], layout: str
) -> dict[str, float]:
    return candidates.Candidate(side, "tiny").step(rows, layout)


def test_every_candidate_takes_the_same_step(load) -> None:
    pytest.importorskip("loralib")
    candidates, rowsets = load("candidates"), load("rowsets")
    rows = rowsets.random_rows([30, 21, 26], vocab=200, shared=12)
    torch.manual_seed(0)
    expected = _step(candidates, "peft", rows, "padded")
    for side, layout in (
        ("phlora", "padded"),
        ("phlora-shared", "padded"),
        ("trl-best", "row by row"),
        ("trl-best", "padding-free"),
        ("trl-default", "padded"),
        ("loralib", "padded"),
    ):
        result = _step(candidates, side, rows, layout)
        for key in ("loss", "gradient"):
            assert result[key] == pytest.approx(expected[key], rel=1e-5), (side, layout, key)
        assert result["peak"] > result["step_bytes"] >= 0


def test_trl_without_padding_is_told_apart_from_a_layout_that_leaks(load, monkeypatch) -> None:
    pytest.importorskip("loralib")
    candidate = load("candidates").Candidate("trl-best", "tiny")
    assert not candidate.leaks("padding-free")
    collator = candidate._collator("padding-free")
    monkeypatch.setattr(
        candidate,
        "_collator",
        lambda kind: (
            lambda rows: (
                {k: v for k, v in collator(rows).items() if k != "position_ids"}
                | {
                    "attention_mask": torch.ones(
                        1, sum(len(row["input_ids"]) for row in rows), dtype=torch.long
                    )
                }
            )
        ),
    )
    assert candidate.leaks("padding-free")
