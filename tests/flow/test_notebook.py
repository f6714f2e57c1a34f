"""Phlora in a notebook: a real kernel executes one on the tiny model, and what it shows is looked at."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

SETUP = """
import os
os.environ["HF_HUB_OFFLINE"] = "1"
from phlora import check, finetune, load, load_rows, load_tokenizer, preview
model = {{"name": {model!r}, "dtype": "float32", "device": "cpu"}}
rows = [
    {{"question": f"سوال <b>{{i}}</b> & more", "answer": f"پاسخ {{i}}"}} for i in range(24)
] + [{{"question": "<script>alert(1)</script>", "answer": "a"}}] * 2
"""

CELLS = {
    "setup": SETUP,
    "check": "words = load_tokenizer(model['name']).tokenizer\nfound = check([rows], words)\nfound",
    "preview": "preview(load_rows([rows[:24]]).rows, words, 2)",
    "plot_lengths": "found.plot_lengths();",
    "train": (
        "run = finetune(model=model, data=rows[:24], output={output!r},"
        " evaluation=dict(max_answers=2, max_new_tokens=4),"
        " training_config=dict(max_steps=6, logging_steps=1, per_device_train_batch_size=2))"
    ),
    "run": "run",
    "plan": "run.plan",
    "plot_loss": "run.plot_loss();",
    "answer": "print(load(run).generate(['سلام', 'hi'], max_new_tokens=3))",
    "interrupt": """
import os, signal
from transformers import TrainerCallback
class Interrupt(TrainerCallback):
    "What the kernel gets when its user presses the stop button."
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
again = dict(model=model, data=rows[:24], output={stopped!r}, evaluation=dict(enabled=False),
    training_config=dict(max_steps=6, per_device_train_batch_size=2, save_strategy="no"))
before = signal.getsignal(signal.SIGINT)
try:
    finetune(**again, callbacks=[Interrupt()])
except KeyboardInterrupt as stop:
    print("stopped:", stop)
assert signal.getsignal(signal.SIGINT) is before
""",
    "resume": "done = finetune(**again, resume=True)\nprint(done.folder)",
}


@pytest.fixture(scope="module")
def executed(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The cells of the notebook with what they have put out, by their names."""
    from nbclient import NotebookClient

    folder = tmp_path_factory.mktemp("notebook")
    places = {"model": str(model_folder), "output": str(folder / "run"), "stopped": str(folder / "stopped")}
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(source.format(**places)) for source in CELLS.values()]
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    nbformat.write(notebook, folder / "executed.ipynb")
    return {"folder": folder, **dict(zip(CELLS, notebook.cells, strict=True))}


class Checked(HTMLParser):
    """Fails on elements that do not match, on scripts and on attributes that run something."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.directions: list[str | None] = []
        self.feed(markup)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script" and not any(name.startswith("on") for name, _ in attrs)
        self.open.append(tag)
        self.directions.append(dict(attrs).get("dir"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def page(cell: Any) -> Checked:
    (markup,) = [output.data["text/html"] for output in cell.outputs if "text/html" in output.get("data", {})]
    return Checked(markup)


def streams(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def test_a_check_shows_what_is_wrong_and_no_text_is_markup(executed: dict[str, Any]) -> None:
    shown = page(executed["check"])
    assert "26 of 26 rows usable" in shown.text and "repeats" in shown.text and "tokens a row" in shown.text
    assert "auto" in shown.directions


def test_a_preview_marks_what_is_trained(executed: dict[str, Any]) -> None:
    (output,) = executed["preview"].outputs
    markup = output.data["text/html"]
    shown = page(executed["preview"])
    assert "<b>" not in markup and "".join(shown.texts).count("<b>") == 2
    trained = "".join(re.findall(r'<span class="trained">([^<]*)</span>', markup.partition("</style>")[2]))
    assert "پاسخ 0" in trained and "سوال" not in trained


def test_training_shows_one_block_and_no_wall_of_lines(executed: dict[str, Any]) -> None:
    cell = executed["train"]
    assert streams(executed["setup"]) == streams(cell) == ""
    assert len(cell.outputs) == 1
    shown = page(cell).text
    assert "Training 6 steps" in shown and "Training: 6/6 steps" in shown and "held-out loss" in shown
    assert "Training 6 steps" in cell.outputs[0].data["text/plain"]


def test_a_run_and_its_plan_are_tables(executed: dict[str, Any]) -> None:
    assert all(word in page(executed["run"]).text for word in ("Loss", "base", "tuned", "report.html"))
    assert all(word in page(executed["plan"]).text for word in ("qkv_proj", "optimizer steps of 2 rows"))


def test_curves_and_lengths_are_pictures(executed: dict[str, Any]) -> None:
    for name in ("plot_loss", "plot_lengths"):
        (output,) = executed[name].outputs
        assert output.data["image/png"]


def test_answers_in_a_notebook(executed: dict[str, Any]) -> None:
    assert streams(executed["answer"]).startswith("['")


def test_stopping_a_cell_writes_a_checkpoint_and_the_run_goes_on_from_it(executed: dict[str, Any]) -> None:
    assert "Stopped after step 3, with a checkpoint" in streams(executed["interrupt"])
    assert "Stopping after this step, with a checkpoint" in page(executed["interrupt"]).text
    folder: Path = executed["folder"] / "stopped"
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text("utf-8").splitlines()]
    assert [event["step"] for event in events if event["event"] == "start"] == [0, 3]
    assert json.loads((folder / "run.json").read_text("utf-8"))["status"] == "finished"
    assert "from checkpoint-3" in page(executed["resume"]).text
