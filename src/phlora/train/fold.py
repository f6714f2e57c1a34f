"""An adapter in other forms: converted, or merged into its base with the proof that nothing was lost.

For a merge the base is loaded in fp32, whatever it was trained in, so that both sides of the proof compute alike and
differ only by the rounding of the weights that were saved. Both see the same real rows, and are compared where it
matters: at the tokens of the answers.

An adapter that was trained on a quantised base has two bases to go into: the full one, whose weights were never
rounded, and the dequantised one, dense with the rounded weights. The adapter has also learned to make up for the
rounding, so which is better is measured: the loss of both, merged, beside that of the adapter where it was trained.
One merged model waits, in the dtype that is saved, while the other is made: never more than two are in memory.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from phlora.adapters.convert import (
    BLOCK_NAMES,
    Adapter,
    BlockSizes,
    read_loralib,
    read_peft,
    read_peft_config,
    read_peft_tensors,
    write_loralib,
    write_peft,
    write_peft_tensors,
)
from phlora.adapters.merge import BOUNDS, LogitDifferences, fold_adapter
from phlora.config import ModelConfig, QuantizationConfig, TrainOn, build_config
from phlora.data.formats import Row, load_rows
from phlora.data.tokenize import TokenizedRow, tokenize_rows
from phlora.display import Display
from phlora.errors import (
    ConfigError,
    DataError,
    Finding,
    ModelError,
    NoRoomError,
    RunError,
    did_you_mean,
)
from phlora.files import read_json, replaced_file, replaced_folder, write_json
from phlora.models.fingerprint import split_fingerprint
from phlora.models.head import IGNORED, trunk_and_head
from phlora.models.load import (
    ADAPTER_FACTS,
    DTYPES,
    LoadedModel,
    LoadedTokenizer,
    load_adapter,
    load_model,
    prepare_tokenizer,
)
from phlora.models.phi3 import context_lengths, fused_row_blocks
from phlora.models.quantized import dequantize, quantization_of
from phlora.models.sources import locate, reading, resolve_source
from phlora.train.checkpoints import RUN_FILE, RunFolder
from phlora.train.planning import HELD_OUT_FILE

MERGE_FILE = "merge.json"
MergeBase = Literal["auto", "full", "dequantized"]
MERGE_BASES: tuple[MergeBase, ...] = ("auto", "full", "dequantized")
# Logits of one model over all rows; those of two are in memory at once.
_LOGITS_BYTES = 256 << 20
_LORALIB_SUFFIXES = (".pt", ".pth", ".bin")
# Configuration, tokenizer, chat template and card of an adapter; no optimizer states.
_SIDE_FILES = (".json", ".jinja", ".txt", ".model", ".md")
# A block-diagonal B of q, k and v is three times as wide.
_LARGEST_GROWTH = 3
# Tokenizer, configuration and report, which do not grow with the model.
_SMALL_FILES_BYTES = 50_000_000


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What was merged, and how its logits differ from those of base and adapter.

    Attributes:
        folder: the model folder that was written.
        base_model, adapter: what was merged.
        dtype: of the saved weights.
        base: `full` or `dequantized`: the weights that the adapter was merged into.
        why: the reason for that base.
        storage: what the base was quantised to while the adapter was trained; empty: it was not.
        losses: of the answers in the rows compared, in nats per token. `adapter`: base and adapter as they were
            trained; `full`, `dequantized`: merged into that base, in the dtype that is saved.
        num_modules: modules whose weights changed.
        num_rows: rows compared.
        num_tokens: answer tokens compared, each with its whole vocabulary of logits.
        changed_tokens: tokens at which the most likely one is another.
        largest_difference, mean_difference: of the logits, absolute.
        largest_logit: the scale that `bound_largest` refers to.
        bound_largest: accepted largest difference, as a share of the largest logit.
        bound_changed: accepted share of changed tokens (one always is).
    """

    folder: str
    base_model: str
    adapter: str
    dtype: str
    base: str
    why: str
    storage: str
    losses: dict[str, float]
    num_modules: int
    num_rows: int
    num_tokens: int
    changed_tokens: int
    largest_difference: float
    mean_difference: float
    largest_logit: float
    bound_largest: float
    bound_changed: float

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    def evidence(self) -> dict[str, Any]:
        """The fields that say nothing about where things lie on this machine."""
        return {name: value for name, value in self.to_json().items() if name not in ("folder", "adapter")}

    def summary(self) -> str:
        """A few lines for people."""
        share = self.largest_difference / self.largest_logit if self.largest_logit else 0.0
        into = (
            f"{self.base_model}, dequantised from {self.storage}" if self.base != "full" else self.base_model
        )
        labels = {
            "adapter": "loss with the adapter",
            "full": "loss, full base" if self.storage else "loss, merged",
            "dequantized": "loss, dequantized base",
        }
        remarks = {
            "adapter": f" on the {self.storage} base, as trained",
            "full": " merged",
            "dequantized": " merged",
        }
        return "\n".join(
            [
                f"{self.num_modules} modules merged into {into}, saved in {self.dtype}",
                *([f"  why this base           {self.why}"] if self.storage else []),
                *(
                    f"  {labels[name]:<24}{loss:.4f}{remarks[name] if self.storage else ''}"
                    for name, loss in self.losses.items()
                ),
                f"  rows compared           {self.num_rows:,} ({self.num_tokens:,} answer tokens)",
                f"  largest difference      {self.largest_difference:.3g} "
                f"({share:.2g} of the largest logit; accepted: {self.bound_largest:g})",
                f"  mean difference         {self.mean_difference:.3g}",
                f"  changed greedy tokens   {self.changed_tokens} of {self.num_tokens:,} "
                f"(accepted: 1, or {self.bound_changed:.1%})",
            ]
        )


