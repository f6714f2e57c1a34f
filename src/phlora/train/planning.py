"""A run before it starts: its configuration, its rows, and what will be trained, all of it known and shown."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from phlora.adapters.attach import AdapterSummary
from phlora.config import DataFile, RunConfig, Speed, build_config
from phlora.data.cache import TokenCache, digest_tokenizer, token_key
from phlora.data.dataset import RowIndex, RowSubset, index_rows
from phlora.data.packing import TokenSequences
from phlora.data.rows import Origin, Row, fingerprint_of
from phlora.data.split import split_keys
from phlora.data.table import TokenTable
from phlora.data.tokenize import TokenizedSet, tokenize_rows
from phlora.display import Display
from phlora.errors import ConfigError, DataError, EnvironmentProblem
from phlora.files import replaced_file
from phlora.models.embedded import cache_root
from phlora.models.load import LoadedTokenizer
from phlora.train.settings import Settings
from phlora.train.sharing import Sharing, decide_sharing

IN_MEMORY = "(in memory)"
# The rows of the proof, kept in the run folder.
# Beyond this share of dropped rows the data and max_length do not belong together.
_MOST_DROPPED = 0.5
# A checkpoint is the adapter and AdamW's two moments of it.
_CHECKPOINT_COPIES = 3
# Room for tokenizer, configuration, events and report, which do not grow with the model.
_SMALL_FILES_BYTES = 50_000_000


@dataclass(frozen=True)
class Objects:
    """Rows that were handed over as Python objects; None where files are read."""

    train: Any = None
    held_out: Any = None


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
    """

    train: TokenSequences
    held_out: TokenTable
    held_out_rows: list[Row]
    facts: dict[str, Any]
    fingerprint: str
    speed: Speed = "auto"


@dataclass(frozen=True)
class Plan:
    """What a run will do, in numbers."""

    adapter: AdapterSummary
    data: Mapping[str, Any]
    sequences_per_step: int
    num_optimizer_steps: int
    disk_bytes: int
    learning_rate: float
    sharing: Sharing
    loraplus_lr_ratio: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The plan for programs: counts, and whether rows share their common starts."""
        data = self.data
        return {
            **{name: data[name] for name in ("train_rows", "held_out_rows", "tokens", "trained_tokens")},
            "packs": data.get("packs"),
            "sequences_per_step": self.sequences_per_step,
            "num_optimizer_steps": self.num_optimizer_steps,
            "trainable_parameters": self.adapter.num_trainable,
            "disk_bytes": self.disk_bytes,
            "sharing": dataclasses.asdict(self.sharing),
        }

    def render(self) -> str:
        """A few lines for the terminal, shown before anything is trained."""
        data = self.data
        share = data["trained_tokens"] / max(1, data["tokens"])
        packs = data.get("packs")
        packed = f" in {packs['count']:,} packs ({packs['filled']:.0%} full)" if packs else ""
        kind = "packs" if packs else "rows"
        ratio, rate = self.loraplus_lr_ratio, self.learning_rate
        loraplus = f"\n  LoRA+: learning rate {rate:g}, for lora_B {ratio * rate:g}" if ratio else ""
        return (
            f"{self.adapter.render()}\n"
            f"  {data['train_rows']:,} training rows{packed}, {data['held_out_rows']:,} held out; "
            f"{data['tokens']:,} tokens an epoch, {data['trained_tokens']:,} of them trained ({share:.0%})\n"
            f"  {self.num_optimizer_steps:,} optimizer steps of {self.sequences_per_step} {kind}{loraplus}\n"
            f"  shared prefixes {self.sharing.describe()}"
        )


def require_one_process() -> None:
    """A run folder has one writer.

    Raises:
        EnvironmentProblem: a launcher started several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EnvironmentProblem(
            f"A launcher started {os.environ['WORLD_SIZE']} processes; a Phlora run is one process",
            fix="start it without the launcher, or use phlora.SFTTrainer in a script of your own, as in "
            "examples/sample_finetune.py, which accelerate can launch",
        )


