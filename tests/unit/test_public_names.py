"""Public names and their signatures are stable, documented on docs/api.md, and that page is what the source says."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
AGAIN = "then run `python docs/make_api.py`"


@pytest.fixture(scope="module")
def make_api() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_public_names_and_signatures_are_stable(make_api: ModuleType) -> None:
    before = json.loads((ROOT / "tests" / "unit" / "public_names.json").read_text(encoding="utf-8"))
    now = make_api.public_names()
    gone = sorted(before.keys() - now.keys())
    new = sorted(now.keys() - before.keys())
    changed = [
        f"{name}\n    was {before[name]}\n    is  {now[name]}"
        for name in before
        if name in now and before[name] != now[name]
    ]
    assert not gone, (
        f"Public names are gone: {gone}. Bring them back, or say in CHANGELOG.md what replaces them, {AGAIN}."
    )
    assert not changed, (
        "Signatures changed:\n"
        + "\n".join(changed)
        + f"\nWhoever calls them as before must still be served; say in CHANGELOG.md what is new, {AGAIN}."
    )
    assert not new, f"New public names: {new}. Add them to CHANGELOG.md, {AGAIN}."


def test_the_page_is_what_the_source_says(make_api: ModuleType) -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert page == make_api.render(), (
        "docs/api.md is older than the docstrings: run `python docs/make_api.py`"
    )


@pytest.mark.parametrize("path", ["phlora", "phlora.lora", "phlora.testing"])
def test_every_public_name_exists_once_and_says_what_it_is(path: str) -> None:
    module = importlib.import_module(path)
    assert len(module.__all__) == len(set(module.__all__))
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
            assert own and not own.startswith(f"{name}("), f"{path}.{name} has no docstring"


def test_every_argument_of_a_public_function_is_told_when_any_is(make_api: ModuleType) -> None:
    """A docstring with `Args:` that leaves some out is older than its function."""
    for path in make_api.MODULES:
        module = importlib.import_module(path)
        for name in make_api.names_of(module):
            value = getattr(module, name)
            text = inspect.getdoc(value) or ""
            if not inspect.isfunction(value) or "Args:" not in text:
                continue
            if "other arguments are those of" in text:
                continue
            for parameter in inspect.signature(value).parameters:
                assert parameter in text, f"{path}.{name}: `{parameter}` is not told"


def test_names_are_loaded_when_they_are_used() -> None:
    import phlora

    assert {*phlora.__all__} <= {*dir(phlora)}
    with pytest.raises(AttributeError, match="no attribute 'fine_tune'"):
        phlora.fine_tune  # noqa: B018
