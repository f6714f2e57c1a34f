"""What was exported, opened in its client and asked what the run's own model is asked."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import GenerationConfig

from phlora.adapters.load import load_adapter
from phlora.adapters.peft_folder import read_peft
from phlora.data.rows import Row
from phlora.errors import Finding, MissingExtraError, NoRoomError, shown
from phlora.export.agreement import (
    Answer,
    Bound,
    Client,
    Question,
    Verdict,
    compare_client,
    own_answers,
    questions_of,
    with_weights,
)
from phlora.export.gguf_file import load_gguf_weights
from phlora.export.gguf_vocabulary import model_name
from phlora.export.job import ExportJob, Written
from phlora.export.llamacpp_client import open_gguf
from phlora.export.output import require_room_for
from phlora.export.proof import answer_logits, answer_loss, tokenized_proof
from phlora.export.received import refused
from phlora.export.torch_client import open_adapter, open_model
from phlora.export.writing import base_weights, gguf_bytes, write_weights
from phlora.extras import install_command, is_installed
from phlora.models.device import DTYPES
from phlora.models.quantization import dequantize
from phlora.runs.reading import rows_or_held_out
from phlora.runs.resolve import load_as_trained, load_base

# What is accepted, by what the weights were rounded to. Of log-probabilities, in nats: both sides compute in float32
# (llama.cpp keeps keys and values in float16). Of weights: above half a unit in the last place of the floats, and above
# what the blocks of a type can be off by where all are as unlike their largest value as can be: n values with one of
# size M, in steps of d, are off by d sqrt(n / 12) / M of their norm (q8_0: d = M/127, n = 32; q6_k: M/32, 16; q5_k_m:
# 2M/31 with both ends there, 32; q4_k_m: 2M/15, 32). Of the loss, in nats a token: several times what was measured.
_BOUNDS = {
    "float32": Bound(largest=0.01),
    "float16": Bound(largest=0.1),
    "bfloat16": Bound(largest=0.5),
    "f32": Bound(largest=0.05, weights=1e-5, loss=0.01),
    "f16": Bound(largest=0.1, weights=2e-3, loss=0.02),
    "bf16": Bound(largest=0.5, weights=5e-3, loss=0.1),
    "q8_0": Bound(largest=0.5, weights=0.02, loss=0.1),
    "q6_k": Bound(largest=None, weights=0.05, loss=0.2),
    "q5_k_m": Bound(largest=None, weights=0.1, loss=0.3),
    "q4_k_m": Bound(largest=None, weights=0.2, loss=0.5),
}


def unverified(reason: str) -> Verdict:
    """The verdict where nothing was compared."""
    return Verdict(client="", verified=False, missing=reason)


def verify_export(job: ExportJob, folder: Path, written: Written) -> Verdict:
    """Compare the client's answers with those of the run's own model.

    Raises:
        Finding: what lay in the folder before cannot be opened.
    """
    if job.target == "loralib":
        with _readable(folder, written):
            return _read_again(job, folder / written.file)
    if not job.in_gguf:
        with _readable(folder, written):
            _require_stops(job, folder)
    rows = rows_or_held_out(job.found, job.rows, command="phlora export", option="--rows", **job.reading)
    if not rows:
        return unverified("there are no held-out rows; name some: --rows chats.jsonl")
    if job.in_gguf and not is_installed("xllamacpp"):
        return unverified(
            f"llama.cpp is not installed: {install_command(['xllamacpp'])}, then phlora export ... --verify-only"
        )
    questions, left_out = questions_of(
        rows, job.tokenizer, job.config, max_new_tokens=job.max_new_tokens, most=job.max_rows
    )
    if not questions:
        return unverified("no held-out prompt fits into the window and the original context")
    job.display.stage(f"Asking the run's own model {len(questions)} held-out prompts")
    measured = rows[: job.max_rows] if job.in_gguf and not job.adapter_only else []
    own, apart, losses = _own(job, questions, measured, folder, written)
    job.display.stage("Asking what was exported")
    bound = _BOUNDS[job.type or written.type or "float32"]
    with _readable(folder, written), _client(job, folder, written, questions) as client:
        verdict = compare_client(
            client,
            questions,
            own,
            max_new_tokens=job.max_new_tokens,
            bound=bound,
            num_left_out=left_out,
            missing=_not_asked(job, written),
        )
    return with_weights(verdict, bound, apart=apart, losses=losses)


def _require_stops(job: ExportJob, folder: Path) -> None:
    """Refuse generation settings that end replies elsewhere; few answers are long enough to show it."""
    stops = GenerationConfig.from_pretrained(str(folder), local_files_only=True).eos_token_id
    told = stops if isinstance(stops, list) else [stops]
    if set(told) != set(job.tokenizer.stop_token_ids):
        raise Finding(
            f"Replies end at {shown(told)} by what was exported, and at {shown(list(job.tokenizer.stop_token_ids))} "
            "by the run",
            where=str(folder / "generation_config.json"),
            fix="export it again",
        )


@contextmanager
def _readable(folder: Path, written: Written) -> Iterator[None]:
    """What others' readers raise over a folder that lay about is a finding; over one just written, a defect here."""
    try:
        yield
    except (MissingExtraError, NoRoomError, Finding):
        raise
    except Exception as error:
        if not written.received:
            raise
        raise refused(error, folder) from error


