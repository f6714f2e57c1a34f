"""A merged model in 4 bits, for programs that run such models, with what the rounding cost on held-out rows.

gptq, awq   auto-round tunes the rounding of every linear layer of the blocks on chats, and packs it in the layout of
            that name, which transformers, vLLM and others load
int4-onnx   onnxruntime-genai's builder writes a graph for ONNX Runtime; it rounds to the nearest and reads no chats

The chats are the run's own, as it trained them, never those that the result is measured on, and never a hub's. Before
and after, the same held-out rows are scored: the loss of the answers, and the share that is answered word for word.
Sources: SignRound (Cheng et al. 2023), which auto-round implements; onnxruntime-genai's model builder.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from phlora.data.prompts import encode_prompt
from phlora.data.rows import Row
from phlora.data.table import IGNORED
from phlora.data.tokenize import TokenizedRow, tokenize_rows
from phlora.display import Display
from phlora.errors import ConfigError, EnvironmentProblem, InputError, ModelError, did_you_mean, shown
from phlora.export.merge import (
    MERGE_FILE,
    MergeReport,
    answer_logits,
    answer_loss,
    merge_run,
    proof_rows,
    tokenized_proof,
)
from phlora.export.output import require_new, require_room_for
from phlora.extras import require
from phlora.files import ADAPTER_FACTS, replaced_folder, write_json
from phlora.models.families import block_linears
from phlora.models.generate import generate
from phlora.models.load import load_model
from phlora.models.tokenizer import LoadedTokenizer
from phlora.runs.reading import read_like_run
from phlora.runs.resolve import ResolvedAdapter, load_tokenizer_of, resolve_adapter

QuantizedFormat = Literal["gptq", "awq", "int4-onnx"]
FORMATS: tuple[QuantizedFormat, ...] = get_args(QuantizedFormat)
_NEEDS = {
    "gptq": {"auto_round": "rounding to 4 bits"},
    "awq": {"auto_round": "rounding to 4 bits"},
    "int4-onnx": {
        "onnxruntime_genai": "writing for ONNX Runtime",
        "onnx": "writing for ONNX Runtime",
        "onnx_ir": "writing for ONNX Runtime",
    },
}
# Columns that share a scale: the widest that every layer takes.
_GROUPS = (128, 64, 32)
# Tokens of a piece of chats that rounding is tuned on, how many of them, and how often.
_LENGTHS, _MOST_PIECES, _ENOUGH_PIECES, _TIMES = (512, 256, 128, 64, 32), 128, 8, 50
_MOST_ANSWERS = 32
_NEW_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a model makes of the held-out rows.

    Attributes:
        loss: of the answers' tokens, in nats.
        exact_match: share of the rows that are answered word for word; None where none has a prompt to answer.
        num_bytes: of its weights on the disk.
    """

    loss: float
    exact_match: float | None
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class QuantizedReport:
    """What was merged, and what rounding it cost.

    Attributes:
        folder: the new model folder.
        format: `gptq`, `awq` or `int4-onnx`.
        merge: the merged model that was rounded.
        before, after: the merged model, and the rounded one.
        num_rows, num_answers: rows behind the loss, and behind the exact matches.
        calibration: what the rounding was tuned on, in words.
    """

    folder: str
    format: QuantizedFormat
    merge: MergeReport
    before: Figures
    after: Figures
    num_rows: int
    num_answers: int
    calibration: str

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    def summary(self) -> str:
        """A few lines for people."""

        def share(figures: Figures) -> str:
            return "-" if figures.exact_match is None else f"{figures.exact_match:.1%}"

        return "\n".join(
            [
                self.merge.summary(),
                f"Rounded to {self.format}: {self.calibration}",
                f"  {'':<24}{'merged':>10}{self.format:>12}",
                f"  {'loss':<24}{self.before.loss:>10.4f}{self.after.loss:>12.4f}   ({self.num_rows} rows)",
                f"  {'exact match':<24}{share(self.before):>10}{share(self.after):>12}   ({self.num_answers} rows)",
                f"  {'MB of weights':<24}{self.before.num_bytes / 1e6:>10.1f}{self.after.num_bytes / 1e6:>12.1f}",
            ]
        )


