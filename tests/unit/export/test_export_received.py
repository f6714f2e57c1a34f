"""Exported folders that lay about: whatever stands in them is one message, and never an old verdict."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from phlora import export_run
from phlora.display import Display
from phlora.export.received import digests_of
from phlora.testing import chat_rows, invoke, tiny_adapter
from phlora.train.finetune import finetune

LLAMACPP = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp (xllamacpp) is not installed")
QUIET = Display(quiet=True)
FEW = ("--max-rows", "2", "--max-new-tokens", "4", "--quiet")


@pytest.fixture(scope="module")
def trained(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = chat_rows(20)
    done = finetune(
        model={"name": str(model_folder), "dtype": "float32", "device": "cpu"},
        data=rows[:14],
        eval_data=rows[14:],
        training_config={"max_steps": 2, "learning_rate": 5e-2},
        peft_config={"r": 4, "target_modules": ["q_proj", "v_proj"]},
        evaluation={"enabled": False},
        output=tmp_path_factory.mktemp("trained") / "r1",
        display=QUIET,
    )
    assert done.folder is not None
    return done.folder


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports, each made once."""
    folder = tmp_path_factory.mktemp("exports")

    def made(target: str, **options: Any) -> Path:
        output = folder / "-".join([target, *map(str, options.values())])
        if not output.exists():
            export_run(trained, output, target=target, display=QUIET, max_rows=2, max_new_tokens=4, **options)
        return output

    return made


