"""An adapter put on its base model: refused where it was trained on other weights, or where a tensor has no place."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, PeftModelForCausalLM
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from phlora.adapters.base_view import keep_before_load, keep_loaded, restore_base, widen_what_trains
from phlora.adapters.peft_folder import write_fitted
from phlora.adapters.portable import is_of_other_layout
from phlora.adapters.saved_config import read_adapter_config, require_fitting
from phlora.adapters.saved_facts import read_adapter_facts
from phlora.adapters.tensor_files import not_finite
from phlora.errors import ModelError
from phlora.files import ADAPTER_FACTS
from phlora.measure import is_out_of_memory
from phlora.models.fingerprint import are_same, identity_of, split_fingerprint
from phlora.models.locate import first_line, path_advice
from phlora.others import without_known_warnings

_CONFIG_FILE = "adapter_config.json"
_OTHER_LAYOUT = (
    "The adapter is of a base in another layout (fused weights on one side, q_proj, k_proj, ... on the other); it was "
    "carried over exactly, and the weights that it was trained on cannot be compared"
)
# What PEFT raises for a configuration that does not go with a model.
_NOT_TAKEN = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError)


@dataclass(frozen=True, kw_only=True)
class AdapterReport:
    """What was read from an adapter folder.

    Attributes:
        num_tensors: tensors in the file; every one was used.
        delta_norm: root of the summed squares of all lora_B tensors; at 0 the adapter changes nothing.
        base_model: the base's name as the adapter records it.
        notes: what the user should hear.
    """

    num_tensors: int
    delta_norm: float
    base_model: str | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LoadedAdapter:
    """A base model with an adapter on it (a `peft.PeftModel`), and what was read."""

    model: PeftModel
    report: AdapterReport


def load_adapter(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    trainable: bool = False,
    allow_zero: bool = False,
) -> LoadedAdapter:
    """Put a plain PEFT adapter on a base model, in place, or leave the base model as it was and say why not.

    Args:
        model: the base, without an adapter.
        folder: with adapter_config.json and adapter_model.safetensors; one for the twin of this base in Llama layout,
            or in Phi-3's, is carried over.
        trainable: whether its parameters require gradients.
        allow_zero: accept an adapter that changes nothing, as a fresh one.

    Raises:
        ModelError: no adapter there, another base, unused or missing tensors, or a zero delta.
    """
    path = Path(folder).expanduser()
    file, _ = _adapter_file(path)
    if not is_of_other_layout(_layers_of(file), model.config):
        return _load(model, path, trainable=trainable, allow_zero=allow_zero)
    with TemporaryDirectory() as scratch:
        write_fitted(path, Path(scratch), model.config)
        loaded = _load(model, Path(scratch), trainable=trainable, allow_zero=allow_zero)
    return replace(loaded, report=replace(loaded.report, notes=(_OTHER_LAYOUT,)))


def _load(model: PreTrainedModel, path: Path, *, trainable: bool, allow_zero: bool) -> LoadedAdapter:
    """`load_adapter`, with module names that are the model's own."""
    file, values = _adapter_file(path)
    shapes, delta_norm = _survey_adapter(file)
    if delta_norm == 0 and not allow_zero:
        raise ModelError("The adapter changes nothing: every lora_B is zero", where=str(file))
    notes = _compare_base(model, path)
    require_fitting(values, model, shapes, where=str(path / _CONFIG_FILE))
    try:
        config = PeftConfig.from_pretrained(str(path))
        config.inference_mode = not trainable
        widen_what_trains(model, config)
        kept = keep_before_load(model, config) if isinstance(config, LoraConfig) else {}
        with without_known_warnings():
            adapted = PeftModelForCausalLM(model, config)
    except _NOT_TAKEN as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"The adapter does not fit ({first_line(error)})", where=str(path)) from error
    keep_loaded(adapted, kept)
    with ExitStack() as failing:
        failing.callback(restore_base, adapted)
        failing.callback(adapted.unload)
        _fill(adapted, path, trainable=trainable, num_tensors=len(shapes), where=str(file))
        failing.pop_all()
    report = AdapterReport(
        num_tensors=len(shapes), delta_norm=delta_norm, base_model=config.base_model_name_or_path, notes=notes
    )
    return LoadedAdapter(model=adapted, report=report)


