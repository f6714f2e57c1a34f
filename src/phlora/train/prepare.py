"""The rows of a run: read, split, tokenised and packed, and what was dropped or cut on the way, said."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from phlora.config import DataFile, RunConfig, Speed
from phlora.data.cache import TokenCache, digest_tokenizer, token_key
from phlora.data.checks import warnings_of
from phlora.data.dataset import RowIndex, RowSubset
from phlora.data.inspection import SplitSettings, inspect_data
from phlora.data.lengths import limits_text, percentiles, percentiles_text, whole_at
from phlora.data.packing import TokenSequences
from phlora.data.problems import merge_problems, named_origins
from phlora.data.rows import Problem, Row, fingerprint_of, sentence
from phlora.data.similarity import KEY_BYTES
from phlora.data.split import split_keys
from phlora.data.system_prompt import SystemPrompts, SystemPromptWatch, find_system_prompts
from phlora.data.table import TokenTable
from phlora.data.tokenize import TokenizedSet, tokenize_rows
from phlora.display import Display, counted
from phlora.errors import ConfigError, DataError, Finding
from phlora.files import cache_root, replaced_file
from phlora.models.tokenizer import LoadedTokenizer
from phlora.runs.facts import DataFacts, FileContents, Packs, SplitBy
from phlora.runs.trained_rows import TrainedKeys
from phlora.train.arguments import Arguments
from phlora.train.request import Objects

# Beyond this share of dropped rows the data and max_length do not belong together.
_MOST_DROPPED = 0.5
# What to do about rows that were left out, by the reason of the first.
_ADVICE = {
    "too_long": "raise training_config.max_length, or shorten the rows",
    "no_trained_token": "let a message of theirs train (`train: true`, or a weight above 0), or change data.train_on",
}


@dataclass(frozen=True)
class PreparedData:
    """Tokenised rows on both sides of the split.

    Attributes:
        train: rows, or packs of rows, to train on.
        held_out: rows that training never sees.
        held_out_rows: the same rows before tokenisation.
        facts: counts for people, the run folder and the report.
        fingerprint: of all rows and their order.
        speed: whether rows may share the computation of their common starts.
        system_prompts: what the training rows begin with.
        trained_keys: digests of each row that is trained on.
    """

    train: TokenSequences
    held_out: TokenTable
    held_out_rows: list[Row]
    facts: DataFacts
    fingerprint: str
    speed: Speed = "auto"
    system_prompts: SystemPrompts | None = None
    trained_keys: TrainedKeys = TrainedKeys()


def prepare_data(
    config: RunConfig,
    objects: Objects,
    tokenizer: LoadedTokenizer,
    arguments: Arguments,
    display: Display,
    *,
    split_by: SplitBy = "conversations",
) -> PreparedData:
    """Read, split, tokenise and pack the rows; say what was dropped or cut, and where.

    The sources are read once to find what is in them, and each side once more for its tokens.

    Args:
        split_by: what the rows are dealt out by; a run that was split by rows is continued so.

    Raises:
        DataError: the data cannot be used, or most of it would be dropped.
    """
    train_rows, held_out_rows, formats = _both_sides(config, objects, arguments, display, split_by=split_by)
    tokenize = _tokenizing(config, tokenizer, arguments, display)
    prompts, proof_rows = SystemPromptWatch(), list(held_out_rows)
    with display.progress("Tokenising", len(train_rows) + len(held_out_rows)) as progress:
        train = tokenize(train_rows, prompts.watched(train_rows), progress)
        held_out = tokenize(held_out_rows, proof_rows, progress)
    for tokenized, name in ((train, "training"), (held_out, "held-out")):
        _tell_cuts(tokenized, name, arguments, display)
    if config.data.strict:
        _require_none([*warnings_of(train), *warnings_of(held_out)])
    kept = {held_out.rows.origin(number) for number in range(len(held_out.rows))}
    sequences = _sequences(train.rows, arguments)
    return PreparedData(
        train=sequences,
        held_out=held_out.rows,
        held_out_rows=[row for row in proof_rows if row.origin in kept],
        facts=DataFacts(
            files=tuple(file.path for file in config.data.files),
            formats=formats,
            contents=_contents(train_rows, held_out_rows),
            split=split_by,
            train_rows=len(train.rows),
            held_out_rows=len(held_out.rows),
            sequences=len(sequences),
            packs=_packs(sequences, train.num_tokens),
            tokens=train.num_tokens,
            trained_tokens=train.num_trained_tokens,
            dropped=tuple(f"{skip.origin}: {skip.reason}" for skip in (*train.skipped, *held_out.skipped)),
            cut=tuple(str(origin) for origin in (*train.cut, *held_out.cut)),
        ),
        fingerprint=fingerprint_of(chain(train_rows.digests(), held_out_rows.digests())),
        speed=config.speed,
        # Tokens from the cache are made without reading a row.
        system_prompts=prompts.found() if prompts.num_rows else find_system_prompts(train_rows),
        trained_keys=_trained_keys(train_rows, train.rows),
    )


def _trained_keys(rows: RowSubset, tokens: TokenTable) -> TrainedKeys:
    """The digests of the rows that were not left out (too long, of weight 0)."""
    kept = {tokens.origin(number) for number in range(len(tokens))}
    numbers = [n for n, origin in zip(rows.numbers, rows.origins(), strict=True) if origin in kept]
    near, prompts = (
        frozenset(bytes(values[n * KEY_BYTES : (n + 1) * KEY_BYTES]) for n in numbers)
        for values in (rows.survey.near, rows.survey.prompts)
    )
    return TrainedKeys(near=near, prompts=prompts)


def _contents(*sides: RowSubset) -> dict[str, FileContents]:
    """For each file that was read, how many rows came from it and a digest of them."""
    digests: dict[str, Any] = {}
    counts: Counter[str] = Counter()
    for side in sides:
        for origin, digest in zip(side.origins(), side.digests(), strict=True):
            digests.setdefault(origin.file, hashlib.sha256()).update(digest)
            counts[origin.file] += 1
    return {
        file: FileContents(rows=counts[file], digest=found.hexdigest()[:16])
        for file, found in digests.items()
    }


def _both_sides(
    config: RunConfig, objects: Objects, arguments: Arguments, display: Display, *, split_by: SplitBy
) -> tuple[RowSubset, RowSubset, dict[str, str]]:
    """The training rows, the held-out rows, and the schema of each training source."""
    data = config.data
    seed = arguments.args.seed
    found = inspect_data(
        _sources(data.files, objects.train),
        _sources(data.eval, objects.held_out) if data.eval else None,
        format=data.format,
        train_on=data.train_on,
        keep_reasoning=data.reasoning == "keep",
        split=SplitSettings(
            eval_size=data.eval_size, seed=seed, group_by=data.group_by, stratify_by=data.stratify_by
        ),
    )
    problems = merge_problems(found.problems)
    if data.strict:
        _require_none(found.problems)
    for problem in problems:
        (display.note if problem.severity == "note" else display.warn)(_told(problem))
    formats = found.index.formats
    if data.eval:
        return _without_leaks(found.index, found.held_out.survey, display), found.held_out, formats
    if split_by == "rows":
        sides = split_keys(found.index.keys, eval_size=data.eval_size, seed=seed)
        train, held_out = (RowSubset(found.index, numbers) for numbers in sides)
        return train, held_out, formats
    return found.train, found.held_out, formats


def _tokenizing(
    config: RunConfig, tokenizer: LoadedTokenizer, arguments: Arguments, display: Display
) -> Callable[[RowSubset, Iterable[Row], Callable[[int], None]], TokenizedSet]:
    """A function of (rows, the same as they are read, progress) that gives their tokens, from the cache where it has
    them."""
    options: dict[str, Any] = {
        "train_on": config.data.train_on,
        "max_length": arguments.args.max_length,
        "too_long": config.data.too_long,
        "training_template": tokenizer.training_template,
    }
    cache = TokenCache(cache_root() / "tokens")
    # `tokenize_rows` says what is wrong with a slow tokenizer.
    use_cache = config.data.cache and tokenizer.tokenizer.is_fast
    tokenizer_digest = digest_tokenizer(tokenizer.tokenizer) if use_cache else b""

    def tokenize(rows: RowSubset, read: Iterable[Row], progress: Callable[[int], None]) -> TokenizedSet:
        if not len(rows):
            return TokenizedSet.empty()
        key = token_key(rows, tokenizer_digest, options) if use_cache else ""
        found = cache.load(key) if key else None
        if found is not None:
            display.note(f"{counted(len(rows), 'row')}: tokens from cache ({cache.folder})")
            progress(len(rows))
            return found
        tokenized = tokenize_rows(read, tokenizer.tokenizer, **options, progress=progress)
        if key:
            cache.save(key, tokenized)
        return tokenized

    return tokenize


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as JSONL in a form that `load_rows` reads back to the same rows."""
    with replaced_file(path) as part, part.open("w", encoding="utf-8") as file:
        for row in rows:
            parts = {
                name: getattr(row, name) for name in ("messages", "prompt", "completion", "text", "tools")
            }
            record = {name: value for name, value in parts.items() if value is not None}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _sources(files: Sequence[DataFile], rows: Any) -> Any:
    return list(files) if rows is None else rows


