"""The snippets of docs/lora.md run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "lora.md"


def test_snippets_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert len(snippets) == 6
    namespace: dict[str, object] = {"__name__": "snippets"}
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec"), namespace)
    assert "parameters trainable" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.pt", "merged.pt", "pretrained.pt"]
