"""What configurations of several tools have in common."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phlora.importing.settings import ANYWAY, Settings, cleaned, exists
from phlora.train.fields import HONOURED, MAPPED, REFUSED

# Of transformers, which Phlora trains with.
_SCHEDULES = (
    *("linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial"),
    *("inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr", "warmup_stable_decay"),
)
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor")
# AdamW with its states in 8 bits or paged: for an adapter, whose states are small, there is nothing to gain.
_SMALL_STATES = (
    *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("adamw_hf", "adamw_apex_fused", "adamw_torch_8bit", "adamw_torch_4bit", "adamw_anyprecision"),
)
_ATTENTION = {"sdpa": "sdpa", "sdp": "sdpa", "eager": "eager", "disabled": "eager"}

TEMPLATE = "the model's own chat template is used; `phlora data preview` shows what is trained"
PRECISION = "model.dtype: auto takes bfloat16 where this machine is fast in it; say it to have it anyway"
CHECKPOINTING = (
    "training_config.activation_memory: auto keeps what fits and computes the rest again, to the same bits"
)
ONE_PROCESS = "a run is one process"
NOT_SENT = "nothing is sent to a hub: `hf upload REPO RUN/adapter/best` does"
FLASH = "model.attn_implementation: auto takes flash attention where it is installed"
KERNELS = "faster kernels of that tool; Phlora has its own, which compute the same"
HELD_OUT = 0.1
_SPLIT = re.compile(r"\w+(?:\.\w+)*")
_DATA_FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zip", ".xlsx")


def optimizer(settings: Settings, key: str, name: str | None) -> None:
    """The name of an optimizer, where transformers has it."""
    if name is None:
        return
    word = name.rpartition(".")[2] if "." in name else name
    if word in _OPTIMIZERS:
        settings.put("training_config.optim", word, key)
    elif word.lower() in _SMALL_STATES:
        remark = f"in place of {word}: the optimizer's states are those of the adapter alone, which is small"
        settings.put("training_config.optim", "adamw_torch", key, remark)
    else:
        settings.miss(key, name, "Phlora trains with AdamW unless training_config.optim says otherwise")


def schedule(settings: Settings, key: str, name: str | None) -> None:
    """The name of a schedule, where transformers has it."""
    if name in _SCHEDULES:
        settings.put("training_config.lr_scheduler_type", name, key)
    elif name is not None:
        settings.miss(key, name, "no schedule of transformers; the one named here takes its place")


def warmup(settings: Settings, ratio: str, steps: str) -> None:
    """Warm-up as steps or as a share of them; steps count where both are given, as in transformers."""
    share, number = settings.number(ratio), settings.number(steps, whole=True)
    if number:
        settings.put("training_config.warmup_steps", number, steps)
        if share:
            settings.leave_value(ratio, share, f"{steps} counts where both are given")
    elif share is not None and share < 1:
        settings.put(
            "training_config.warmup_steps", float(share) if share else 0, ratio, "a share of all steps"
        )
    elif share is not None:
        raise settings.error(ratio, share, "a share of all steps, below 1")
    elif number is not None:
        settings.put("training_config.warmup_steps", 0, steps)


def held_out(settings: Settings, key: str, size: int | float | None) -> None:
    """Rows that are kept for the proof; one without any cannot show that it helped."""
    if size is not None and size < 0:
        raise settings.error(key, size, "0 or more")
    if size:
        settings.put("data.eval_size", size, key)
        return
    remark = f"{settings.tool} would train on all rows; these are kept for the proof. 0 trains on them too"
    settings.put("data.eval_size", HELD_OUT, key if size is not None else "", remark)


def targets(settings: Settings, key: str, names: list[str] | None) -> None:
    """Modules that are adapted; Phlora adapts q, k, v, gate and up inside fused weights too."""
    if names is None:
        return
    if names in (["all"], ["all-linear"], ["all_linear"]):
        settings.put("peft_config.target_modules", "all-linear", key)
    else:
        settings.put("peft_config.target_modules", names, key)


def attention(settings: Settings, key: str, word: str | None) -> None:
    """The kind of attention by another tool's word."""
    if word is None:
        return
    if word in _ATTENTION:
        settings.put("model.attn_implementation", _ATTENTION[word], key)
    else:
        settings.leave_value(key, word, FLASH)


def numbers(settings: Settings, table: Mapping[str, str], *, whole: bool = False) -> None:
    """Numbers that have the same meaning under Phlora's name."""
    for key, target in table.items():
        settings.put(target, settings.number(key, whole=whole), key)


def arguments_of_transformers(settings: Settings) -> None:
    """What is left of a file with all fields of TrainingArguments: done with each what a run does with it."""
    for key in [key for key in settings.values if key in HONOURED]:
        settings.put(f"training_config.{key}", settings.take(key), key)
    for key in [key for key in settings.values if key in MAPPED]:
        settings.leave(key, MAPPED[key])
    for key in [key for key in settings.values if key in REFUSED]:
        if settings.values[key] in REFUSED[key].harmless:
            settings.leave(key, ANYWAY)
        else:
            settings.look_at(key, REFUSED[key].fix)


def split_of(settings: Settings, key: str) -> tuple[str | None, int | None]:
    """The split that is read, where it is not `train`, and of how many rows: `train[:100]` is a slice of 100."""
    text = settings.text(key) or "train"
    name, bracket, slice_ = text.partition("[")
    limit = re.fullmatch(r":(\d+)\]", slice_)
    if not _SPLIT.fullmatch(name) or (bracket and (limit is None or int(limit[1]) < 1)):
        settings.miss(key, text, "a slice of a split: say `limit` beside the file")
        return None, None
    return None if name == "train" else name, int(limit[1]) if limit is not None else None


def base_model(settings: Settings, key: str, name: str | None) -> str:
    """The name of the model that is tuned."""
    if not name:
        raise settings.error(key, name, "the name or the folder of the base model")
    settings.put("model.name", name, key)
    return str(settings.mapped["model.name"].value)


def located(settings: Settings, key: str, name: str) -> str:
    """A data file as it is named from here: as written, beside the configuration, or in a folder above it."""
    folders = [Path(), *Path(settings.file).resolve().parents]
    for folder in folders:
        if exists(folder / name):
            return str(folder / name) if folder != Path() else name
    if not is_hub_name(name):
        settings.notes.append(f"{key}: {cleaned(name)} is not there, neither from here nor beside the file")
    return name


def is_hub_name(name: str) -> bool:
    """Whether a name looks like one on the hub and not like a file."""
    owner, slash, rest = name.partition("/")
    is_file = Path(rest).suffix.lower() in _DATA_FILES or owner in (".", "..", "~") or "\\" in name
    return bool(slash and owner and rest) and "/" not in rest and not is_file


def data_file(path: str, **fields: Any) -> dict[str, Any]:
    """An entry of `data.files`, without what it does not need to say."""
    kept = {name: value for name, value in fields.items() if value}
    return {"path": path, **kept}


def columns_of(pairs: Mapping[str, str | None]) -> dict[str, str]:
    """`columns` of a file: Phlora's name -> the file's, where they differ."""
    return {new: old for new, old in pairs.items() if old and old != new}


def quantized_base(settings: Settings, value: Any, source: str, model: str) -> None:
    """A base in 4 or 8 bits, unless its files are so already."""
    if model.lower().rstrip("/").endswith(("-bnb-4bit", "-bnb-8bit")):
        if source:
            settings.leave_value(source, value, f"{model} is quantised in its files")
    elif source:
        settings.put("model.quantization", value, source)
    else:
        settings.put_default("model.quantization", value)
