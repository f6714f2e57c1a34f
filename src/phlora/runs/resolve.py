"""From what a command is given to base, adapter and tokenizer: the one place that decides, for every command.

    runs/a                              the run's best adapter, or its last one where nothing was held out
    runs/a/adapter                      the same
    runs/a/adapter/best, last           that one
    runs/a/checkpoints                  the newest complete checkpoint
    runs/a/checkpoints/checkpoint-40    that one
    a folder with adapter_config.json   that adapter; inside of a run with the run's base, settings and rows
    anything else                       a model without an adapter: folder, .gguf file, embedded name or hub id

The tokenizer is the one saved with the adapter, whose chat template is the one that was trained; the base's where an
adapter brings none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from phlora.adapters.load import load_adapter
from phlora.adapters.saved_facts import read_adapter_facts
from phlora.config import TRUST_VARIABLE, ModelConfig, QuantizationConfig, RunConfig, TrainOn, build_config
from phlora.display import Display
from phlora.errors import EnvironmentProblem, ModelError, NetworkError, RunError
from phlora.files import read_json
from phlora.models.device import choose_device
from phlora.models.fingerprint import split_fingerprint
from phlora.models.load import LoadedModel, load_model
from phlora.models.quantization import quantization_of
from phlora.models.tokenizer import LoadedTokenizer, ModelFiles, find_files, read_tokenizer
from phlora.parameters import require_path
from phlora.runs.checkpoints import COMPLETE_FILE
from phlora.runs.folder import BASE_LOCATION, HELD_OUT_FILE, RUN_FILE, RunFolder

_ADAPTER_CONFIG = "adapter_config.json"
_CHECKPOINT = "checkpoint-"


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A base model, the adapter on it, and the run that both are of.

    Attributes:
        source: as it was given.
        base: how the base is loaded, as the run asked for it; a device that this machine lacks became `auto`.
        adapter: its folder; None for a plain model.
        run: the run around the adapter; None where there is none.
        quantization: of the base while the adapter was trained, which its fingerprint tells.
        trained_dtype: what the quantised base was rounded from.
    """

    source: Path
    base: ModelConfig
    adapter: Path | None = None
    run: RunFolder | None = None
    quantization: QuantizationConfig | None = None
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def base_name(self) -> str:
        """The base as the user named it, which says nothing about where it lies on this machine."""
        was_named = self.base.name == _place_of(self.facts)
        return (_name_of(self.facts) if was_named else None) or self.base.name

    @property
    def config(self) -> RunConfig | None:
        """The run's configuration."""
        return _config_of(self.run, self.facts) if self.run else None

    @property
    def rows(self) -> Path | None:
        """The rows that the run held out."""
        return self.run.path / HELD_OUT_FILE if self.run else None

    @property
    def train_on(self) -> TrainOn:
        """Which tokens the run trained."""
        config = self.config
        return config.data.train_on if config else "assistant"

    @property
    def max_length(self) -> int | None:
        """The longest row of the run, in tokens."""
        found: int | None = self.facts.get("max_length")
        return found

    @property
    def trained_dtype(self) -> str:
        return str(self.facts.get("model", {}).get("dtype", "float32"))

    @property
    def storage(self) -> str:
        """What the base was quantised to while the adapter was trained; empty: it was not."""
        return self.quantization.type if self.quantization else ""


@dataclass(frozen=True, kw_only=True)
class ResolvedAdapter(Resolved):
    """What is certain to have an adapter."""

    adapter: Path


def resolve(source: str | os.PathLike[str], *, model: str | None = None, offline: bool = False) -> Resolved:
    """The base, the adapter and the run that a source means; see the module.

    Args:
        model: the base, in the place of the one that the run or the adapter names.
        offline: never ask a hub, whatever the run says.

    Raises:
        RunError: a run, or its folder of checkpoints, has no adapter yet; a checkpoint is incomplete.
        ModelError, RunError: files that say where to find things cannot be read.
        ConfigError: the source is neither a text nor a path.
    """
    require_path(source, where="source", expected="a run, an adapter or a model")
    path = Path(source).expanduser()
    adapter, run = _adapter_of(path)
    if adapter is None:
        return Resolved(source=path, base=ModelConfig(name=os.fspath(source), offline=offline))
    facts = run.facts() if run else {}
    base = _base_of(run, facts) if run else _named_base(adapter)
    if model is not None and model != base.name:
        base = ModelConfig(name=model)
    return Resolved(
        source=path,
        base=replace(base, offline=offline or base.offline),
        adapter=adapter,
        run=run,
        quantization=quantization_of(split_fingerprint(_fingerprint_of(adapter, facts))[1]),
        facts=facts,
    )


def resolve_adapter(
    source: str | os.PathLike[str],
    *,
    model: str | None = None,
    offline: bool = False,
    needs_base: bool = True,
) -> ResolvedAdapter:
    """`resolve` for a command that needs an adapter.

    Args:
        needs_base: refuse an adapter that does not say what its base is.

    Raises:
        RunError: there is neither a run nor an adapter.
        ModelError: the adapter does not say what its base is.
    """
    found = resolve(source, model=model, offline=offline)
    if found.adapter is None:
        raise RunError(
            "The folder holds neither a run nor an adapter"
            if found.source.is_dir()
            else "The folder does not exist",
            where=str(source),
            expected="a run or an adapter folder",
        )
    if needs_base:
        require_base(found)
    return ResolvedAdapter(**{name: getattr(found, name) for name in Resolved.__dataclass_fields__})