def _without_leaks(survey: RowIndex, held_out: RowIndex, display: Display) -> RowSubset:
    """Training rows that also stand in the held-out file are left out of training, and counted."""
    keys = set(held_out.keys)
    kept = [number for number, key in enumerate(survey.keys) if key not in keys]
    if len(kept) < len(survey):
        display.warn(
            f"{len(survey) - len(kept)} training rows also stand in the held-out rows; not trained on"
        )
    if not kept:
        raise DataError("Every training row also stands in the held-out rows", fix="name another eval file")
    return RowSubset(survey, kept)


def _packs(sequences: TokenSequences, num_tokens: int) -> Packs | None:
    """With packing, how many packs there are and how much of their length is filled."""
    if sequences.max_length is None:
        return None
    room = max(1, len(sequences) * sequences.max_length)
    return Packs(count=len(sequences), filled=round(num_tokens / room, 4))


def _sequences(rows: TokenTable, arguments: Arguments) -> TokenSequences:
    """One row a sequence, or with `packing` as many whole rows as fit into max_length."""
    args = arguments.args
    if not args.packing:
        return TokenSequences(rows)
    if not args.max_length:
        raise ConfigError(
            "Packing needs a length", where="training_config.max_length", expected="a number of tokens"
        )
    return TokenSequences(rows, max_length=args.max_length, seed=args.seed)