def merge_quantized(
    source: str | Path,
    output: str | Path,
    *,
    quantize: str,
    model: str | None = None,
    rows: Any = None,
    max_rows: int = 64,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    device: str = "auto",
    offline: bool = False,
    display: Display | None = None,
    **how: Any,
) -> QuantizedReport:
    """Merge an adapter as `merge_run` does, and save the merged model in 4 bits.

    Args:
        quantize: `gptq`, `awq` or `int4-onnx`.
        source, output, model, rows, max_rows, format, columns, device, offline, display, how: as in `merge_run`.

    Raises:
        ConfigError: there is no such format.
        MissingExtraError: what writes it is not installed.
        EnvironmentProblem: what writes it failed; it says how.
        Others as `merge_run`.
    """
    display = display or Display()
    wanted = _require_format(quantize)
    require(_NEEDS[wanted], where="--quantize", instead="merge without it")
    output = Path(output).expanduser()
    require_new(output)
    found = resolve_adapter(source, model=model, offline=offline)
    reading: dict[str, Any] = {"format": format, "columns": columns}
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.absolute().parent, prefix=f".{output.name}-merged-") as beside:
        merged = Path(beside) / "model"
        report = merge_run(
            source,
            merged,
            model=model,
            rows=rows,
            max_rows=max_rows,
            device=device,
            offline=offline,
            display=display,
            **reading,
            **how,
        )
        tokenizer = load_tokenizer_of(found)
        chosen = proof_rows(found, rows, **reading)[:max_rows]
        loaded = load_model(str(merged), dtype="float32", device=device, offline=True)
        compared = tokenized_proof(chosen, found, tokenizer, loaded.model)
        questions = _questions(found, chosen, tokenizer)
        display.stage(f"Scoring the merged model on {len(compared)} rows")
        before = _scored(loaded.model, compared, questions, tokenizer, display, folder=merged)
        del loaded
        gc.collect()

        require_room_for(output, before.num_bytes // 2)
        with replaced_folder(output) as part:
            display.stage(f"Rounding it to {wanted}")
            if wanted == "int4-onnx":
                calibration = "to the nearest, without chats"
                _write_onnx(merged, part)
            else:
                pieces, calibration = _pieces(found, tokenizer, compared)
                _write_packed(merged, part, tokenizer, pieces, format=wanted, device=device)
            if (merged / ADAPTER_FACTS).is_file():
                shutil.copy(merged / ADAPTER_FACTS, part / ADAPTER_FACTS)
            display.stage("Loading what was saved, and scoring it on the same rows")
            if wanted == "int4-onnx":
                after = _scored_onnx(part, compared, questions, tokenizer)
            else:
                again = load_model(str(part), dtype="float32", device=device, offline=True)
                after = _scored(again.model, compared, questions, tokenizer, display, folder=part)
                del again
            result = QuantizedReport(
                folder=str(output),
                format=wanted,
                merge=report,
                before=before,
                after=after,
                num_rows=len(compared),
                num_answers=len(questions),
                calibration=calibration,
            )
            facts = result.to_json()
            evidence = {key: facts[key] for key in facts if key not in ("folder", "merge")}
            write_json(part / MERGE_FILE, {**report.evidence(), "quantized": evidence})
    return result


def _require_format(name: str) -> QuantizedFormat:
    for known in FORMATS:
        if name == known:
            return known
    raise ConfigError(
        f"There is no format {shown(name)}", where="--quantize", fix=did_you_mean(name, FORMATS)
    )


# ------------------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class _Question:
    prompt_ids: list[int]
    reference: str
    most: int


def _questions(found: ResolvedAdapter, rows: Sequence[Row], tokenizer: LoadedTokenizer) -> list[_Question]:
    config = found.config
    most = config.evaluation.max_new_tokens if config else _NEW_TOKENS
    prompts = (encode_prompt(row, tokenizer.tokenizer) for row in rows[:_MOST_ANSWERS])
    return [_Question(prompt.prompt_ids, prompt.reference, most) for prompt in prompts if prompt is not None]


def _scored(
    model: Any,
    rows: Sequence[TokenizedRow],
    questions: Sequence[_Question],
    tokenizer: LoadedTokenizer,
    display: Display,
    *,
    folder: Path,
) -> Figures:
    loss = answer_loss(rows, answer_logits(model, rows, display))
    answers = (
        generate(
            model,
            [question.prompt_ids for question in questions],
            max_new_tokens=questions[0].most,
            stop_token_ids=tokenizer.stop_token_ids,
            pad_token_id=int(tokenizer.tokenizer.pad_token_id),
        )
        if questions
        else []
    )
    return Figures(
        loss=loss,
        exact_match=_share_of_matches(answers, questions, tokenizer),
        num_bytes=_weight_bytes(folder),
    )


def _share_of_matches(
    answers: Iterable[Sequence[int]], questions: Sequence[_Question], tokenizer: LoadedTokenizer
) -> float | None:
    def plain(text: str) -> str:
        return unicodedata.normalize("NFC", text).strip()

    matches = [
        plain(str(tokenizer.tokenizer.decode(list(answer), skip_special_tokens=True)))
        == plain(question.reference)
        for answer, question in zip(answers, questions, strict=True)
    ]
    return sum(matches) / len(matches) if matches else None


def _weight_bytes(folder: Path) -> int:
    kinds = (".safetensors", ".onnx", ".data", ".bin")
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in kinds)