def require_base(found: Resolved) -> None:
    """Refuse an adapter that does not say what its base is.

    Raises:
        ModelError: see above; or the base of the run lies neither where it was nor where its name points to today.
    """
    place = _place_of(found.facts)
    if place and found.base.name == _name_of(found.facts) and not Path(found.base.name).expanduser().exists():
        raise ModelError(
            f"The base model of the run, `{found.base.name}`, is not there any more",
            where=place,
            fix="put it back, or where there is such an option name it: --model BASE",
        )
    if not found.base.name:
        raise ModelError(
            "The adapter does not say what its base model is",
            where=str((found.adapter or found.source) / _ADAPTER_CONFIG),
            expected="`base_model_name_or_path`",
            fix="write it there, or where there is such an option name it: --model BASE",
        )


def load_tokenizer_of(found: Resolved) -> LoadedTokenizer:
    """The tokenizer saved with the adapter, or the base's where there is none.

    Its notes say where an adapter's own writes chats, or ends replies, in another way than the base's.

    Raises:
        ModelError: its files, or the base's configuration, cannot be read.
        NetworkError: the base is not on this machine and no hub may or can be asked.
    """
    require_base(found)
    files = find_files(found.base)
    if found.adapter is None or not (found.adapter / "tokenizer_config.json").is_file():
        return read_tokenizer(files)
    own = read_tokenizer(files, folder=found.adapter)
    return replace(own, notes=own.notes + _other_than_base(own, files))