@dataclass(frozen=True, kw_only=True)
class _Source:
    """An adapter and its base model; of a run also the rows that it held out, and how they are tokenised.

    `quantization` is that of the base while the adapter was trained, and `trained_dtype` what it was rounded from.
    """

    adapter: Path
    base: ModelConfig
    rows: Path | None = None
    train_on: TrainOn = "assistant"
    max_length: int | None = None
    quantization: QuantizationConfig | None = None
    trained_dtype: str = "float32"

    @property
    def storage(self) -> str:
        return self.quantization.type if self.quantization else ""


def merge_run(
    source: str | Path,
    output: str | Path,
    *,
    base: MergeBase = "auto",
    model: str | None = None,
    dtype: str = "auto",
    rows: Any = None,
    max_rows: int = 64,
    device: str = "auto",
    offline: bool = False,
    display: Display | None = None,
) -> MergeReport:
    """Fold an adapter into its 16- or 32-bit base, save the whole model, and prove it on real rows.

    The folder holds weights (safetensors), configuration, tokenizer with chat template, and a generation
    configuration with every stop token; stock transformers loads it. What was saved is loaded again and compared
    with base and adapter, both computed in fp32; beyond `phlora.adapters.merge.BOUNDS` nothing is left behind.

    An adapter that was trained on a quantised base is compared with the model that the merge is meant to reproduce:
    merged into the dequantised base, with the adapter on the quantised one; merged into the full base, with the
    adapter on the full one. How far these two models are from each other, the losses tell.

    Args:
        source: a run folder (its best adapter is taken), or an adapter folder.
        output: the new folder; it may not hold anything yet.
        base: for an adapter that was trained on a quantised base: merge into the `full` or the `dequantized` one;
            `auto` measures the loss of both and saves the one with the lower. Any other adapter has the full one.
        model: the base, in the place of the one that the run or the adapter names.
        dtype: of the saved weights: `auto` for that of the base's own files, or a key of `DTYPES`.
        rows: file(s) or rows for the proof, in the place of the run's held-out rows.
        max_rows: at most so many of them.
        device: where to compute, as in `load_model`.

    Raises:
        Finding: the merged model differs from base and adapter by more than the bound.
        ConfigError: an unknown base, dtype or device, or `dequantized` for an adapter of a base that was dense.
        RunError: the run has no adapter, or the output folder is taken.
        ModelError: base and adapter do not fit, or the adapter changes tied embeddings.
        DataError: there are no rows for the proof.
        NoRoomError: the disk has no room for the model.
        MissingExtraError: the base was quantised, and bitsandbytes is not installed.
    """
    display = display or Display()
    output = Path(output).expanduser()
    require_new(output)
    found = _find(Path(source).expanduser(), model=model, offline=offline)
    _require_base(base, found)
    saved_dtype = _saved_dtype(found.base, dtype)
    chosen = _load_rows(found, rows)[:max_rows]

    display.stage(f"Loading {found.base.name} in float32, and its adapter")
    loaded = _load(found.base, device)
    _tell(loaded, display)
    _require_room(output, loaded.model.num_parameters() * DTYPES[saved_dtype].itemsize)
    tokenizer = _tokenizer_of(found.adapter, loaded)
    compared = _tokenize(chosen, found, tokenizer, loaded.model)

    how = _How(rows=compared, dtype=DTYPES[saved_dtype], choosing=bool(found.storage), display=display)
    merged = {"full": _merge(loaded, found.adapter, how)}
    if found.storage:
        display.stage(f"Loading {found.base.name} in {found.storage}, as it was trained")
        loaded = _load_as_trained(found, device)
        merged["dequantized"] = _merge(loaded, found.adapter, how)
    as_trained = merged.get("dequantized", merged["full"])
    losses = {"adapter": _loss(compared, as_trained.reference)}
    losses |= {name: candidate.loss for name, candidate in merged.items() if candidate.loss is not None}
    into, why = _choose(base, losses)

    with replaced_folder(output) as part:
        display.stage(f"Saving it in {saved_dtype}")
        kept = merged[into]
        _save(kept.model, tokenizer, part)
        reference, num_modules = kept.reference, kept.num_modules
        # The saved model is loaded in the room of these.
        del merged, as_trained, kept, loaded
        gc.collect()

        display.stage("Loading what was saved, and comparing")
        again = _load(replace(found.base, name=str(part), revision=None, offline=True), device)
        logits = list(_answer_logits(again.model, compared, display))
        losses[into] = _loss(compared, logits)
        differences = LogitDifferences()
        for before, after in zip(reference, logits, strict=True):
            differences.add(before, after)
        report = MergeReport(
            folder=str(output),
            base_model=found.base.name,
            adapter=str(found.adapter),
            dtype=saved_dtype,
            base=into,
            why=why,
            storage=found.storage,
            losses=losses,
            num_modules=num_modules,
            num_rows=len(compared),
            num_tokens=differences.num_tokens,
            changed_tokens=differences.changed_tokens,
            largest_difference=differences.largest,
            mean_difference=differences.mean,
            largest_logit=differences.scale,
            bound_largest=BOUNDS[saved_dtype].largest,
            bound_changed=BOUNDS[saved_dtype].changed,
        )
        _require_kept(differences, report)
        write_json(part / MERGE_FILE, report.evidence())
    return report


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """What was converted.

    Attributes:
        output: the folder or file that was written.
        format: `peft` or `loralib`.
        num_tensors: tensors of the input; every one was used.
        layers: how the layers of each kind have to be built in loralib to take the weights; empty for a copy.
    """

    output: str
    format: str
    num_tensors: int
    layers: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    def summary(self) -> str:
        """A few lines for people."""
        head = f"{self.num_tensors} tensors converted to {self.format}: {self.output}"
        return "\n".join([head, *(f"  {line}" for line in self.layers)])


