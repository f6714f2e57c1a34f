"""Isolated attention over shared starts: each way against the dense mask, and the mask against single rows."""

from __future__ import annotations

import random

import peft
import pytest
import torch

from phlora.data.collate import SharedPrefixCollator
from phlora.data.prefixes import Segments, share_prefixes
from phlora.errors import ModelError
from phlora.models import cpu_attention, prefix_attention
from phlora.models.lm_head import token_losses, trunk_and_head
from phlora.testing import tiny_phi3

E = 8
START = [7, 8, 9, 10, 11, 12] * 5
LAYOUTS = {
    "shared": [START + [20 + i] * n for i, n in enumerate((3, 1, 9, 4, 40))],
    "two groups and rows alone": [START + [20, i] for i in range(3)]
    + [START[::-1] * 2 + [30 + i] * (i + 2) for i in range(3)]
    + [[40], [41, 42, 43]],
    "nothing shared": [[50 + i] * n for i, n in enumerate((5, 17, 1, 6))],
    "one row": [START],
    "a row that begins others, and twins": [START, START + [1], START + [1], START],
    "equal lengths": [START + [20 + i] * 3 for i in range(4)] + [[50 + i] * 5 for i in range(3)],
    "long rows": [[60 + i] * n for i, n in enumerate((127, 128, 200, 700))],
    "groups within groups": [
        START + [20] * 25 + [30] * (20 + i) + [40 + i] * n for i, n in enumerate((3, 1, 140))
    ]
    + [START + [20] * 25 + [50 + i] * (2 + i) for i in range(3)]
    + [START + [60 + i] * n for i, n in enumerate((2, 40, 9))]
    + [[70, 71], [72]],
    "one row for each turn": [list(range(n)) for n in (20, 45, 66, 250, 251, 300)],
    "long shared and long tails": [START * 5 + [20 + i] * n for i, n in enumerate((2, 35, 131, 390))],
}


def layout(name: str) -> Segments:
    return share_prefixes(LAYOUTS[name])


def projections(segments: Segments, heads: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(1, n, segments.num_positions, E, dtype=dtype, requires_grad=True)
        for n in (4, heads, heads)
    ]


def output_and_gradients(attend, tensors, *args, **settings) -> list[torch.Tensor]:
    output = attend(*tensors, *args, scaling=0.4, **settings)
    slopes = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).sin().view(output.shape)
    return [output, *torch.autograd.grad((output * slopes).sum(), tensors)]


