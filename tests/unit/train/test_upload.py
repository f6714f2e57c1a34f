"""`push_to_hub`: the best adapter with its own card, and nothing lost where a hub is not to be had."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError

from phlora.display import Display
from phlora.errors import ConfigError
from phlora.testing import chat_rows
from phlora.train import upload
from phlora.train.arguments import training_arguments
from phlora.train.finetune import finetune
from phlora.train.upload import Upload, require_sender, send, take_upload


class Hub:
    """A hub that keeps what it is sent, or fails with an error."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.fails, self.repos, self.sent, self.token = fails, [], {}, None

    def __call__(self, token: str | None = None) -> Hub:
        self.token = token
        return self

    def create_repo(self, repo: str, *, private: bool | None, exist_ok: bool) -> Any:
        if self.fails:
            raise self.fails
        self.repos.append((repo, private))
        return SimpleNamespace(repo_id=f"somebody/{repo}")

    def create_branch(self, repo: str, **kwargs: Any) -> None:
        self.repos.append((repo, kwargs["branch"]))

    def upload_folder(self, *, repo_id: str, folder_path: str, **kwargs: Any) -> Any:
        self.sent[repo_id] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(upload, "HfApi", made)
    monkeypatch.setattr(upload.huggingface_hub, "get_token", lambda: "a token")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return made


def train(model_folder: Path, folder: Path, **settings: Any) -> tuple[Any, str]:
    said = io.StringIO()
    run = finetune(
        model={"name": str(model_folder), "dtype": "float32", "device": "cpu"},
        data=chat_rows(12),
        training_config={"max_steps": 2, "push_to_hub": True, **settings},
        peft_config={"r": 2},
        evaluation={"enabled": False},
        output=folder,
        display=Display(said),
    )
    return run, said.getvalue()


def test_the_best_adapter_is_sent_with_its_card(hub: Hub, model_folder: Path, tmp_path: Path) -> None:
    run, said = train(model_folder, tmp_path / "my run", hub_private_repo=True, hub_strategy="every_save")
    assert hub.repos == [("my-run", True)]
    sent = hub.sent["somebody/my-run"]
    best = {path.name: path.read_bytes() for path in (run.folder / "adapter" / "best").iterdir()}
    assert sent == best and {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= sent.keys()
    card = sent["README.md"].decode()
    assert "held-out rows" in card and "[None]" not in card
    # A hub refuses cards whose base is no name of a model.
    assert "base_model" not in yaml.safe_load(card.split("---")[1])
    assert "Sending" in said and "the best adapter is sent once" in said
    written = yaml.safe_load((run.folder / "config.yaml").read_text())["training_config"]
    assert written["push_to_hub"] is True and written["hub_private_repo"] is True


def test_a_hub_that_cannot_be_reached_is_one_message_and_costs_nothing(
    hub: Hub, model_folder: Path, tmp_path: Path
) -> None:
    hub.fails = HTTPError("no route to host")
    run, said = train(model_folder, tmp_path / "run", hub_model_id="us/shop", hub_token="hf_" + "a" * 30)
    assert (run.folder / "adapter" / "best" / "adapter_model.safetensors").is_file()
    told = [line for line in said.splitlines() if line.startswith("!") and "sent" in line]
    assert len(told) == 1 and "no route to host" in told[0]
    assert f"hf upload us/shop {run.folder / 'adapter' / 'best'}" in told[0]
    everything = "".join(p.read_text(errors="ignore") for p in run.folder.rglob("*") if p.is_file())
    assert "hf_aaaa" not in said + everything


@pytest.mark.parametrize("error", [OSError("proxy"), HTTPError("slow"), ConnectionError("reset")])
def test_whatever_a_network_does_is_told(hub: Hub, tmp_path: Path, error: Exception) -> None:
    hub.fails, said = error, io.StringIO()
    assert send(tmp_path, Upload("us/shop"), run=tmp_path, display=Display(said)) is None
    assert f"was not sent to us/shop: {error}" in said.getvalue()


def test_what_can_be_known_before_training_is_said_before(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    require_sender(None)
    require_sender(Upload("us/shop"))
    with pytest.raises(ConfigError, match="no name of a repository"):
        require_sender(Upload("us/shop/one/two"))
    monkeypatch.setattr(upload.huggingface_hub, "get_token", lambda: None)
    require_sender(Upload(token="x"))
    with pytest.raises(ConfigError, match="nobody is logged in"):
        require_sender(Upload())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="No hub may be asked"):
        require_sender(Upload(token="x"))


def test_nothing_is_sent_without_being_asked_for(tmp_path: Path) -> None:
    settings = training_arguments({"push_to_hub": False, "hub_model_id": "us/shop"}, output_dir=tmp_path)
    assert settings.upload is None and "nothing is sent to a hub without push_to_hub" in settings.notes[0]
    asked = training_arguments({"push_to_hub": True, "hub_model_id": "us/shop"}, output_dir=tmp_path)
    assert asked.upload == Upload("us/shop") and not asked.args.push_to_hub
    with pytest.raises(ConfigError, match="push_to_hub"):
        take_upload({"push_to_hub": "perhaps"}, [])


def test_a_branch_of_its_own(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("card")
    address = send(tmp_path, Upload(revision="try"), run=tmp_path / "run", display=Display(io.StringIO()))
    assert hub.repos[-1] == ("somebody/run", "try") and address == "https://hub/somebody/run"
