"""An adapter written as each target takes it, with all that its program needs besides weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import GenerationConfig

from phlora.adapters.loralib_file import write_loralib
from phlora.adapters.peft_folder import read_peft, read_peft_config, read_portable, write_portable
from phlora.adapters.portable import PortableAdapter, fitted, more_than_plain, require_plain, uniform
from phlora.adapters.saved_facts import read_adapter_facts
from phlora.config import ModelConfig
from phlora.errors import ModelError
from phlora.export.convert import convert
from phlora.export.gguf_file import (
    Weights,
    merged_weights,
    require_architecture,
    write_gguf_adapter,
    write_gguf_model,
)
from phlora.export.gguf_types import encoded_shape, tensor_type
from phlora.export.gguf_vocabulary import model_name
from phlora.export.job import ExportJob, Written
from phlora.export.merge import merge_run
from phlora.export.ollama import modelfile
from phlora.export.output import require_inside, require_room_for
from phlora.files import ADAPTER_FACTS, read_json, write_json, write_text
from phlora.models.checkpoint import open_checkpoint
from phlora.models.tokenizer import find_files
from phlora.runs.resolve import load_base
from phlora.runs.system_prompt import SYSTEM_PROMPTS, system_prompts_of


def write_export(job: ExportJob, folder: Path) -> Written:
    """Write it for its target.

    Raises:
        ModelError: the target cannot take this adapter or model.
        NoRoomError: the disk has no room.
    """
    if job.target == "merged":
        return _write_merged(job, folder)
    if job.in_gguf:
        return _write_gguf(job, folder)
    if job.target == "loralib":
        return _write_loralib(job, folder)
    return _write_adapter(job, folder)


def _write_adapter(job: ExportJob, folder: Path) -> Written:
    """For PEFT and what reads its folders: as it is, or in the uniform form."""
    if job.target == "peft":
        convert(job.source, folder, to="peft", model=job.model, offline=job.offline)
        return Written(rank=read_peft_config(folder).r)
    adapter = fitted(_plain(job, takes=job.target), job.config)
    notes: tuple[str, ...] = ()
    if job.uniform:
        adapter = uniform(adapter)
        notes = (
            f"All layers have rank {adapter.largest_rank}, padded with zeros, and the scaling in lora_B",
        )
    require_room_for(folder, adapter.num_bytes)
    facts = {key: value for key, value in read_adapter_facts(job.found.adapter).items() if key != "blocks"}
    write_portable(adapter, folder, base_model=job.found.base_name, facts=facts)
    return Written(rank=adapter.largest_rank, notes=notes)


def _write_loralib(job: ExportJob, folder: Path) -> Written:
    adapter = read_peft(job.found.adapter)
    require_room_for(folder, sum(tensor.nbytes for tensor in adapter.tensors()))
    file = f"{job.title}.pt"
    write_loralib(adapter, folder / file)
    notes = ("Build its layers so:", *(f"  {line}" for line in adapter.describe()))
    return Written(file=file, rank=max(layer.r for layer in adapter.layers), notes=notes)


def _write_merged(job: ExportJob, folder: Path) -> Written:
    report = merge_run(
        job.source,
        folder,
        model=job.model,
        dtype=job.type or "auto",
        rows=job.rows,
        offline=job.offline,
        display=job.display,
        **job.reading,
    )
    return Written(type=report.dtype, base=report.base)


def _write_gguf(job: ExportJob, folder: Path) -> Written:
    require_architecture(job.config)
    name = model_name(job.title, job.tokenizer)
    if job.adapter_only:
        adapter = fitted(_plain(job, takes="llama.cpp"), job.config)
        require_room_for(folder, 2 * adapter.num_bytes)
        write_gguf_adapter(folder / job.gguf_name, adapter, job.config, name=name)
        return Written(file=job.gguf_name, rank=adapter.largest_rank)
    with _merged(job) as source:
        require_room_for(folder, gguf_bytes(source.weights, job))
        write_weights(job, folder / job.gguf_name, source.weights, name)
        notes = source.notes
    if job.target == "ollama":
        text, more = modelfile(job.gguf_name, job.tokenizer, system=_system_prompt(job), context=job.context)
        write_text(folder / "Modelfile", text)
        notes += more
    return Written(file=job.gguf_name, type=job.type, base=source.base, notes=notes)


def write_weights(job: ExportJob, file: Path, weights: Weights, name: str) -> None:
    """Write the tensors that are given as a whole GGUF model."""
    with job.display.progress("Tensors", len(weights.shapes)) as advance:
        write_gguf_model(
            file, weights, job.config, job.tokenizer, file_type=job.type, name=name, advance=advance
        )


@dataclass(frozen=True, kw_only=True)
class _Source:
    """The tensors of the merged model, and how they came about."""

    weights: Weights
    base: str = "full"
    notes: tuple[str, ...] = ()


@contextmanager
def _merged(job: ExportJob) -> Iterator[_Source]:
    """The merged model: tensor by tensor where that is exact, else by `merge_run` first."""
    assert job.tokenizer.files is not None
    checkpoint = open_checkpoint(job.tokenizer.files.location)
    adapter = read_portable(job.found.adapter)
    why = _why_not_streamed(job, adapter)
    if checkpoint is not None and not why:
        yield _Source(weights=merged_weights(checkpoint, fitted(adapter, job.config)))
        return
    with TemporaryDirectory(prefix="phlora-merged-") as scratch:
        merged = Path(scratch) / "model"
        report = merge_run(
            job.source,
            merged,
            model=job.model,
            dtype="float32",
            rows=job.rows,
            offline=job.offline,
            display=job.display,
            **job.reading,
        )
        whole = open_checkpoint(find_files(ModelConfig(name=str(merged), offline=True)).location)
        assert whole is not None
        told = f"Merged as a whole model first: {why or 'its base lies in no safetensors files'}"
        yield _Source(weights=merged_weights(whole, None), base=report.base, notes=(told,))


def base_weights(job: ExportJob) -> Weights:
    """The tensors of the base alone."""
    assert job.tokenizer.files is not None
    checkpoint = open_checkpoint(job.tokenizer.files.location)
    if checkpoint is not None:
        return merged_weights(checkpoint, None)
    state = load_base(job.found, tokenizer=job.tokenizer, device="cpu").model.state_dict()
    return Weights(shapes={name: tuple(t.shape) for name, t in state.items()}, read=state.__getitem__)


def _why_not_streamed(job: ExportJob, adapter: PortableAdapter) -> str:
    if job.found.storage:
        return f"it was trained on a base in {job.found.storage}"
    more = more_than_plain(adapter)
    return f"the adapter has {more}" if more else ""


def gguf_bytes(weights: Weights, job: ExportJob) -> int:
    """At most what the tensors take in the file."""
    total = 0
    for name, shape in weights.shapes.items():
        kind = tensor_type(name, shape, job.type, layer=None, num_layers=1, is_head=True)
        total += encoded_shape(shape, kind)[2]
    return total


def _plain(job: ExportJob, *, takes: str) -> PortableAdapter:
    adapter = read_portable(job.found.adapter)
    require_plain(adapter, target=takes, where=str(job.found.adapter))
    return adapter


def _system_prompt(job: ExportJob) -> str | None:
    prompts = system_prompts_of(job.found)
    text: str | None = prompts.text if prompts else None
    return text


def write_companions(job: ExportJob, folder: Path) -> None:
    """What a client needs besides weights: tokenizer, template, generation settings, the system prompt."""
    if job.target != "merged" and not job.in_gguf:
        if not (folder / "tokenizer_config.json").is_file():
            job.tokenizer.tokenizer.save_pretrained(folder)
        GenerationConfig(
            eos_token_id=list(job.tokenizer.stop_token_ids),
            pad_token_id=int(job.tokenizer.tokenizer.pad_token_id),
        ).save_pretrained(folder)
        card = job.found.adapter / "README.md"
        if card.is_file() and not (folder / card.name).is_file():
            shutil.copy(require_inside(card, job.found.adapter), folder / card.name)
    prompts = system_prompts_of(job.found)
    file = folder / ADAPTER_FACTS
    if prompts and job.target != "loralib":
        facts = read_json(file, ModelError) if file.is_file() else {"base_model": job.found.base_name}
        write_json(file, {SYSTEM_PROMPTS: prompts.to_json(), **facts})
