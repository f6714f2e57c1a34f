"""What the rounding of a merged model is tuned on."""

from __future__ import annotations

from pathlib import Path

import torch

from phlora.export import packed
from phlora.runs.resolve import load_tokenizer_of, resolve_adapter


def test_rounding_is_tuned_on_rows_that_are_not_measured_on(run: Path) -> None:
    found = resolve_adapter(run)
    tokenizer = load_tokenizer_of(found)
    held_out = packed._all_held_out(found, tokenizer)
    trained = packed._trained_rows(found, tokenizer, held_out)
    assert len(trained) == 14 and len(held_out) == 6
    assert not {tuple(row.input_ids) for row in trained} & {tuple(row.input_ids) for row in held_out}
    pieces, told = packed.pieces_to_tune_on(found, tokenizer, held_out)
    assert "14 rows" in told and len({piece.shape for piece in pieces}) == 1
    tokens = [token for row in trained for token in row.input_ids]
    assert torch.cat(pieces, dim=1)[0].tolist() == tokens[: sum(piece.shape[1] for piece in pieces)]


def test_without_rows_of_its_own_it_says_so(adapter: Path, run: Path) -> None:
    found = resolve_adapter(run)
    held_out = packed._all_held_out(found, load_tokenizer_of(found))
    pieces, told = packed.pieces_to_tune_on(resolve_adapter(adapter), load_tokenizer_of(found), held_out)
    assert pieces and "measured on" in told