def convert(
    source: str | Path,
    output: str | Path,
    *,
    to: Literal["peft", "loralib"],
    lora_alpha: float | None = None,
    enable: Sequence[str] = (),
    blocks: BlockSizes | None = None,
    kernels: Mapping[str, Sequence[int]] | None = None,
    model: str | None = None,
    offline: bool = False,
) -> ConvertReport:
    """Convert an adapter between loralib's state dict and PEFT's folder without losing a bit.

    Args:
        source: a loralib file (`.pt`), a PEFT adapter folder, or a run folder (its best adapter is taken).
        output: a new folder (`peft`), or a new file (`loralib`).
        lora_alpha: that of the layers of a loralib file, which does not know it.
        enable: the row blocks that are adapted, such as `q` and `v`, where shapes leave several possibilities.
        blocks: last part of a layer's name -> rows of its blocks by name; by default those of `model`.
        kernels: last part of a convolution's name in a loralib file -> its kernel, (3, 3) for one of 3 x 3.
        model: the base model; its configuration gives the blocks, and its name is written down.

    Raises:
        ModelError: the source is no adapter, cannot be opened safely, or has tensors without a place.
        ConfigError: `lora_alpha` or the blocks are missing, not needed, or do not fit.
        RunError: the output exists.
        NoRoomError: the disk has no room.
    """
    source, output = Path(source).expanduser(), Path(output).expanduser()
    require_new(output)
    if to == "loralib" and output.is_dir():
        raise RunError("A folder stands where the file should be", where=str(output), fix="name a file")
    if blocks is None and model is not None:
        blocks = fused_row_blocks(_config_of(ModelConfig(name=model, offline=offline)))
    if _is_loralib(source):
        adapter = _read_loralib(source, lora_alpha, enable, blocks, kernels)
    else:
        _refuse_options(lora_alpha, () if to == "loralib" else enable, kernels)
        source = _find(source, model=model, offline=offline, needs_base=False).adapter
        if to == "peft":
            return _copy_peft(source, output)
        adapter = read_peft(source, enable=enable, blocks=blocks)
    _require_room(output, _LARGEST_GROWTH * sum(t.nbytes for t in adapter.tensors()))
    if to == "peft":
        with replaced_folder(output) as part:
            write_peft(adapter, part, base_model=model)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(output) as part:
            write_loralib(adapter, part)
    return ConvertReport(
        output=str(output), format=to, num_tensors=len(adapter.tensors()), layers=tuple(adapter.describe())
    )


