"""Rows that an exported model is measured on, and what it makes of them: logits and loss of the answers' tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from phlora.data.rows import Row
from phlora.data.table import IGNORED, TokenTable
from phlora.data.tokenize import TokenizedRow, tokenize_rows
from phlora.display import Display
from phlora.errors import DataError
from phlora.models.families import context_lengths
from phlora.models.lm_head import trunk_and_head, why_not_by_token
from phlora.models.tokenizer import LoadedTokenizer
from phlora.runs.reading import rows_or_held_out
from phlora.runs.resolve import ResolvedAdapter

# Logits of one model over all rows; those of two are in memory at once.
_LOGITS_BYTES = 256 << 20


def proof_rows(found: ResolvedAdapter, data: Any, **how: Any) -> list[Row]:
    """The rows that are named, or those that the run held out.

    Raises:
        DataError: there are none.
    """
    rows = rows_or_held_out(found, data, command="phlora merge", option="--rows", **how)
    if rows is None:
        raise DataError(
            "There are no rows to prove the merge on"
            + (": the run held none out" if found.rows else ": an adapter alone brings none"),
            where=str(found.adapter),
            fix="name a file with chats that the model is meant for: --rows chats.jsonl",
        )
    return rows


def tokenized_as_trained(
    rows: Sequence[Row], found: ResolvedAdapter, tokenizer: LoadedTokenizer, *, max_length: int | None
) -> TokenTable:
    """The rows as tokens, as the run of an adapter trains them."""
    return tokenize_rows(
        rows,
        tokenizer.tokenizer,
        train_on=found.train_on,
        max_length=max_length,
        training_template=tokenizer.training_template,
    ).rows


def tokenized_proof(
    rows: Sequence[Row], found: ResolvedAdapter, tokenizer: LoadedTokenizer, model: Any
) -> list[TokenizedRow]:
    """The rows as tokens, as many as there is room for the logits of."""
    tokenized = tokenized_as_trained(
        rows, found, tokenizer, max_length=found.max_length or context_lengths(model.config).max_tokens
    )
    room = _LOGITS_BYTES // (4 * model.config.vocab_size)
    totals = accumulate(row.num_trained_tokens for row in tokenized)
    kept = [row for row, total in zip(tokenized, totals, strict=True) if total <= room]
    return kept or tokenized[:1]


@torch.no_grad()
def answer_logits(model: Any, rows: Sequence[TokenizedRow], display: Display) -> Iterator[Tensor]:
    """The logits (S, V) at the trained tokens of each row, in fp32 on the CPU.

    Of all positions where the model does something to its logits after the head.
    """
    by_token = why_not_by_token(model) is None
    device = next(model.parameters()).device
    with display.progress("Rows", len(rows)) as advance:
        for row in rows:
            ids = torch.tensor([row.input_ids], device=device)
            predicts = torch.tensor(row.labels[1:], device=device) != IGNORED
            if by_token:
                trunk, head = trunk_and_head(model)
                hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
                logits = head(hidden[predicts])
            else:
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1][predicts]
            yield logits.float().cpu()
            advance(1)


def answer_loss(rows: Sequence[TokenizedRow], logits: Iterable[Tensor]) -> float:
    """Mean cross-entropy of the answers' tokens, in nats."""
    total, count = 0.0, 0
    for row, predicted in zip(rows, logits, strict=True):
        targets = torch.tensor([label for label in row.labels[1:] if label != IGNORED])
        total += F.cross_entropy(predicted.double(), targets, reduction="sum").item()
        count += len(targets)
    return total / max(1, count)