# ---------------------------------------------------------------------------------------------- gptq and awq


def _pieces(
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
    return list(
        tokenize_rows(
            rows,
            tokenizer.tokenizer,
            train_on=found.train_on,
            max_length=found.max_length or _LENGTHS[0],
            training_template=tokenizer.training_template,
        ).rows
    )


def _write_packed(
    merged: Path,
    output: Path,
    tokenizer: LoadedTokenizer,
    pieces: Sequence[Tensor],
    *,
    format: str,
    device: str,
) -> None:
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


# ----------------------------------------------------------------------------------------------------- onnx


def _write_onnx(merged: Path, output: Path) -> None:
    """The builder is a program: its settings and what it leaves in the process stay its own."""
    cache = output / "cache"
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", str(merged), "-o", str(output), "-p", "int4", "-e", "cpu", "-c", str(cache)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    shutil.rmtree(cache, ignore_errors=True)
    if done.returncode or not (output / "genai_config.json").is_file():
        last = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:] or ["it says nothing"]
        raise EnvironmentProblem(
            f"onnxruntime-genai's builder cannot write this model: {last[0]}",
            where="--quantize",
            fix="merge without --quantize, or with another format",
        )


def _scored_onnx(
    folder: Path, rows: Sequence[TokenizedRow], questions: Sequence[_Question], tokenizer: LoadedTokenizer
) -> Figures:
    import onnxruntime_genai as genai

    try:
        model = genai.Model(str(folder))
    except RuntimeError as error:
        raise ModelError(f"What was written cannot be loaded: {error}", where=str(folder)) from error
    limit = int(
        json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["context_length"]
    )

    def start(ids: Sequence[int]) -> Any:
        settings = genai.GeneratorParams(model)
        settings.set_search_options(max_length=limit, do_sample=False)
        generator = genai.Generator(model, settings)
        generator.append_tokens(list(ids))
        return generator

    loss = answer_loss(rows, (_logits_of(start, row) for row in rows))
    answers = [_answer(start(one.prompt_ids), one.most, tokenizer.stop_token_ids) for one in questions]
    return Figures(
        loss=loss,
        exact_match=_share_of_matches(answers, questions, tokenizer),
        num_bytes=_weight_bytes(folder),
    )


def _logits_of(start: Callable[[Sequence[int]], Any], row: TokenizedRow) -> Tensor:
    """The logits (S, V) at the trained tokens of a row, each after all tokens before it."""
    trained = [place for place, label in enumerate(row.labels) if label != IGNORED and place]
    found: list[Tensor] = []
    generator = start(row.input_ids[: trained[0]]) if trained else None
    last = trained[-1] if trained else 0
    for place in range(trained[0], last + 1) if trained else ():
        assert generator is not None
        if row.labels[place] != IGNORED:
            found.append(torch.tensor(generator.get_logits()).float().reshape(-1))
        if place < last:
            generator.append_tokens([row.input_ids[place]])
    return torch.stack(found) if found else torch.zeros(0, 1)


def _answer(generator: Any, most: int, stop_token_ids: Sequence[int]) -> list[int]:
    answer: list[int] = []
    while len(answer) < most and not generator.is_done():
        generator.generate_next_token()
        token = int(generator.get_next_tokens()[0])
        if token in stop_token_ids:
            break
        answer.append(token)
    return answer