def convert_to_model(
    source: str | Path,
    output: str | Path,
    *,
    lora_alpha: float | None = None,
    enable: Sequence[str] = (),
    blocks: BlockSizes | None = None,
    model: str | None = None,
    **how: Any,
) -> MergeReport:
    """`merge_run` (which takes `how`) for a loralib file too; the other arguments are those of `convert`."""
    if not _is_loralib(Path(source)):
        _refuse_options(lora_alpha, enable)
        return merge_run(source, output, model=model, **how)
    if model is None:
        raise ConfigError(
            "A loralib file does not say what its base model is",
            where=str(source),
            fix="name it: --model BASE",
        )
    options = {"lora_alpha": lora_alpha, "enable": enable, "blocks": blocks}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        convert(source, folder, to="peft", model=model, offline=how.get("offline", False), **options)
        return replace(merge_run(folder, output, model=model, **how), adapter=str(source))


def parse_blocks(texts: Sequence[str]) -> dict[str, dict[str, int]] | None:
    """`qkv_proj=64,32,32` -> {"qkv_proj": {"q_proj": 64, "k_proj": 32, "v_proj": 32}}; None for no text.

    Blocks of a layer whose blocks have no known names are called 0, 1, 2 ...

    Raises:
        ConfigError: a text of another form, or another number of blocks than the layer has.
    """
    parsed = {}
    for text in texts:
        layer, _, listed = text.partition("=")
        sizes = [int(size) if size.strip().isdecimal() else 0 for size in listed.split(",")]
        names = BLOCK_NAMES.get(layer) or tuple(str(i) for i in range(len(sizes)))
        if not layer or min(sizes) < 1 or len(names) != len(sizes):
            raise ConfigError(
                f"`{text}` was given",
                where="--blocks",
                expected=f"a layer and the rows of its blocks ({', '.join(names)}), "
                "such as qkv_proj=3072,1024,1024",
            )
        parsed[layer] = dict(zip(names, sizes, strict=True))
    return parsed or None


def parse_kernels(texts: Sequence[str]) -> dict[str, tuple[int, ...]] | None:
    """`conv1=3,3` -> {"conv1": (3, 3)}; None for no text.

    Raises:
        ConfigError: a text of another form.
    """
    parsed = {}
    for text in texts:
        layer, _, listed = text.partition("=")
        kernel = tuple(int(size) if size.strip().isdecimal() else 0 for size in listed.split(","))
        if not layer or min(kernel) < 1 or len(kernel) > 3:
            raise ConfigError(
                f"`{text}` was given",
                where="--kernel",
                expected="a convolution and the sizes of its kernel, such as conv1=3,3",
            )
        parsed[layer] = kernel
    return parsed or None