@pytest.mark.parametrize("heads", [4, 2, 1], ids=["every head", "grouped", "one kv head"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("way", ["attend_padded", "attend_merged"])
def test_each_way_has_the_values_and_gradients_of_the_dense_mask(way, name, heads) -> None:
    segments = layout(name)
    tensors = projections(segments, heads)
    expected = output_and_gradients(prefix_attention.attend_densely, tensors, segments)
    for ours, theirs in zip(
        output_and_gradients(getattr(prefix_attention, way), tensors, segments), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["shared", "long shared and long tails"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_keeps_its_digits_in_lower_precision(name, dtype) -> None:
    """No worse than twice the error that one dense call makes."""
    segments = layout(name)
    exact = projections(segments, 2)
    truth = output_and_gradients(prefix_attention.attend_densely, exact, segments)
    rounded = [x.detach().to(dtype).requires_grad_() for x in exact]
    ways = (prefix_attention.attend_merged, prefix_attention.attend_densely)
    ours, dense = (output_and_gradients(way, rounded, segments) for way in ways)
    for a, b, expected in zip(ours, dense, truth, strict=True):
        error, tolerated = ((x.double() - expected).norm() for x in (a, b))
        assert error <= 2 * tolerated


@pytest.mark.parametrize("name", LAYOUTS)
def test_few_pairs_in_16_bits_have_the_gradients_of_float32(name, monkeypatch) -> None:
    """They are those of the 16-bit kernel, and no further from the truth, whichever calls are few."""
    segments = layout(name)
    exact = projections(segments, 2)
    truth = output_and_gradients(prefix_attention.attend_densely, exact, segments)[1:]
    rounded = [x.detach().to(torch.bfloat16).requires_grad_() for x in exact]

    def errors(pairs: int) -> list[float]:
        monkeypatch.setattr(cpu_attention, "_FEW_PAIRS", pairs)
        found = output_and_gradients(prefix_attention.attend_merged, rounded, segments)[1:]
        assert all(x.dtype == torch.bfloat16 for x in found)
        return [
            float((x.double() - y).norm() / y.norm().clamp(min=1e-9))
            for x, y in zip(found, truth, strict=True)
        ]

    for wide, narrow in zip(errors(1 << 30), errors(0), strict=True):
        assert wide <= 1.05 * narrow + 1e-6


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("window", [1, 7, 31])
def test_a_sliding_window_counts_positions_of_the_row(name, window) -> None:
    segments = layout(name)
    tensors = projections(segments, 2)
    expected = output_and_gradients(prefix_attention.attend_densely, tensors, segments, window=window)
    ours = output_and_gradients(prefix_attention.attend_padded, tensors, segments, window=window)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_mask_shows_each_row_what_it_sees_alone(name, window) -> None:
    segments = layout(name)
    mask = prefix_attention.segment_mask(segments, window=window)
    for path in segments.paths.values():
        alone = torch.ones(len(path), len(path)).tril().bool()
        if window:
            alone &= ~torch.ones(len(path), len(path)).tril(-window).bool()
        assert torch.equal(mask[path][:, path], alone)
        outside = [p for p in range(segments.num_positions) if p not in path]
        assert not mask[path][:, outside].any()


def random_rows(*, seed: int = 0) -> list[dict[str, list[int]]]:
    generator = random.Random(seed)
    start = [generator.randrange(3, 200) for _ in range(24)]
    rows = [start + [generator.randrange(3, 200) for _ in range(n)] for n in (5, 9, 2, 21)]
    rows.append([generator.randrange(3, 200) for _ in range(12)])
    return [{"input_ids": row, "labels": row} for row in rows]


def hidden_states(model, rows) -> list[torch.Tensor]:
    """The last hidden states of each row, from the shared layout."""
    batch = SharedPrefixCollator()(rows)
    trunk, _ = trunk_and_head(model)
    inputs = prefix_attention.segment_inputs(
        trunk, {name: batch[name] for name in ("input_ids", "position_ids", "segments")}
    )
    states = trunk(**inputs, use_cache=False).last_hidden_state[0]
    return [states[batch["segments"].paths[number]] for number in range(len(rows))]


@pytest.mark.parametrize("window", [None, 10], ids=["merged", "padded with a window"])
@pytest.mark.parametrize("training", [False, True])
def test_a_row_that_changes_moves_no_other_row(window, training) -> None:
    model = tiny_phi3(sliding_window=window)[0].train(training)
    rows = random_rows()
    before = hidden_states(model, rows)
    for changed in range(len(rows)):
        other = [dict(row) for row in rows]
        ids = [*rows[changed]["input_ids"]]
        ids[-2:] = [201, 202]
        other[changed] = {"input_ids": ids, "labels": ids}
        for number, (a, b) in enumerate(zip(hidden_states(model, other), before, strict=True)):
            if number == changed:
                assert (a[-2:] - b[-2:]).abs().max() > 1e-2
            else:
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 10])
def test_rows_in_a_stream_are_what_they_are_alone(window) -> None:
    model = tiny_phi3(sliding_window=window)[0].double()
    rows = random_rows()
    for row, states in zip(rows, hidden_states(model, rows), strict=True):
        alone = trunk_and_head(model)[0](torch.tensor([row["input_ids"]]), use_cache=False).last_hidden_state[
            0
        ]
        # The last token is not computed: it predicts nothing. transformers' norm rounds to float32 in any dtype.
        torch.testing.assert_close(states, alone[:-1], rtol=1e-5, atol=1e-6)


def test_batches_without_segments_go_on_as_before() -> None:
    """Padded on the left, as generation pads, and after a batch with segments has switched the attention."""
    model, tokenizer = tiny_phi3()
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    prompt = {"input_ids": ids[1:], "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    how = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": tokenizer.pad_token_id}
    with torch.no_grad():
        before, generated = model(**batch).logits, model.generate(**prompt, **how)
        token_losses(model, SharedPrefixCollator()(random_rows()))
        assert model.config._attn_implementation == prefix_attention.SEGMENTS
        assert torch.equal(model(**batch).logits, before)
        assert torch.equal(model.generate(**prompt, **how), generated)


def test_another_attention_is_refused() -> None:
    model = tiny_phi3()[0]
    model.set_attn_implementation("eager")
    with pytest.raises(ModelError, match="the model has eager"):
        token_losses(model, SharedPrefixCollator()(random_rows()))
    assert "eager" in prefix_attention.sharing_obstacle(model, training=True)


class TestSharingObstacle:
    def test_none_for_a_plain_model(self) -> None:
        model = peft.get_peft_model(tiny_phi3()[0], peft.LoraConfig(target_modules="all-linear"))
        assert prefix_attention.sharing_obstacle(model, training=True) is None

    @pytest.mark.parametrize("name", ["attention_dropout", "resid_pdrop", "embd_pdrop"])
    def test_dropout_of_the_model_counts_in_training_only(self, name) -> None:
        model = tiny_phi3()[0]
        setattr(model.config, name, 0.1)
        assert prefix_attention.sharing_obstacle(model, training=False) is None
        assert f"{name} is 0.1" in prefix_attention.sharing_obstacle(model, training=True)

    def test_dropout_of_the_adapter(self) -> None:
        lora = peft.LoraConfig(target_modules="all-linear", lora_dropout=0.05)
        model = peft.get_peft_model(tiny_phi3()[0], lora)
        assert prefix_attention.sharing_obstacle(model, training=False) is None
        assert "lora_dropout is 0.05" in prefix_attention.sharing_obstacle(model, training=True)

    def test_an_unknown_attention(self) -> None:
        model = tiny_phi3()[0]
        model.config.model_type = "gemma2"
        assert "gemma2" in prefix_attention.sharing_obstacle(model, training=False)
