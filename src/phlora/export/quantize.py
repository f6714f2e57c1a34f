"""A merged model in 4 bits, for programs that run such models, with what the rounding cost on held-out rows.

gptq, awq   auto-round tunes the rounding of every linear layer of the blocks on chats, and packs it in the layout of
            that name, which transformers, vLLM and others load (`export.packed`)
int4-onnx   onnxruntime-genai's builder writes a graph for ONNX Runtime; it rounds to the nearest and reads no chats
            (`export.onnx`)

The chats are the run's own, never a hub's. Before and after, the same held-out rows are scored: the loss of the
answers, and the share that is answered word for word.
"""

from __future__ import annotations

import gc
import shutil
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

from phlora.data.prompts import encode_prompt
from phlora.data.rows import Row
from phlora.data.tokenize import TokenizedRow
from phlora.display import Display
from phlora.errors import ConfigError, did_you_mean, shown
from phlora.export.merge import MERGE_FILE, MergeReport, merge_run
from phlora.export.onnx import onnx_answer, onnx_logits, onnx_starts, write_onnx
from phlora.export.output import require_new, require_room_for
from phlora.export.packed import pieces_to_tune_on, write_packed
from phlora.export.proof import answer_logits, answer_loss, proof_rows, tokenized_proof
from phlora.extras import require
from phlora.files import ADAPTER_FACTS, replaced_folder, write_json
from phlora.models.generate import generate
from phlora.models.load import load_model
from phlora.models.tokenizer import LoadedTokenizer
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
                write_onnx(merged, part)
            else:
                pieces, calibration = pieces_to_tune_on(found, tokenizer, compared)
                write_packed(merged, part, tokenizer, pieces, format=wanted, device=device)
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
    return _figures(loss, answers, questions, tokenizer, folder)


def _scored_onnx(
    folder: Path, rows: Sequence[TokenizedRow], questions: Sequence[_Question], tokenizer: LoadedTokenizer
) -> Figures:
    start = onnx_starts(folder)
    loss = answer_loss(rows, (onnx_logits(start, row) for row in rows))
    answers = [
        onnx_answer(start, one.prompt_ids, most=one.most, stop_token_ids=tokenizer.stop_token_ids)
        for one in questions
    ]
    return _figures(loss, answers, questions, tokenizer, folder)


def _figures(
    loss: float,
    answers: Iterable[Sequence[int]],
    questions: Sequence[_Question],
    tokenizer: LoadedTokenizer,
    folder: Path,
) -> Figures:
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
