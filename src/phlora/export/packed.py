"""GPTQ and AWQ by auto-round: what the rounding of a model is tuned on, and the model folder that it writes.

Tuned on are the chats that the run trained on. Those that the result is measured on are among them only where no others
are there, which the report says.
Source: SignRound (Cheng et al. 2023), which auto-round implements.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from phlora.data.rows import Row
from phlora.data.tokenize import TokenizedRow
from phlora.errors import EnvironmentProblem, InputError
from phlora.export.proof import proof_rows, tokenized_as_trained
from phlora.models.families import block_linears
from phlora.models.load import load_model
from phlora.models.tokenizer import LoadedTokenizer
from phlora.runs.reading import read_like_run
from phlora.runs.resolve import ResolvedAdapter

# Columns that share a scale: the widest that every layer takes.
_GROUPS = (128, 64, 32)
# Tokens of a piece of chats that rounding is tuned on, how many of them, and how often.
_LENGTHS, _MOST_PIECES, _ENOUGH_PIECES, _TIMES = (512, 256, 128, 64, 32), 128, 8, 50


def pieces_to_tune_on(
    found: ResolvedAdapter, tokenizer: LoadedTokenizer, held_out: Sequence[TokenizedRow]
) -> tuple[list[Tensor], str]:
    """Pieces of equal length of the chats that the run trained on, shape (1, T) each, and what they are."""
    rows = _trained_rows(found, tokenizer, held_out)
    told = f"tuned on {len(rows)} rows that the run trained on"
    if not rows:
        rows, told = list(held_out), "tuned on the rows that it is measured on, as no others are there"
    ids = [token for row in rows for token in row.input_ids]
    length = next((size for size in _LENGTHS if len(ids) // size >= _ENOUGH_PIECES), _LENGTHS[-1])
    ids = ids * -(-length // max(1, len(ids))) if len(ids) < length else ids
    whole = torch.tensor(ids[: len(ids) // length * length]).reshape(-1, 1, length)
    return list(whole[:_MOST_PIECES]), told


def _trained_rows(
    found: ResolvedAdapter, tokenizer: LoadedTokenizer, held_out: Sequence[TokenizedRow]
) -> list[TokenizedRow]:
    """The run's own training rows, where they are still there, without those that are held out."""
    config = found.config
    if config is None:
        return []
    try:
        rows = read_like_run([file.path for file in config.data.files], config)
    except InputError:  # moved, or changed since
        return []
    kept = {tuple(row.input_ids) for row in held_out}
    everything = {tuple(row.input_ids) for row in _all_held_out(found, tokenizer)} | kept
    # As many as may be looked at: what rounding is tuned on is a small part of them.
    tokenized = _tokenized(rows[: 16 * _MOST_PIECES], found, tokenizer)
    return [row for row in tokenized if tuple(row.input_ids) not in everything]


def _all_held_out(found: ResolvedAdapter, tokenizer: LoadedTokenizer) -> list[TokenizedRow]:
    if found.rows is None or not found.rows.is_file() or not found.rows.stat().st_size:
        return []
    return _tokenized(proof_rows(found, None), found, tokenizer)


def _tokenized(rows: Sequence[Row], found: ResolvedAdapter, tokenizer: LoadedTokenizer) -> list[TokenizedRow]:
    return list(tokenized_as_trained(rows, found, tokenizer, max_length=found.max_length or _LENGTHS[0]))


def write_packed(
    merged: Path,
    output: Path,
    tokenizer: LoadedTokenizer,
    pieces: Sequence[Tensor],
    *,
    format: str,
    device: str,
) -> None:
    """Round the model in a folder to 4 bits and save it.

    Raises:
        EnvironmentProblem: auto-round failed; it says how.
    """
    with _quiet():
        from auto_round import AutoRound

        loaded = load_model(str(merged), dtype="float32", device=device, offline=True)
        try:
            rounding = AutoRound(
                loaded.model,
                tokenizer.tokenizer,
                bits=4,
                group_size=_group_size(loaded.model),
                sym=True,
                dataset=list(pieces),
                nsamples=len(pieces),
                seqlen=pieces[0].shape[-1],
                batch_size=min(8, len(pieces)),
                iters=_TIMES,
                enable_torch_compile=False,
                device_map=str(loaded.device),
            )
            rounding.quantize_and_save(str(output), format=f"auto_{format}")
        # Many libraries at work, each with its own kinds of errors.
        except (
            RuntimeError,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            ImportError,
            OSError,
        ) as error:
            raise EnvironmentProblem(
                f"auto-round cannot round this model: {error}",
                where="--quantize",
                fix="merge without --quantize, or with another format",
            ) from error
    # It writes into a folder of a name of its own.
    inner = next((file.parent for file in output.rglob("config.json")), output)
    for file in [] if inner == output else list(inner.iterdir()):
        shutil.move(file, output / file.name)
    for folder in [path for path in output.iterdir() if path.is_dir()]:
        shutil.rmtree(folder)
    tokenizer.tokenizer.save_pretrained(output)


def _group_size(model: nn.Module) -> int:
    widths = [int(model.get_submodule(name).in_features) for name in block_linears(model)]  # type: ignore[arg-type]
    return next((size for size in _GROUPS if all(width % size == 0 for width in widths)), _GROUPS[-1])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the many lines of a library that talks to a person of its own."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