def collect_config(config: RunConfig | None, arguments: Mapping[str, Any]) -> tuple[RunConfig, Objects]:
    """One configuration from either a `RunConfig` or the arguments of `finetune`.

    Raises:
        ConfigError: both were given, or neither says what to train on.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    if config is not None:
        if given:
            raise ConfigError(
                f"Both `config` and {', '.join(f'`{n}`' for n in given)} were given", fix="give one"
            )
        return _take_output_dir(config), Objects()
    objects = Objects(
        *(given.pop(name) if _is_rows(given.get(name)) else None for name in ("data", "eval_data"))
    )
    data = given.pop("data", None)
    section = (
        dict(data)
        if isinstance(data, Mapping)
        else {"files": data or ([IN_MEMORY] if objects.train is not None else None)}
    )
    if "eval_data" in given:
        section["eval"] = given.pop("eval_data")
    elif objects.held_out is not None:
        section["eval"] = [IN_MEMORY]
    values = {**given, "data": {key: _paths(value) for key, value in section.items()}}
    if isinstance(values.get("model"), Path):
        values["model"] = str(values["model"])
    if section.get("files") is None:
        raise ConfigError("`data` is missing", expected="file(s), a `datasets.Dataset` or a list of rows")
    origins = {name: "argument" for name in (*given, "data")}
    config = _take_output_dir(build_config(values, origins))
    if "output" not in given and config.output == RunConfig.output:
        stem = "run" if objects.train is not None else Path(config.data.files[0].path).stem
        config = dataclasses.replace(config, output=str(Path("runs") / stem))
    return config, objects


def _take_output_dir(config: RunConfig) -> RunConfig:
    """`training_config.output_dir`, as scripts have it, names the run folder unless `output` does."""
    settings = dict(config.training_config)
    named = settings.pop("output_dir", None)
    if named and config.output == RunConfig.output:
        config = dataclasses.replace(config, output=str(named))
    return dataclasses.replace(config, training_config=settings)


def _is_rows(value: Any) -> bool:
    """Whether rows themselves were given, rather than the name of a file or several."""
    if value is None or isinstance(value, str | Path | Mapping):
        return False
    if isinstance(value, list | tuple):
        return bool(value) and isinstance(value[0], Mapping) and "path" not in value[0]
    return True


def _paths(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_paths(entry) for entry in value] if isinstance(value, list | tuple) else value


def prepare_data(
    config: RunConfig, objects: Objects, tokenizer: LoadedTokenizer, settings: Settings, display: Display
) -> PreparedData:
    """Read, split, tokenise and pack the rows; say what was dropped or cut, and where.

    Raises:
        DataError: the data cannot be used, or most of it would be dropped.
    """
    train_rows, held_out_rows, formats = _both_sides(config, objects, settings, display)
    tokenize = _tokenizing(config, tokenizer, settings, display)
    with display.progress("Tokenising", len(train_rows) + len(held_out_rows)) as progress:
        train, held_out = (tokenize(rows, progress) for rows in (train_rows, held_out_rows))
    for tokenized, name in ((train, "training"), (held_out, "held-out")):
        _tell_cuts(tokenized, name, settings, display)
    kept = {held_out.rows.origin(number) for number in range(len(held_out.rows))}
    sequences = _sequences(train.rows, settings)
    return PreparedData(
        train=sequences,
        held_out=held_out.rows,
        held_out_rows=[row for row in held_out_rows if row.origin in kept],
        facts={
            "files": [file.path for file in config.data.files],
            "formats": formats,
            "train_rows": len(train.rows),
            "held_out_rows": len(held_out.rows),
            "sequences": len(sequences),
            **_packs(sequences, train.num_tokens),
            "tokens": train.num_tokens,
            "trained_tokens": train.num_trained_tokens,
            "dropped": [f"{skip.origin}: {skip.reason}" for skip in (*train.skipped, *held_out.skipped)],
            "cut": [str(origin) for origin in (*train.cut, *held_out.cut)],
        },
        fingerprint=fingerprint_of(chain(train_rows.digests(), held_out_rows.digests())),
        speed=config.speed,
    )


def _both_sides(
    config: RunConfig, objects: Objects, settings: Settings, display: Display
) -> tuple[RowSubset, RowSubset, dict[str, str]]:
    """The training rows, the held-out rows, and the schema of each training source."""
    data = config.data
    survey = index_rows(_sources(data.files, objects.train), format=data.format)
    _tell(survey, display)
    if data.eval:
        held_out = index_rows(_sources(data.eval, objects.held_out), format=data.format)
        _tell(held_out, display)
        return _without_leaks(survey, held_out, display), held_out.all(), survey.formats
    sides = split_keys(survey.keys, eval_size=data.eval_size, seed=settings.args.seed)
    train, held_out_rows = (RowSubset(survey, numbers) for numbers in sides)
    return train, held_out_rows, survey.formats


def _tokenizing(
    config: RunConfig, tokenizer: LoadedTokenizer, settings: Settings, display: Display
) -> Callable[[RowSubset, Callable[[int], None]], TokenizedSet]:
    """A function of (rows, progress) that gives their tokens, from the cache where it has them."""
    options: dict[str, Any] = {
        "train_on": config.data.train_on,
        "max_length": settings.args.max_length,
        "too_long": config.data.too_long,
        "training_template": tokenizer.training_template,
    }
    cache = TokenCache(cache_root() / "tokens")
    # `tokenize_rows` says what is wrong with a slow tokenizer.
    use_cache = config.data.cache and tokenizer.tokenizer.is_fast
    tokenizer_digest = digest_tokenizer(tokenizer.tokenizer) if use_cache else b""

    def tokenize(rows: RowSubset, progress: Callable[[int], None]) -> TokenizedSet:
        if not len(rows):
            return TokenizedSet.empty()
        key = token_key(rows, tokenizer_digest, options) if use_cache else ""
        found = cache.load(key) if key else None
        if found is not None:
            display.note(f"{len(rows):,} rows: tokens from cache ({cache.folder})")
            progress(len(rows))
            return found
        tokenized = tokenize_rows(rows, tokenizer.tokenizer, **options, progress=progress)
        if key:
            cache.save(key, tokenized)
        return tokenized

    return tokenize


def make_plan(data: PreparedData, adapter: AdapterSummary, settings: Settings, model: Any) -> Plan:
    """Count the steps and the room that a run takes, and decide what its rows share.

    Args:
        model: with its adapters; only its configuration is looked at.
    """
    args = settings.args
    batches = math.ceil(len(data.train) / args.per_device_train_batch_size)
    per_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    kept = (args.save_total_limit or 10) + 1
    return Plan(
        adapter=adapter,
        data=data.facts,
        sequences_per_step=args.per_device_train_batch_size * args.gradient_accumulation_steps,
        num_optimizer_steps=steps,
        disk_bytes=(kept * _CHECKPOINT_COPIES + 2) * adapter.adapter_bytes + _SMALL_FILES_BYTES,
        learning_rate=args.learning_rate,
        sharing=decide_sharing(
            model,
            data.train,
            speed=data.speed,
            batch_size=args.per_device_train_batch_size,
            settings=settings,
            held_out=data.held_out,
        ),
        loraplus_lr_ratio=settings.loraplus_lr_ratio,
    )


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


def _packs(sequences: TokenSequences, num_tokens: int) -> dict[str, Any]:
    """With packing, how many packs there are and how much of their length is filled."""
    if sequences.max_length is None:
        return {}
    room = max(1, len(sequences) * sequences.max_length)
    return {"packs": {"count": len(sequences), "filled": round(num_tokens / room, 4)}}


def _sequences(rows: TokenTable, settings: Settings) -> TokenSequences:
    """One row a sequence, or with `packing` as many whole rows as fit into max_length."""
    args = settings.args
    if not args.packing:
        return TokenSequences(rows)
    if not args.max_length:
        raise ConfigError(
            "Packing needs a length", where="training_config.max_length", expected="a number of tokens"
        )
    return TokenSequences(rows, max_length=args.max_length, seed=args.seed)


def _tell(survey: RowIndex, display: Display) -> None:
    for problem in survey.problems:
        (display.warn if problem.severity == "warning" else display.note)(problem.message)


def _tell_cuts(tokenized: TokenizedSet, name: str, settings: Settings, display: Display) -> None:
    for note in tokenized.notes:
        (display.warn if note.severity == "warning" else display.note)(
            f"{note.message} ({note.count} {name} rows: {_named(note.origins, note.count)})"
        )
    if tokenized.cut:
        display.warn(
            f"{len(tokenized.cut)} {name} rows lost their oldest turns to fit max_length="
            f"{settings.args.max_length}: {_named(tokenized.cut)}"
        )
    if tokenized.skipped:
        origins = [skip.origin for skip in tokenized.skipped]
        display.warn(
            f"{len(origins)} {name} rows were left out: {_named(origins)}; {tokenized.skipped[0].reason}"
        )
        if len(origins) > _MOST_DROPPED * (len(origins) + len(tokenized.rows)):
            raise DataError(
                f"{len(origins)} of {len(origins) + len(tokenized.rows)} {name} rows would be left out, "
                f"the first because {tokenized.skipped[0].reason}",
                where=str(origins[0]),
                fix="raise training_config.max_length, or shorten the rows",
            )


def _named(origins: Sequence[Origin], count: int | None = None) -> str:
    shown = ", ".join(str(origin) for origin in origins[:3])
    count = len(origins) if count is None else count
    return shown + (f" and {count - 3} more" if count > 3 else "")
