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
_MODULES = [path.stem for path in BENCHMARKS.glob("*.py")]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Import a module of the benchmarks folder, which is no package."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module
    for name in _MODULES:
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


def test_alpaca_rows_share_nothing_and_have_the_stated_lengths(load) -> None:
    rowsets, train_step = load("rowsets"), load("train_step")
    rows = rowsets.make_rows("alpaca", None, vocab=30_000)
    assert train_step.tokens_shared(rows) == 0
    assert train_step.tokens_shared(rowsets.random_rows([40, 40], vocab=30_000, shared=30)) > 0
    rows = rowsets._alpaca_rows(1000, vocab=30_000, scale=1.0)
    prompts = sorted(row["labels"].count(-100) for row in rows)
    answers = sorted(len(row["labels"]) - row["labels"].count(-100) for row in rows)
    for share, prompt, answer in zip(
        rowsets.ALPACA_SHARES[1:-1], rowsets.ALPACA_PROMPTS[1:-1], rowsets.ALPACA_ANSWERS[1:-1], strict=True
    ):
        at = round(share * len(rows))
        assert prompts[at] - rowsets._TEMPLATE_TOKENS == pytest.approx(prompt, rel=0.05, abs=2)
        assert answers[at] == pytest.approx(answer, rel=0.05, abs=2)


def test_a_sweep_has_the_same_tokens_at_every_length(load) -> None:
    common, rowsets = load("common"), load("rowsets")
    for name in common.SWEEP:
        rows = rowsets.make_rows(name, None, vocab=30_000)
        assert sum(len(row["input_ids"]) for row in rows) == common.SWEEP_TOKENS
    assert len(common.SWEEP) == 6


def test_peers_take_the_same_step_in_a_process_that_knows_nothing_of_phlora(load, model_folder) -> None:
    common, peer, rowsets = load("common"), load("peer"), load("rowsets")
    sides = load("full_size_sides")
    rows = rowsets.random_rows([30, 21, 26], vocab=200, shared=12)
    own = sides.Steps(str(model_folder), {"dtype": "float32"}).step(rows)
    for side in ("peft", "trl"):
        process = common.PeerProcess(sys.executable, side, str(model_folder))
        assert process.call("loading")["seconds"] > 0
        for layout in ("padded", "row by row"):
            result = process.call("step", rows, layout)
            assert result["loss"] == pytest.approx(own["loss"], rel=1e-5), (side, layout)
            assert result["gradient"] == pytest.approx(own["gradient"], rel=1e-4), (side, layout)
            assert result["positions"] >= sum(len(row["input_ids"]) for row in rows) > own["positions"]
        process.close()
    assert set(peer.LAYOUTS) >= {"padded", "row by row"}


def test_a_peer_that_fails_says_so(load, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="a peer ended with 1 in start"):
        load("common").PeerProcess(sys.executable, "peft", "/no/such/folder")
    assert "/no/such/folder" in capfd.readouterr().err


def test_the_products_alone_are_less_than_a_step(load, model_folder) -> None:
    sides, rowsets = load("full_size_sides"), load("rowsets")
    steps = sides.Steps(str(model_folder), {"dtype": "float32"})
    rows = rowsets.random_rows([30, 21, 26], vocab=200, shared=12)
    floor = steps.floor(rows)
    assert 0 < floor["seconds"] < floor["plain_seconds"]
    assert floor["positions"] == steps.step(rows)["positions"]


def test_the_random_model_is_a_phi3_mini_in_every_file(load, tmp_path: Path) -> None:
    phi3_folder = load("phi3_folder")
    config = phi3_folder.phi3_mini_config()
    from transformers import Phi3ForCausalLM

    with torch.device("meta"):
        model = Phi3ForCausalLM(config)
    # As microsoft/Phi-3-mini-4k-instruct has.
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_821_079_552
    assert (config.sliding_window, config.max_position_embeddings, config.vocab_size) == (2047, 4096, 32_064)
    folder = phi3_folder.model_folder(tmp_path, "tiny", 2)
    assert phi3_folder.model_folder(tmp_path, "tiny", 2) == folder
    from phlora.models.load import load_model

    assert load_model(folder).model.config.model_type == "phi3"


def test_the_shards_hold_all_weights_and_no_two_the_same(load, tmp_path: Path, monkeypatch) -> None:
    phi3_folder = load("phi3_folder")
    small = phi3_folder.phi3_mini_config(2)
    small.update(
        {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    )
    monkeypatch.setattr(phi3_folder, "phi3_mini_config", lambda layers: small)
    monkeypatch.setattr(phi3_folder, "_SHARD", "2MB")
    monkeypatch.setattr(
        phi3_folder, "_write_tokenizer", lambda folder: tiny_tokenizer().save_pretrained(folder)
    )
    folder = phi3_folder.model_folder(tmp_path, "full", 2)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    from phlora.models.load import load_model

    model = load_model(folder, dtype="bfloat16").model
    facts = phi3_folder.json.loads((folder / "written.json").read_text())
    assert sum(parameter.nbytes for parameter in model.parameters()) == facts["bytes"]
    weights = [layer.mlp.down_proj.weight for layer in model.model.layers]
    assert not torch.equal(*weights) and 0.019 < float(weights[0].detach().float().std()) < 0.021


def test_goals_say_what_was_not_measured(load) -> None:
    shown = load("full_size_shown")
    assert {goal["value"] for goal in shown.goals_of({})} == {None}
    results = {
        "steps/bf16": {"floor_share": 0.8, "seconds": 10.0},
        "peft/bf16": {"seconds": 50.0, "peak": 30 * 2**30},
        "trl/bf16": {"seconds": 60.0, "peak": 20 * 2**30},
        "train/bf16": {"median_step": 10.0, "peak": 11e9},
    }
    found = {goal["goal"]: goal for goal in shown.goals_of(results)}
    # The fastest peer does not fit.
    assert found["times as fast as the fastest peer that fits in 24 GiB >= 4"]["value"] == 6
    assert found["peak GB of train, bf16 <= 10.5"]["reached"] is False
    assert found["peak GB of load, bf16 <= 10.5"]["reached"] is None
