"""An adapter merged into its base, with the proof that nothing was lost.

The base is loaded in fp32, whatever it was trained in, so that both sides of the proof compute alike and differ only by
the rounding of the weights that were saved. Both see the same real rows, and are compared where it matters: at the
tokens of the answers.

An adapter that was trained on a quantised base has two bases to go into: the full one, whose weights were never
rounded, and the dequantised one, dense with the rounded weights. The adapter has also learned to make up for the
rounding, so which is better is measured: the loss of both, merged, beside that of the adapter where it was trained.
One merged model waits, in the dtype that is saved, while the other is made: never more than two are in memory.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from phlora.adapters.load import load_adapter
from phlora.adapters.merge import BOUNDS, LogitDifferences, fold_adapter
from phlora.config import MergeBase
from phlora.data.tokenize import TokenizedRow
from phlora.display import Display
from phlora.errors import ConfigError, Finding, did_you_mean
from phlora.export.output import require_new, require_room_for, save_model
from phlora.export.proof import answer_logits, answer_loss, proof_rows, tokenized_proof
from phlora.files import ADAPTER_FACTS, replaced_folder, write_json
from phlora.models.device import DTYPES
from phlora.models.load import LoadedModel, load_model
from phlora.models.quantization import dequantize
from phlora.models.tokenizer import LoadedTokenizer
from phlora.parameters import require_count, require_path
from phlora.runs.resolve import (
    ResolvedAdapter,
    load_as_trained,
    load_base,
    load_tokenizer_of,
    resolve_adapter,
)
from phlora.runs.system_prompt import SYSTEM_PROMPTS, system_prompts_of

MERGE_FILE = "merge.json"
MERGE_BASES: tuple[MergeBase, ...] = get_args(MergeBase)


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


def merge_run(
    source: str | Path,
    output: str | Path,
    *,
    base: MergeBase = "auto",
    model: str | None = None,
    dtype: str = "auto",
    rows: Any = None,
    max_rows: int = 64,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
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
        max_rows: at most so many of them, one at least.
        format, columns: how files named in `rows` are read, in the place of the run's own settings.
        device: where to compute, as in `load_model`.
        offline: never ask a hub for the base.
        display: where progress goes; standard error by default.

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
    require_count(max_rows, where="max_rows")
    require_path(output, where="output", expected="the new folder")
    output = Path(output).expanduser()
    require_new(output)
    found = resolve_adapter(source, model=model, offline=offline)
    _require_base(base, found)
    _require_dtype(dtype)
    chosen = proof_rows(found, rows, format=format, columns=columns)[:max_rows]

    display.stage(f"Loading {found.base_name} in float32, and its adapter")
    tokenizer = load_tokenizer_of(found)
    own = _own_dtype(tokenizer)
    saved_dtype = own if dtype == "auto" else dtype
    stored = _storage(found, saved_dtype, own=own)
    loaded = load_base(found, tokenizer=tokenizer, device=device, storage_dtype=stored, display=display)
    _tell(loaded, display)
    require_room_for(output, loaded.model.num_parameters() * DTYPES[saved_dtype].itemsize)
    compared = tokenized_proof(chosen, found, tokenizer, loaded.model)

    how = _How(rows=compared, dtype=DTYPES[saved_dtype], choosing=bool(found.storage), display=display)
    merged = {"full": _merge(loaded, found.adapter, how)}
    if found.storage:
        display.stage(f"Loading {found.base_name} in {found.storage}, as it was trained")
        loaded = load_as_trained(found, tokenizer=tokenizer, device=device)
        merged["dequantized"] = _merge(loaded, found.adapter, how)
    as_trained = merged.get("dequantized", merged["full"])
    losses = {"adapter": answer_loss(compared, as_trained.reference)}
    losses |= {name: candidate.loss for name, candidate in merged.items() if candidate.loss is not None}
    into, why = _choose(base, losses)

    with replaced_folder(output) as part:
        display.stage(f"Saving it in {saved_dtype}")
        kept = merged[into]
        save_model(kept.model, tokenizer, part)
        if prompts := system_prompts_of(found):
            write_json(
                part / ADAPTER_FACTS, {"base_model": found.base_name, SYSTEM_PROMPTS: prompts.to_json()}
            )
        reference, num_modules = kept.reference, kept.num_modules
        # The saved model is loaded in the room of these.
        del merged, as_trained, kept, loaded
        gc.collect()

        display.stage("Loading what was saved, and comparing")
        again = load_model(str(part), dtype="float32", device=device, offline=True)
        logits = list(answer_logits(again.model, compared, display))
        losses[into] = answer_loss(compared, logits)
        differences = LogitDifferences()
        for before, after in zip(reference, logits, strict=True):
            differences.add(before, after)
        report = MergeReport(
            folder=str(output),
            base_model=found.base_name,
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
    reference = list(answer_logits(adapted.model, how.rows, how.display))
    dequantize(adapted.model, dtype=torch.float32)
    model, num_modules = fold_adapter(adapted.model)
    loss = None
    if how.choosing:
        how.display.stage("Running the merged model")
        for parameter in model.parameters():
            parameter.data = parameter.data.to(how.dtype).float()
        loss = answer_loss(how.rows, answer_logits(model, how.rows, how.display))
    return _Merged(model=model.to(how.dtype), num_modules=num_modules, reference=reference, loss=loss)


def _require_base(base: str, found: ResolvedAdapter) -> None:
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


def _storage(found: ResolvedAdapter, saved_dtype: str, *, own: str) -> str:
    """What the base is stored as while the adapter is merged, computed with in float32.

    Its own 16 bits where they are saved too: each sum is formed in float32 and rounded once to them either way.
    """
    narrow = own == saved_dtype and DTYPES[saved_dtype].itemsize == 2
    return saved_dtype if narrow and not found.storage else "float32"


def _require_dtype(requested: str) -> None:
    if requested not in ("auto", *DTYPES):
        raise ConfigError(
            f"There is no dtype `{requested}`",
            where="--dtype",
            fix=did_you_mean(requested, ["auto", *DTYPES]),
        )


def _own_dtype(tokenizer: LoadedTokenizer) -> str:
    """The key of `DTYPES` that the base's own files are in; float32 for any other."""
    assert tokenizer.files is not None
    stored = str(tokenizer.files.config.dtype).removeprefix("torch.")
    return stored if stored in DTYPES else "float32"


def _require_kept(differences: LogitDifferences, report: MergeReport) -> None:
    if not differences.keeps(BOUNDS[report.dtype]):
        wider = "save in --dtype float32, or use" if report.dtype != "float32" else "use"
        raise Finding(
            "The merged model does not answer like base and adapter; nothing was kept\n" + report.summary(),
            where=report.folder,
            fix=f"{wider} the adapter unmerged",
        )