def _require_none(problems: Iterable[Problem]) -> None:
    """With `data.strict` a warning is an error.

    Raises:
        Finding: there are warnings.
    """
    warnings = [problem for problem in merge_problems(problems) if problem.severity != "note"]
    if warnings:
        raise Finding(
            "The data has warnings, and `data.strict` forbids to train with them:\n  "
            + "\n  ".join(map(_told, warnings)),
            fix="correct the data, or train without --strict",
        )


def _told(problem: Problem) -> str:
    if not problem.origins:
        return problem.message
    return (
        f"{problem.message} ({problem.count} rows: {named_origins(problem.origins, problem.count, most=3)})"
    )


def _tell_cuts(tokenized: TokenizedSet, name: str, arguments: Arguments, display: Display) -> None:
    for note in tokenized.notes:
        (display.warn if note.severity == "warning" else display.note)(
            f"{note.message} ({counted(note.count, f'{name} row')}: {named_origins(note.origins, note.count, most=3)})"
        )
    limit = arguments.args.max_length
    if name == "training" and tokenized.full_lengths:  # the cache keeps none
        kept = f"; {limits_text(whole_at(tokenized.full_lengths, limit))}" if limit else ""
        text = percentiles_text(percentiles(tokenized.full_lengths))
        display.note(f"{sentence(text)}{kept}")
    if tokenized.cut:
        display.warn(
            f"{counted(len(tokenized.cut), f'{name} row')} lost their oldest turns to fit max_length="
            f"{arguments.args.max_length}: {named_origins(tokenized.cut, most=3)}"
        )
    if tokenized.skipped:
        origins = [skip.origin for skip in tokenized.skipped]
        were = "was" if len(origins) == 1 else "were"
        display.warn(
            f"{counted(len(origins), f'{name} row')} {were} left out: {named_origins(origins, most=3)}; "
            f"{tokenized.skipped[0].reason}"
        )
        # A weight of 0 is a choice.
        dropped = [skip for skip in tokenized.skipped if skip.kind != "weight_zero"]
        num_rows = len(dropped) + len(tokenized.rows)
        if len(dropped) > _MOST_DROPPED * num_rows:
            raise DataError(
                f"{len(dropped)} of {num_rows} {name} rows would be left out, "
                f"the first because {dropped[0].reason}",
                where=str(dropped[0].origin),
                fix=_ADVICE.get(
                    dropped[0].kind, "correct or remove the rows; `phlora data check FILE` lists them"
                ),
            )
