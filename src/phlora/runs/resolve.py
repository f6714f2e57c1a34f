"""Where an adapter comes from: a run or a folder, the base model that it belongs to, and the rows that prove it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from phlora.config import ModelConfig, QuantizationConfig, TrainOn, build_config
from phlora.errors import ModelError, RunError
from phlora.files import ADAPTER_FACTS, read_json
from phlora.models.fingerprint import split_fingerprint
from phlora.models.load import LoadedModel, load_model
from phlora.models.locate import locate, reading, resolve_source
from phlora.models.quantization import quantization_of
from phlora.models.tokenizer import LoadedTokenizer, prepare_tokenizer
from phlora.runs.folder import HELD_OUT_FILE, RUN_FILE, RunFolder


@dataclass(frozen=True, kw_only=True)
class AdapterSource:
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


def find_adapter(source: Path, *, model: str | None, offline: bool, needs_base: bool = True) -> AdapterSource:
    """The adapter of a run, or of a folder, with the base that it belongs to.

    Args:
        source: a run folder (its best adapter is taken), or an adapter folder.
        model: the base, in the place of the one that the run or the adapter names.
        needs_base: refuse an adapter that does not say what its base is.

    Raises:
        RunError: there is neither a run nor an adapter, or the run has no adapter yet.
        ModelError: the adapter does not say what its base is, or its files cannot be read.
    """
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


def _of_run(run: Path) -> AdapterSource:
    folder = RunFolder(run)
    facts = folder.facts()
    adapter = next((path for path in (folder.best_adapter, folder.last_adapter) if path.is_dir()), None)
    if adapter is None:
        raise RunError(
            f"The run has no adapter yet ({facts.get('status')})", where=str(run), fix="train it first"
        )
    config = build_config(facts["config"], facts["origins"])
    return AdapterSource(
        adapter=adapter,
        base=config.model,
        rows=folder.path / HELD_OUT_FILE,
        train_on=config.data.train_on,
        max_length=facts["max_length"],
        trained_dtype=facts["model"]["dtype"],
    )


def _of_adapter(folder: Path) -> AdapterSource:
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
    return AdapterSource(adapter=folder, base=ModelConfig(name=base, revision=facts.get("revision")))


def load_base(
    base: ModelConfig,
    device: str,
    *,
    dtype: str = "float32",
    quantization: QuantizationConfig | None = None,
) -> LoadedModel:
    """The base of an adapter; by default in fp32."""
    # use_cache stands in the configuration that is saved, and chatting wants it.
    return load_model(base, dtype=dtype, quantization=quantization, use_cache=True, device=device)


def load_as_trained(found: AdapterSource, device: str) -> LoadedModel:
    """The quantised base, with the weights of the training; its products and all the rest in fp32."""
    assert found.quantization is not None
    exact = replace(found.quantization, compute_dtype="auto")
    loaded = load_base(found.base, device, dtype=found.trained_dtype, quantization=exact)
    loaded.model.float()
    return loaded


def tokenizer_of(adapter: Path, base: LoadedModel) -> LoadedTokenizer:
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


def config_of(base: ModelConfig) -> PreTrainedConfig:
    """The configuration of a base model, without its weights."""
    location = locate(resolve_source(base.name, revision=base.revision), offline=base.offline)
    with reading(location, "The configuration"):
        return AutoConfig.from_pretrained(
            location.path, trust_remote_code=base.trust_remote_code, **location.kwargs
        )