def _refuse_options(
    lora_alpha: float | None, enable: Sequence[str], kernels: Mapping[str, Sequence[int]] | None = None
) -> None:
    if kernels:
        raise ConfigError("An adapter folder knows its own kernels", where="--kernel", fix="leave it out")
    if lora_alpha is not None:
        raise ConfigError(
            "An adapter folder knows its own lora_alpha", where="--lora-alpha", fix="leave it out"
        )
    if enable:
        raise ConfigError(
            "An adapter folder is plain PEFT, which knows no blocks", where="--enable", fix="leave it out"
        )


def _is_loralib(source: Path) -> bool:
    source = source.expanduser()
    return source.is_file() or (source.suffix in _LORALIB_SUFFIXES and not source.is_dir())


def _read_loralib(
    file: Path,
    lora_alpha: float | None,
    enable: Sequence[str],
    blocks: BlockSizes | None,
    kernels: Mapping[str, Sequence[int]] | None = None,
) -> Adapter:
    if lora_alpha is None:
        raise ConfigError(
            "A loralib file does not say with which lora_alpha its layers were built",
            where=str(file),
            fix="name it: --lora-alpha 32",
        )
    return read_loralib(file, lora_alpha=lora_alpha, enable=enable, blocks=blocks, kernels=kernels)


def _copy_peft(source: Path, output: Path) -> ConvertReport:
    """What is saved is plain PEFT already; a pickle becomes safetensors."""
    read_peft_config(source)
    tensors = read_peft_tensors(source)
    _require_room(output, sum(t.nbytes for t in tensors.values()))
    with replaced_folder(output) as part:
        for file in sorted(source.iterdir()):
            if file.suffix in _SIDE_FILES and file.is_file():
                shutil.copy(file, part)
        write_peft_tensors(tensors, part)
    return ConvertReport(output=str(output), format="peft", num_tensors=len(tensors))


# ---------------------------------------------------------------------------------------- what is merged


def _find(source: Path, *, model: str | None, offline: bool, needs_base: bool = True) -> _Source:
    found = _of_run(source) if (source / RUN_FILE).is_file() else _of_adapter(source)
    base = found.base
    if model is not None and model != base.name:
        base = ModelConfig(name=model)
    file = found.adapter / ADAPTER_FACTS
    fingerprint = (read_json(file, ModelError).get("base_fingerprint") or "") if file.is_file() else ""
    if needs_base and not base.name:
        raise ModelError(
            "The adapter does not say what its base model is",
            where=str(source / "adapter_config.json"),
            fix="name it: --model BASE",
        )
    return replace(
        found,
        base=replace(base, offline=offline or base.offline),
        quantization=quantization_of(split_fingerprint(fingerprint)[1]),
    )


def _of_run(run: Path) -> _Source:
    folder = RunFolder(run)
    facts = folder.facts()
    adapter = next((path for path in (folder.best_adapter, folder.last_adapter) if path.is_dir()), None)
    if adapter is None:
        raise RunError(
            f"The run has no adapter yet ({facts.get('status')})", where=str(run), fix="train it first"
        )
    config = build_config(facts["config"], facts["origins"])
    return _Source(
        adapter=adapter,
        base=config.model,
        rows=folder.path / HELD_OUT_FILE,
        train_on=config.data.train_on,
        max_length=facts["max_length"],
        trained_dtype=facts["model"]["dtype"],
    )


def _of_adapter(folder: Path) -> _Source:
    """An adapter folder; one that lies in a run folder has that run's base and rows."""
    run = folder.resolve().parent.parent
    if folder.resolve().parent.name == "adapter" and (run / RUN_FILE).is_file():
        return replace(_of_run(run), adapter=folder)
    if not folder.is_dir():
        raise RunError("The folder does not exist", where=str(folder), expected="a run or an adapter folder")
    if not (folder / "adapter_config.json").is_file():
        raise RunError("The folder holds neither a run nor an adapter", where=str(folder))
    facts = read_json(folder / "adapter_config.json", ModelError)
    base = facts.get("base_model_name_or_path") or ""
    return _Source(adapter=folder, base=ModelConfig(name=base, revision=facts.get("revision")))


def _load(
    base: ModelConfig,
    device: str,
    *,
    dtype: str = "float32",
    quantization: QuantizationConfig | None = None,
) -> LoadedModel:
    return load_model(
        base.name,
        dtype=dtype,
        quantization=asdict(quantization) if quantization else None,
        # It stands in the configuration that is saved, and chatting wants it.
        use_cache=True,
        revision=base.revision,
        offline=base.offline,
        trust_remote_code=base.trust_remote_code,
        device=device,
    )


