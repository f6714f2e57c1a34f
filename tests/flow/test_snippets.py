"""The Python snippets of README and docs run, in the order of their page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from phlora.config import build_config

ROOT = Path(__file__).parents[2]
# docs/lora.md has its own test; it needs no model.
PAGES = [ROOT / "README.md", ROOT / "docs" / "guide.md"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_snippets_run(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    smollm2_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    snippets = blocks(page, "python")
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, str(page), "exec"), {"__name__": "__main__"})
    assert "Perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(
    "page", [ROOT / "docs" / "guide.md", ROOT / "docs" / "data.md"], ids=lambda page: page.name
)
def test_yaml_snippets_are_valid_configurations(page: Path) -> None:
    snippets = blocks(page, "yaml")
    assert snippets
    for snippet in snippets:
        build_config({"model": "smollm2-135m", **yaml.safe_load(snippet)})


def test_the_quickstart_is_a_valid_configuration() -> None:
    build_config(yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "page", sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]), ids=lambda page: page.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