@pytest.fixture
def copy(exported: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of an export, to be spoilt."""

    def made(target: str, **options: Any) -> Path:
        return Path(shutil.copytree(exported(target, **options), tmp_path / "v"))

    return made


def again(run: Path, folder: Path, target: str, *more: str) -> Any:
    return invoke("export", run, "--for", target, "--verify-only", "-o", folder, *FEW, *more)


def said(folder: Path) -> Any:
    return json.loads((folder / "export.json").read_text(encoding="utf-8"))


def edit(folder: Path, **values: Any) -> None:
    (folder / "export.json").write_text(json.dumps({**said(folder), **values}), encoding="utf-8")


def signed_again(folder: Path) -> None:
    """As if whoever changed the files had changed export.json with them."""
    digests = digests_of(folder)
    edit(folder, digests=digests, files={name: (folder / name).stat().st_size for name in digests})


def scramble(file: Path) -> None:
    content = bytearray(file.read_bytes())
    for place in range(len(content) - 20_000, len(content), 3):
        content[place] ^= 0x5A
    file.write_bytes(bytes(content))


def is_refused(done: Any, folder: Path) -> None:
    """With exit code 1, and nobody who looks into the folder reads that it was verified."""
    assert done.code == 1, done.err
    assert "bug in Phlora" not in done.err and done.err.count("What to do:") == 1
    assert said(folder)["verdict"]["verified"] is False
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "\nVerified in" not in card and ("NOT verified" in card or "not verified" in card)


CHANGES: list[tuple[str, str, Callable[[Path], object]]] = [
    ("peft", "generation_config.json", lambda file: file.write_text('{"eos_token_id": [5, 6, 7]}')),
    ("peft", "chat_template.jinja", lambda file: file.unlink()),
    ("peft", "chat_template.jinja", lambda file: file.write_text("{% for i in range(10**9) %}{% endfor %}")),
    ("peft", "tokenizer.json", lambda file: file.write_text("{}")),
    ("peft", "adapter_config.json", lambda file: file.write_text("[]")),
    ("peft", "adapter_model.safetensors", lambda file: file.write_bytes(file.read_bytes()[:-100])),
    ("peft", "adapter_model.safetensors", lambda file: file.unlink()),
    ("peft", "adapter_model.bin", lambda file: file.write_bytes(b"x")),
    ("merged", "model.safetensors", lambda file: file.write_bytes(file.read_bytes()[:-100])),
    ("merged", "config.json", lambda file: file.write_text("{}")),
    ("loralib", "r1.pt", lambda file: file.write_bytes(file.read_bytes()[:-100])),
    ("ollama", "Modelfile", lambda file: file.write_text("FROM /etc/passwd\n")),
    ("ollama", "Modelfile", lambda file: file.unlink()),
    ("gguf", "r1-f16.gguf", lambda file: file.write_bytes(file.read_bytes()[:-1000])),
    ("gguf", "r1-f16.gguf", scramble),
]


@LLAMACPP
@pytest.mark.parametrize(("target", "name", "change"), CHANGES)
def test_a_file_that_changed_is_named(
    trained: Path,
    copy: Callable[..., Path],
    target: str,
    name: str,
    change: Callable[[Path], object],
) -> None:
    folder = copy(target)
    assert said(folder)["verdict"]["verified"]
    change(folder / name)
    kept = said(folder)["digests"]
    done = again(trained, folder, target)
    is_refused(done, folder)
    assert name in done.err and "export it again" in done.err
    assert said(folder)["digests"] == kept, "what was exported stays what was exported"


# What whoever changes export.json too gets past the digests with, and what the program that opens it stumbles over.
STUMBLES = [change for change in CHANGES if change[1] in ("chat_template.jinja", "tokenizer.json")]
STUMBLES += [change for change in CHANGES if change[0] in ("merged", "loralib")]
STUMBLES += [("peft", "adapter_config.json", lambda file: file.write_text("[]"))]
STUMBLES += [("gguf", "r1-f16.gguf", lambda file: file.write_bytes(b"GGUF"))]


@LLAMACPP
@pytest.mark.parametrize(("target", "name", "change"), STUMBLES)
def test_what_a_client_stumbles_over_is_one_message(
    trained: Path,
    copy: Callable[..., Path],
    target: str,
    name: str,
    change: Callable[[Path], object],
) -> None:
    folder = copy(target)
    change(folder / name)
    signed_again(folder)
    is_refused(again(trained, folder, target), folder)


@LLAMACPP
def test_a_refusal_replaces_the_verdict(trained: Path, copy: Callable[..., Path]) -> None:
    folder = copy("gguf")
    scramble(folder / "r1-f16.gguf")
    signed_again(folder)
    done = again(trained, folder, "gguf")
    is_refused(done, folder)
    assert "report it" not in done.err


@pytest.mark.parametrize("target", ["peft", "merged"])
@pytest.mark.parametrize("content", ['{"eos_token_id": [5, 6, 7]}', '{"eos_token_id": 275}', "{}", "{", "[]"])
def test_stops_are_those_of_the_run(
    trained: Path, copy: Callable[..., Path], target: str, content: str
) -> None:
    folder = copy(target)
    (folder / "generation_config.json").write_text(content)
    signed_again(folder)
    is_refused(again(trained, folder, target), folder)


@LLAMACPP
@pytest.mark.parametrize("type", ["q4_k_m", "q6_k"])
def test_rounding_on_purpose_has_a_bound(trained: Path, copy: Callable[..., Path], type: str) -> None:
    """On the weights and the loss: of answers nothing is known that no rounding brings about."""
    pytest.importorskip("libgguf")
    folder = copy("gguf", type=type)
    scramble(folder / f"r1-{type}.gguf")
    signed_again(folder)
    done = again(trained, folder, "gguf")
    is_refused(done, folder)
    verdict = said(folder)["verdict"]
    assert float(verdict["weights_apart"]) > verdict["weights_bound"]


@LLAMACPP
@pytest.mark.parametrize("type", ["q4_k_m", "f32", "q8_0"])
def test_the_type_is_that_of_the_file(trained: Path, copy: Callable[..., Path], type: str) -> None:
    folder = copy("gguf")
    edit(folder, type=type)
    done = again(trained, folder, "gguf")
    is_refused(done, folder)
    assert f"export.json says {type}, and the file f16" in done.err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("type", value) for value in ([1], {}, "zz", "f16", 5)],
        *[("rank", value) for value in (None, "x", [1], {}, -1, True)],
        *[("files", value) for value in (None, 5, {"1": "x"}, {"../out.gguf": 1}, {"/etc/passwd": 1}, {})],
        *[
            ("digests", value)
            for value in (None, 5, {"../out.gguf": ""}, {}, {"adapter_model.safetensors": 1})
        ],
        *[("notes", value) for value in (None, 5, "abc", [1])],
        *[("base", value) for value in (None, 5, "other", [])],
        *[("target", value) for value in (None, 5, "gguff", [])],
    ],
)
def test_export_json_is_read_as_an_export_writes_it(
    trained: Path, copy: Callable[..., Path], key: str, value: Any
) -> None:
    folder = copy("peft")
    edit(folder, **{key: value})
    done = again(trained, folder, "peft")
    assert done.code == 2 and any(name in done.err for name in (f"`{key}`", "`files`")), done.err
    assert "bug in Phlora" not in done.err


@LLAMACPP
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--type", "q8_0"), "It was exported as --type f16"),
        (("--adapter-only",), "It was exported as a whole model"),
        (("--no-verify",), "contradict each other"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    trained: Path, exported: Callable[..., Path], options: tuple[str, ...], message: str
) -> None:
    done = again(trained, exported("gguf"), "gguf", *options)
    assert done.code == 2 and message in done.err
    assert said(exported("gguf"))["verdict"]["verified"]


@LLAMACPP
@pytest.mark.parametrize("target", ["peft", "merged", "loralib", "ollama"])
def test_what_was_exported_is_verified_again(trained: Path, copy: Callable[..., Path], target: str) -> None:
    folder = copy(target)
    before = said(folder)
    (folder / "README.md").write_text("# Mine\n")
    done = again(trained, folder, target)
    after = said(folder)
    assert done.code == 0, done.err
    assert {**after, "launch": ""} == {**before, "launch": ""}, (
        "the folder is named in it, and has another name"
    )
    assert (folder / "README.md").read_text().startswith("# Mine\n")


def test_a_linked_card_brings_nothing_into_the_folder(model_folder: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(model_folder, tmp_path / "adapter")
    export_run(adapter, tmp_path / "v", target="peft", display=QUIET)
    (tmp_path / "mine.txt").write_text("mine alone")
    (tmp_path / "v" / "README.md").unlink()
    (tmp_path / "v" / "README.md").symlink_to(tmp_path / "mine.txt")
    assert again(adapter, tmp_path / "v", "peft").code == 0
    assert "mine alone" not in (tmp_path / "v" / "README.md").read_text()
    assert (tmp_path / "mine.txt").read_text() == "mine alone"