def _load_as_trained(found: _Source, device: str) -> LoadedModel:
    """The quantised base, with the weights of the training; its products and all the rest in fp32."""
    assert found.quantization is not None
    exact = replace(found.quantization, compute_dtype="auto")
    loaded = _load(found.base, device, dtype=found.trained_dtype, quantization=exact)
    loaded.model.float()
    return loaded


def _tokenizer_of(adapter: Path, base: LoadedModel) -> LoadedTokenizer:
    """The tokenizer saved with the adapter, whose chat template is the one that was trained; or the base's."""
    if not (adapter / "tokenizer_config.json").is_file():
        return base.tokenizer
    location = locate(
        replace(base.source, name=str(adapter), kind="folder", location=str(adapter)), offline=True
    )
    with reading(location, "The adapter's tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(location.path, **location.kwargs)
    return prepare_tokenizer(
        tokenizer, config=base.model.config, generation_config=base.model.generation_config
    )


# --------------------------------------------------------------------------------------------- the merging


@dataclass(frozen=True, kw_only=True)
class _How:
    """Rows to measure on, the dtype that is saved, and whether several merged models are to choose from."""

    rows: Sequence[TokenizedRow]
    dtype: torch.dtype
    choosing: bool
    display: Display


@dataclass(frozen=True, kw_only=True)
class _Merged:
    """A merged model in the dtype that is saved, its loss, and the logits of the model that it has to equal."""

    model: Any
    num_modules: int
    reference: list[Tensor]
    loss: float | None


def _merge(loaded: LoadedModel, adapter: Path, how: _How) -> _Merged:
    """The model with the adapter in its weights, made in place; a quantised one becomes dense."""
    adapted = load_adapter(loaded.model, adapter)
    if not how.choosing:
        for note in adapted.report.notes:
            how.display.note(note)
    how.display.stage(f"Running base and adapter on {len(how.rows)} rows")
    reference = list(_answer_logits(adapted.model, how.rows, how.display))
    dequantize(adapted.model, dtype=torch.float32)
    model, num_modules = fold_adapter(adapted.model)
    loss = None
    if how.choosing:
        how.display.stage("Running the merged model")
        for parameter in model.parameters():
            parameter.data = parameter.data.to(how.dtype).float()
        loss = _loss(how.rows, _answer_logits(model, how.rows, how.display))
    return _Merged(model=model.to(how.dtype), num_modules=num_modules, reference=reference, loss=loss)


def _require_base(base: str, found: _Source) -> None:
    if base not in MERGE_BASES:
        raise ConfigError(f"There is no base `{base}`", where="--base", fix=did_you_mean(base, MERGE_BASES))
    if base == "dequantized" and not found.storage:
        raise ConfigError(
            "The adapter was not trained on a quantised base, so there is none to dequantise",
            where="--base",
            fix="leave it out",
        )


def _choose(base: MergeBase, losses: Mapping[str, float]) -> tuple[str, str]:
    """The base to merge into, and why."""
    if "dequantized" not in losses:
        return "full", "the base that the adapter was trained on"
    lower = min(("dequantized", "full"), key=lambda name: losses[name])
    if base == "auto":
        return lower, f"of both merged models the {lower} one has the lower loss"
    if base == lower:
        return base, "asked for; it also has the lower loss"
    return base, f"asked for, although {lower} has the lower loss"


def _tell(loaded: LoadedModel, display: Display) -> None:
    for note in loaded.notes:
        display.note(note)


# ---------------------------------------------------------------------------------------- what is written


def require_new(output: Path) -> None:
    """Refuse an output that exists: nobody's files are replaced.

    Raises:
        RunError: a file, or a folder that is not empty.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise RunError("The output exists already", where=str(output), fix="name another --output")


def _saved_dtype(base: ModelConfig, requested: str) -> str:
    """The key of `DTYPES` to save in; by default that of the base's own files."""
    if requested in DTYPES:
        return requested
    if requested != "auto":
        raise ConfigError(
            f"There is no dtype `{requested}`",
            where="--dtype",
            fix=did_you_mean(requested, ["auto", *DTYPES]),
        )
    stored = str(_config_of(base).dtype).removeprefix("torch.")
    return stored if stored in DTYPES else "float32"


def _config_of(base: ModelConfig) -> PreTrainedConfig:
    location = locate(resolve_source(base.name, revision=base.revision), offline=base.offline)
    with reading(location, "The configuration"):
        return AutoConfig.from_pretrained(
            location.path, trust_remote_code=base.trust_remote_code, **location.kwargs
        )


def _require_room(output: Path, tensor_bytes: int) -> None:
    needed = tensor_bytes + _SMALL_FILES_BYTES
    existing = next(p for p in output.absolute().parents if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise NoRoomError(
            f"The output takes {needed / 1e6:,.0f} MB; {free / 1e6:,.0f} MB are free",
            where=str(existing),
            fix="make room, or name an --output on another disk",
        )


def _save(model: Any, tokenizer: LoadedTokenizer, folder: Path) -> None:
    """Everything that stock transformers needs to load the model and to end its replies."""
    pad = tokenizer.tokenizer.pad_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = pad
    model.generation_config.eos_token_id = list(tokenizer.stop_token_ids)
    if type(model).__module__.startswith("transformers."):
        # It would point to code files that are not in the folder.
        vars(model.config).pop("auto_map", None)
    with _no_bars():
        model.save_pretrained(folder)
    tokenizer.tokenizer.save_pretrained(folder)


@contextmanager
def _no_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


# ---------------------------------------------------------------------------------------------- the proof


def _load_rows(found: _Source, rows: Any) -> list[Row]:
    if rows is not None:
        return load_rows(rows).rows
    if found.rows is None or not found.rows.is_file() or not found.rows.stat().st_size:
        raise DataError(
            "There are no rows to prove the merge on"
            + (": the run held none out" if found.rows else ": an adapter alone brings none"),
            where=str(found.adapter),
            fix="name a file with chats that the model is meant for: --rows chats.jsonl",
        )
    return load_rows(found.rows).rows


def _tokenize(
    rows: Sequence[Row], found: _Source, tokenizer: LoadedTokenizer, model: Any
) -> list[TokenizedRow]:
    """The rows as tokens, as many as there is room for the logits of."""
    tokenized = tokenize_rows(
        rows,
        tokenizer.tokenizer,
        train_on=found.train_on,
        max_length=found.max_length or context_lengths(model.config).max_tokens,
        training_template=tokenizer.training_template,
    ).rows
    room = _LOGITS_BYTES // (4 * model.config.vocab_size)
    totals = accumulate(row.num_trained_tokens for row in tokenized)
    kept = [row for row, total in zip(tokenized, totals, strict=True) if total <= room]
    return kept or tokenized[:1]


@torch.no_grad()
def _answer_logits(model: Any, rows: Sequence[TokenizedRow], display: Display) -> Iterator[Tensor]:
    """The logits (S, V) at the trained tokens of each row, in fp32 on the CPU."""
    trunk, head = trunk_and_head(model)
    device = next(model.parameters()).device
    with display.progress("Rows", len(rows)) as advance:
        for row in rows:
            ids = torch.tensor([row.input_ids], device=device)
            predicts = torch.tensor(row.labels[1:], device=device) != IGNORED
            hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
            yield head(hidden[predicts]).float().cpu()
            advance(1)


def _loss(rows: Sequence[TokenizedRow], logits: Iterable[Tensor]) -> float:
    """Mean cross-entropy of the answers' tokens, in nats."""
    total, count = 0.0, 0
    for row, predicted in zip(rows, logits, strict=True):
        targets = torch.tensor([label for label in row.labels[1:] if label != IGNORED])
        total += F.cross_entropy(predicted.double(), targets, reduction="sum").item()
        count += len(targets)
    return total / max(1, count)


def _require_kept(differences: LogitDifferences, report: MergeReport) -> None:
    if not differences.keeps(BOUNDS[report.dtype]):
        wider = "save in --dtype float32, or use" if report.dtype != "float32" else "use"
        raise Finding(
            "The merged model does not answer like base and adapter; nothing was kept\n" + report.summary(),
            where=report.folder,
            fix=f"{wider} the adapter unmerged",
        )
