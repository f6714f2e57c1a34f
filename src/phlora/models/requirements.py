"""Which optional packages a model needs, so that all that are missing are named at once."""

from __future__ import annotations

from pathlib import Path

from phlora.config import ModelConfig
from phlora.extras import is_installed
from phlora.models.builtin import EMBEDDED, GGUF_FILE, is_converted, packages_of


def needed_by_model(model: ModelConfig) -> dict[str, str]:
    """The modules that loading this model takes, each with what needs it; for `extras.require`."""
    needs: dict[str, str] = {}
    if model.name in EMBEDDED:
        package = EMBEDDED[model.name].package
        if not (is_installed(package) and is_converted(model.name)):
            needs |= packages_of(model.name)
    elif Path(model.name).suffix == ".gguf":
        needs |= GGUF_FILE
    if model.quantization:
        needs["bitsandbytes"] = f"a base model in {model.quantization.type}"
    return needs