def _fill(model: PeftModel, folder: Path, *, trainable: bool, num_tensors: int, where: str) -> None:
    """Load the tensors into the adapter that was made for them."""
    try:
        result = model.load_adapter(str(folder), "default", is_trainable=trainable)
    except KeyError as error:
        raise ModelError(f"The adapter lacks the tensor {error.args[0]}", where=where) from error
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"The adapter's sizes do not fit the model ({first_line(error)})", where=where
        ) from error
    _require_all_used(result, num_tensors, where=where)


def _adapter_file(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    """The file of an adapter's tensors, and what its configuration says."""
    if not folder.is_dir():
        raise ModelError("The adapter's folder does not exist", where=str(folder), fix=path_advice(folder))
    file = folder / "adapter_model.safetensors"
    missing = [path.name for path in (folder / _CONFIG_FILE, file) if not path.is_file()]
    if missing:
        raise ModelError(f"The folder holds no adapter: it lacks {' and '.join(missing)}", where=str(folder))
    return file, read_adapter_config(folder / _CONFIG_FILE)


def _layers_of(file: Path) -> set[str]:
    """The names of the layers in an adapter's file."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name.partition(".lora_")[0] for name in tensors.keys()}  # noqa: SIM118  (it is no mapping)
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> ModelError:
    return ModelError(
        f"The adapter cannot be read ({first_line(error)})",
        where=str(file),
        fix="the file may be incomplete: copy it again",
    )


def _survey_adapter(file: Path) -> tuple[dict[str, tuple[int, ...]], float]:
    """The shape of each tensor in an adapter file, and the norm of all its lora_B.

    Raises:
        ModelError: the file cannot be read, or a tensor in it is not finite.
    """
    shapes, squares = {}, []
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (it is no mapping)
                tensor = tensors.get_tensor(name)
                shapes[name] = tuple(tensor.shape)
                # NaN and infinity survive a sum of squares, so that one pass tells both.
                squared = tensor.double().pow(2).sum().item()
                if not math.isfinite(squared):
                    raise not_finite(name, str(file))
                if "lora_B" in name:
                    squares.append(squared)
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from error
    return shapes, sum(squares) ** 0.5


def _compare_base(model: PreTrainedModel, folder: Path) -> tuple[str, ...]:
    """Refuse an adapter of other weights; a note where that cannot be told."""
    recorded = read_adapter_facts(folder).get("base_fingerprint")
    if not recorded:
        return ("The adapter does not say which weights it was trained on, so they are not compared",)
    base = identity_of(model)
    same, trained_storage = are_same(recorded, base), split_fingerprint(recorded)[1]
    if same:
        return () if trained_storage == base.storage else (_other_storage(trained_storage, base.storage),)
    if same is None:
        return (
            "Whether the adapter was trained on exactly these weights cannot be told: one side was rounded to 16 bits",
        )
    raise ModelError(
        "The adapter was trained on other weights than these",
        where=str(folder / ADAPTER_FACTS),
        expected=f"a base with the fingerprint {recorded}, not {base}",
        fix="load the adapter's own base model, in the revision that it was trained on",
    )


def _other_storage(trained: str, here: str) -> str:
    names = [f"the {storage} form" if storage else "the unquantised form" for storage in (trained, here)]
    return f"The adapter was trained on {names[0]} of these weights and sits on {names[1]}: compare its loss on both"


def _require_all_used(result: Any, num_tensors: int, *, where: str) -> None:
    unused, missing = result.unexpected_keys, result.missing_keys
    if unused:
        raise ModelError(
            f"{len(unused)} of {num_tensors} tensors unused: the model has no place for {unused[0]}",
            where=where,
            expected="an adapter whose module names are those of the model",
            fix="convert the adapter to the model's own module names first",
        )
    if missing:
        raise ModelError(f"The adapter lacks {len(missing)} tensors, such as {missing[0]}", where=where)