def _own(
    job: ExportJob, questions: Sequence[Question], rows: Sequence[Row], folder: Path, written: Written
) -> tuple[list[Answer], float | None, dict[str, float]]:
    """What the run's own model answers: base and adapter, computed in float32.

    On the base's own weights, or on the quantised ones where the adapter was merged into these.
    And how far the weights in a GGUF file are from the merged ones, and the loss on the rows with both.
    """
    if _is_as_trained(written):
        loaded = load_as_trained(job.found, tokenizer=job.tokenizer, device="cpu")
    else:
        stored = str(job.config.dtype).removeprefix("torch.")
        narrow = stored in DTYPES and DTYPES[stored].itemsize == 2
        loaded = load_base(
            job.found, tokenizer=job.tokenizer, device="cpu", storage_dtype=stored if narrow else "float32"
        )
    adapted = load_adapter(loaded.model, job.found.adapter)
    answers = own_answers(adapted.model, job.tokenizer, questions, max_new_tokens=job.max_new_tokens)
    apart, losses = None, {}
    if rows:
        tokenized = tokenized_proof(rows, job.found, job.tokenizer, adapted.model)
        losses["own"] = answer_loss(tokenized, answer_logits(adapted.model, tokenized, job.display))
        dequantize(adapted.model, dtype=torch.float32)
        model = adapted.model.merge_and_unload()
        with _readable(folder, written):
            apart = load_gguf_weights(model, folder / written.file)
        losses["file"] = answer_loss(tokenized, answer_logits(model, tokenized, job.display))
        del model
    del loaded, adapted
    gc.collect()
    return answers, apart, losses


def _is_as_trained(written: Written) -> bool:
    """Whether the adapter was merged into the weights of the quantised base that it was trained on."""
    return written.base == "dequantized"


def _not_asked(job: ExportJob, written: Written) -> str:
    """What the comparison leaves open."""
    if job.found.storage and not _is_as_trained(written):
        return f"Compared with the adapter on the full base; it was trained on one in {job.found.storage}"
    if job.target == "ollama":
        return "Ollama itself was not asked: its model was opened in llama.cpp, which it runs"
    if job.target in ("vllm", "sglang"):
        return f"{job.target} itself was not asked: the same folder was opened in PEFT, which reads what it reads"
    return ""


@contextmanager
def _client(
    job: ExportJob, folder: Path, written: Written, questions: Sequence[Question]
) -> Iterator[Client]:
    assert job.tokenizer.files is not None
    if job.target == "merged":
        yield open_model(folder)
    elif job.in_gguf:
        longest = max(len(question.prompt_ids) for question in questions) + job.max_new_tokens
        with _gguf_base(job, folder) as base:
            adapter = folder / written.file if job.adapter_only else None
            with open_gguf(base or folder / written.file, adapter=adapter, context=longest) as client:
                yield client
    else:
        yield open_adapter(folder, job.tokenizer.files.location, job.tokenizer.stop_token_ids)


@contextmanager
def _gguf_base(job: ExportJob, folder: Path) -> Iterator[Path | None]:
    """The base as GGUF for the time of the comparison, where an adapter alone was exported."""
    if not job.adapter_only:
        yield None
        return
    with TemporaryDirectory(prefix="phlora-base-") as scratch:
        weights = base_weights(job)
        require_room_for(Path(scratch), gguf_bytes(weights, job))
        file = Path(scratch) / "base.gguf"
        write_weights(job, file, weights, model_name("base", job.tokenizer))
        yield file


def _read_again(job: ExportJob, file: Path) -> Verdict:
    """A loralib file has no client of its own: its tensors are read again and compared bit by bit."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    for layer in read_peft(job.found.adapter).layers:
        for name, tensor in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            if not torch.equal(state[f"{layer.name}.{name}"], tensor):
                raise Finding(f"{layer.name}.{name} is not what was written", where=str(file))
    return Verdict(
        client="torch.load", verified=True, missing=f"{len(state)} tensors read again, equal to the bit"
    )
