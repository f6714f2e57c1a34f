import json
import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import get_session

from phlora.errors import ModelError, NetworkError
from phlora.models.locate import ModelSource, locate, reading, resolve_source

HUB = ModelSource(name="owner/name", kind="hub", location="owner/name", revision="v9")


def test_embedded_folder_file_and_hub_are_told_apart(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    (tmp_path / "model.gguf").write_bytes(b"")
    assert resolve_source("smollm2-135m").kind == "embedded"
    assert resolve_source(tmp_path / "model").kind == "folder"
    assert resolve_source(tmp_path / "model.gguf").kind == "gguf"
    source = resolve_source("microsoft/Phi-3-mini-4k-instruct", revision="main")
    assert (source.kind, source.revision) == ("hub", "main")


def test_missing_folder_names_the_nearest_sibling(tmp_path):
    (tmp_path / "my-model").mkdir()
    with pytest.raises(ModelError, match=r"does not exist[\s\S]*my-model`\?"):
        resolve_source(tmp_path / "my-modle")


@pytest.mark.parametrize("name", ["./my-modle", "../x", "a/b/c", "model.gguf", "~/nowhere-at-all"])
def test_what_looks_like_a_path_is_not_asked_of_a_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        resolve_source(name)


def test_misspelt_embedded_name_gets_the_right_one():
    with pytest.raises(ModelError, match="embedded model `smollm2-135m`"):
        resolve_source("smollm-135m")


def test_folder_without_files_lists_what_it_lacks(tmp_path):
    with pytest.raises(ModelError, match=r"lacks config.json, weights"):
        resolve_source(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"lacks model-2.safetensors\."):
        resolve_source(tmp_path)


@pytest.mark.parametrize(
    ("files", "index"),
    [
        (["model-00001-of-00002.safetensors", "consolidated.safetensors"], "model.safetensors.index.json"),
        (["pytorch_model-00001-of-00002.bin"], "pytorch_model.bin.index.json"),
    ],
)
def test_shards_without_their_index_lack_the_index(tmp_path, files, index):
    for name in ("config.json", *files):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelError, match=f"lacks {index}"):
        resolve_source(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve_source(tmp_path).kind == "folder"


@pytest.mark.parametrize("content", [None, ["a.safetensors"], {"a": ["b.safetensors"]}])
def test_an_index_that_maps_nothing_is_one_clear_error(tmp_path, content):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": content}))
    with pytest.raises(ModelError, match="no `weight_map` from tensors to files"):
        resolve_source(tmp_path)


def test_adapter_folder_is_no_model_and_names_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    with pytest.raises(ModelError, match="an adapter of `owner/base`"):
        resolve_source(tmp_path)


def test_other_single_files_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="no .gguf file"):
        resolve_source(tmp_path / "model.safetensors")


def test_offline_fails_at_once_where_nothing_is_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NetworkError, match="neither on this machine nor can a hub be reached"):
        locate(HUB, offline=True)


def test_missing_folder_that_looks_like_a_hub_id_gets_a_sibling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "support").mkdir(parents=True)
    with pytest.raises(NetworkError, match=r"the folder `runs.support`"):
        locate(ModelSource(name="", kind="hub", location="runs/suport"), offline=True)


@pytest.mark.slow
def test_offline_command_ends_within_two_seconds_of_its_imports():
    code = (
        "import time; from phlora.errors import NetworkError; from phlora.models.load import load_model\n"
        "start = time.perf_counter()\n"
        "try: load_model('owner/none', offline=True)\n"
        "except NetworkError: print(time.perf_counter() - start)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 2


def hub_error(kind, status):
    client = get_session()
    response = client.build_request("GET", "https://hub.invalid/owner/name")
    answer = sys.modules[type(response).__module__.partition(".")[0]].Response(status, request=response)
    return kind("no", response=answer)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (lambda: hub_error(GatedRepoError, 403), ModelError, "HF_TOKEN"),
        (lambda: hub_error(RepositoryNotFoundError, 404), ModelError, "neither here nor on the hub"),
        (lambda: hub_error(RevisionNotFoundError, 404), ModelError, "no revision `v9`"),
        (lambda: HTTPError("unplugged"), NetworkError, "can a hub be reached"),
    ],
)
def test_hub_errors_become_one_clear_message(error, kind, words, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def fail(*args, **kwargs):
        raise error()

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(kind, match=words):
        locate(HUB, offline=False)


def test_gate_that_shows_only_at_the_download_is_still_a_gate(monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: None)
    location = locate(HUB, offline=False)
    assert location.kwargs == {"revision": "v9", "local_files_only": False}
    with pytest.raises(ModelError, match="ask for access"), reading(location, "The weights"):
        raise OSError("wrapped") from hub_error(GatedRepoError, 401)