def _other_than_base(own: LoadedTokenizer, files: ModelFiles) -> tuple[str, ...]:
    """What decides about answers in the adapter's tokenizer, and is not as in the base's."""
    if files.location.source.kind == "gguf":
        # To read a tokenizer out of such a file takes many seconds.
        return ()
    try:
        base = read_tokenizer(files)
    except (ModelError, NetworkError) as problem:
        return (f"The adapter's tokenizer is not compared with its base's: {problem.found}",)
    found = []
    if own.tokenizer.chat_template != base.tokenizer.chat_template:
        found.append(
            "The adapter's chat template is not that of its base; chats are written by the adapter's"
        )
    if set(own.stop_token_ids) != set(base.stop_token_ids):
        ids = (", ".join(map(str, side.stop_token_ids)) for side in (own, base))
        found.append("The adapter's replies end at the tokens {}, those of its base at {}".format(*ids))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class LoadedPair:
    """A base with an adapter on it as they are used: to chat, to evaluate.

    Attributes:
        model: a `peft.PeftModel` where there is an adapter.
        tokenizer: the adapter's, or the base's where there is none.
        notes: what the user should hear.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: LoadedTokenizer
    notes: tuple[str, ...] = ()


def load_pair(
    found: Resolved, *, use_cache: bool | None = None, display: Display | None = None
) -> LoadedPair:
    """The base as the run asked for it, the adapter on it, and the tokenizer of both.

    Args:
        use_cache: in the place of the run's own setting.
        display: where the progress of reading a large model goes; nowhere by default.

    Raises:
        ModelError: one of them cannot be read, or the adapter is of another base.
    """
    tokenizer = load_tokenizer_of(found)
    base = found.base if use_cache is None else replace(found.base, use_cache=use_cache)
    loaded = load_model(base, tokenizer=tokenizer, display=display)
    if found.adapter is None:
        return LoadedPair(model=loaded.model, tokenizer=tokenizer, notes=loaded.notes)
    adapted = load_adapter(loaded.model, found.adapter)
    return LoadedPair(model=adapted.model, tokenizer=tokenizer, notes=loaded.notes + adapted.report.notes)


def load_base(
    found: Resolved,
    *,
    tokenizer: LoadedTokenizer | None = None,
    device: str,
    dtype: str = "float32",
    storage_dtype: str | None = None,
    quantization: QuantizationConfig | None = None,
    display: Display | None = None,
) -> LoadedModel:
    """The base of an adapter; by default in fp32, stored so, and not quantised."""
    return load_model(
        found.base,
        tokenizer=tokenizer,
        dtype=dtype,
        storage_dtype=storage_dtype or dtype,
        display=display,
        quantization=quantization,
        attn_implementation="auto",
        # It stands in the configuration that is saved, and chatting wants it.
        use_cache=True,
        device=device,
    )


def load_as_trained(found: Resolved, *, tokenizer: LoadedTokenizer, device: str) -> LoadedModel:
    """The quantised base, with the weights of the training; its products and all the rest in fp32."""
    assert found.quantization is not None
    exact = replace(found.quantization, compute_dtype="auto")
    loaded = load_base(
        found, tokenizer=tokenizer, device=device, dtype=found.trained_dtype, quantization=exact
    )
    loaded.model.float()
    return loaded


# ----------------------------------------------------------------------------------------- folders to adapters


def _adapter_of(path: Path) -> tuple[Path | None, RunFolder | None]:
    """The folder of the adapter that a path means, and the run around it."""
    if (path / RUN_FILE).is_file():
        run = RunFolder(path)
        return _kept_adapter(run.path / "adapter", run), run
    if _is_adapter(path):
        if path.name.startswith(_CHECKPOINT) and (run_of := _run_around(path, "checkpoints")):
            _require_complete(path)
            return path, run_of
        return path, _run_around(path, "adapter")
    if path.name.startswith(_CHECKPOINT) and path.is_dir() and _run_around(path, "checkpoints"):
        _require_complete(path)
    inside = RunFolder(path.resolve().parent)
    if path.is_dir() and (inside.path / RUN_FILE).is_file():
        run = RunFolder(path.parent) if (path.parent / RUN_FILE).is_file() else inside
        if path.resolve().name == "adapter":
            return _kept_adapter(path, run), run
        if path.resolve().name == "checkpoints":
            return _latest_checkpoint(run), run
    for kept in (path / "best", path / "last"):
        if _is_adapter(kept):
            return kept, None
    return None, None


def _is_adapter(folder: Path) -> bool:
    """An adapter, and not a whole model that has one beside it."""
    if not (folder / _ADAPTER_CONFIG).is_file():
        return False
    has_weights = any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    return not ((folder / "config.json").is_file() and has_weights)


def _kept_adapter(folder: Path, run: RunFolder) -> Path:
    for kept in (folder / "best", folder / "last", folder):
        if (kept / _ADAPTER_CONFIG).is_file():
            return kept
    raise _no_adapter(run)


def _latest_checkpoint(run: RunFolder) -> Path:
    latest = run.latest_checkpoint()
    if latest is None:
        raise _no_adapter(run)
    return latest


def _no_adapter(run: RunFolder) -> RunError:
    return RunError(
        f"The run has no adapter yet ({run.facts().get('status', 'unknown')})",
        where=str(run.path),
        fix="finish it: phlora train … --resume",
    )


def _require_complete(checkpoint: Path) -> None:
    if not (checkpoint / COMPLETE_FILE).is_file():
        raise RunError(
            "The checkpoint is incomplete: the run was stopped while it was written",
            where=str(checkpoint),
            fix="take an earlier one, or continue the run: phlora train … --resume",
        )


def _run_around(folder: Path, place: str) -> RunFolder | None:
    """The run that a folder lies in, at `run/place/folder`; links in the path do not hide it."""
    real = folder.resolve()
    run = real.parent.parent
    return RunFolder(run) if real.parent.name == place and (run / RUN_FILE).is_file() else None


# --------------------------------------------------------------------------------------------------- the base


def _base_of(run: RunFolder, facts: Mapping[str, Any]) -> ModelConfig:
    """The base model of a run as its configuration asked for it; the device may be another one today.

    A folder can come from somebody else, so its word alone never lets the code of a model run: whoever runs the
    command has to give theirs.
    """
    base = _config_of(run, facts).model
    base = replace(base, trust_remote_code=base.trust_remote_code and _code_is_trusted())
    place = _place_of(facts)
    if place and Path(place).exists() and Path(base.name).absolute() != Path(place):
        base = replace(base, name=place)
    try:
        choose_device(base.device)
    except EnvironmentProblem:
        return replace(base, device="auto", attn_implementation="auto")
    return replace(base, attn_implementation="auto")


def _code_is_trusted() -> bool:
    return os.environ.get(TRUST_VARIABLE, "") not in ("", "0")


def _place_of(facts: Mapping[str, Any]) -> str | None:
    """Where the base lay when the run began, of a run that named it from its working folder."""
    return _text_of_model(facts, BASE_LOCATION)


def _name_of(facts: Mapping[str, Any]) -> str | None:
    """The base as the run was given it."""
    return _text_of_model(facts, "name")


def _text_of_model(facts: Mapping[str, Any], name: str) -> str | None:
    value = facts.get("model", {}).get(name)
    return value if isinstance(value, str) else None


def _config_of(run: RunFolder, facts: Mapping[str, Any]) -> RunConfig:
    config = facts.get("config")
    if not isinstance(config, dict):
        raise RunError("The run does not say what its base model is", where=str(run.path / RUN_FILE))
    return build_config(config, facts.get("origins") or {})


def _named_base(adapter: Path) -> ModelConfig:
    facts = read_json(adapter / _ADAPTER_CONFIG, ModelError)
    base, revision = facts.get("base_model_name_or_path"), facts.get("revision")
    return ModelConfig(
        name=base if isinstance(base, str) else "", revision=revision if isinstance(revision, str) else None
    )


def _fingerprint_of(adapter: Path, facts: Mapping[str, Any]) -> str:
    """Of the base's weights, as the adapter says it, or the run that a checkpoint is of."""
    said: str | None = read_adapter_facts(adapter).get("base_fingerprint")
    return said or _text_of_model(facts, "fingerprint") or ""
