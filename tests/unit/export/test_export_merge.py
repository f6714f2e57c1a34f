"""Merging: what is saved is whole, proven by loading it, or not there at all."""

from __future__ import annotations

import gc
import json
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from phlora.adapters.merge import BOUNDS
from phlora.data.dataset import load_rows
from phlora.data.rows import Origin
from phlora.data.table import TokenizedRow
from phlora.data.tokenize import tokenize_rows
from phlora.display import Display
from phlora.errors import ConfigError, DataError, Finding, ModelError, NoRoomError, PhloraError, RunError
from phlora.export import merge
from phlora.export.convert import convert
from phlora.export.merge import merge_run
from phlora.runs import resolve
from phlora.serve.chat import open_chat
from phlora.testing import LANGUAGES, chat_rows, tiny_adapter, tiny_gemma2, tiny_phi3
from phlora.train.finetune import finetune

TEXTS = list(LANGUAGES.values())
ROWS = chat_rows(20)
QUIET = Display(quiet=True)


@pytest.fixture(scope="module", params=["nf4", "int8"])
def quantized_run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory, request: Any) -> Path:
    """A run on a quantised base, trained far enough that the adapter makes up for the rounding."""
    pytest.importorskip("bitsandbytes")
    done = finetune(
        model={"name": str(model_folder), "dtype": "float32", "device": "cpu", "quantization": request.param},
        data=ROWS[:14],
        eval_data=ROWS[14:],
        training_config={"max_steps": 8, "learning_rate": 2e-2},
        peft_config={"r": 4, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]},
        evaluation={"enabled": False},
        output=tmp_path_factory.mktemp("runs") / request.param,
        display=QUIET,
    )
    assert done.folder is not None
    return done.folder


def answers(model: Any, tokenizer: Any) -> list[list[int]]:
    found = []
    for text in TEXTS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        found.append(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0].tolist())
    return found


def test_a_merged_run_is_a_model_that_stock_transformers_loads_and_that_answers_alike(
    run: Path, model_folder: Path, tmp_path: Path
) -> None:
    report = merge_run(run, tmp_path / "model", display=QUIET)
    assert (report.dtype, report.num_modules, report.num_rows) == ("float32", 8, 6)
    assert report.changed_tokens == 0 < report.num_tokens
    assert 0 < report.mean_difference < report.largest_difference < 1e-5 * report.largest_logit

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_folder), run / "adapter" / "best"
    )
    tuned.generation_config = merged.generation_config
    assert answers(merged, tokenizer) == answers(tuned, tokenizer)
    stops = tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>", "<|assistant|>"])
    assert sorted(merged.generation_config.eos_token_id) == sorted(stops)
    assert merged.generation_config.pad_token_id == tokenizer.pad_token_id not in stops
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(run / "adapter" / "best").chat_template
    assert merged.config.use_cache and merged.dtype == torch.float32
    evidence = json.loads((tmp_path / "model" / "merge.json").read_text())
    assert report.to_json() == {**evidence, "folder": str(tmp_path / "model"), "adapter": report.adapter}
    assert str(run) not in json.dumps(evidence)
    assert "changed greedy tokens   0 of" in report.summary()


def test_a_merged_model_knows_the_system_prompt_that_was_trained(run: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(run, tmp_path / "run")
    facts = alone / "adapter" / "best" / "phlora.json"
    prompts = {"text": "Be brief.", "num_rows": 14, "num_same": 14, "num_different": 1}
    told = {**json.loads(facts.read_text(encoding="utf-8")), "system_prompts": prompts}
    facts.write_text(json.dumps(told), encoding="utf-8")
    merge_run(alone, tmp_path / "merged", max_rows=2, display=QUIET)
    session = open_chat(str(tmp_path / "merged"), display=QUIET)
    assert session.system == session.trained_system == "Be brief."
    assert open_chat(str(tmp_path / "merged"), system="", display=QUIET).system is None


def test_logits_that_a_model_caps_are_the_model_s_own(tmp_path: Path) -> None:
    """Gemma 2 caps its logits after the head."""
    model = tiny_gemma2(final_logit_softcapping=0.01)
    row = TokenizedRow(input_ids=[5, 6, 7, 8], labels=[-100, -100, 7, 8], weights=None, origin=Origin("a", 1))
    (logits,) = merge.answer_logits(model, [row], QUIET)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0, 1:3]
    assert logits.abs().max() <= 0.01 and torch.equal(logits, expected.float())


def test_the_adapter_inside_a_run_has_the_runs_base_and_rows(run: Path, tmp_path: Path) -> None:
    report = merge_run(run / "adapter" / "last", tmp_path / "model", max_rows=2, display=QUIET)
    assert report.num_rows == 2 and report.adapter.endswith("last")


def test_an_adapter_alone_needs_rows_and_its_own_base(
    model_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="--rows"):
        merge_run(adapter, tmp_path / "model", display=QUIET)
    assert merge_run(adapter, tmp_path / "model", rows=ROWS, display=QUIET).num_rows == 20
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="--model BASE"):
        merge_run(adapter, tmp_path / "other", rows=ROWS, display=QUIET)
    merge_run(adapter, tmp_path / "other", rows=ROWS, model=str(model_folder), display=QUIET)


def test_the_saved_dtype_is_that_of_the_bases_files(
    model_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float16).save_pretrained(half)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(half)
    config = json.loads((half / "config.json").read_text())
    # As in Phi-3's own folder; the code files that it names are not in a merged one.
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    (half / "config.json").write_text(json.dumps(config))
    report = merge_run(adapter, tmp_path / "a", model=str(half), rows=ROWS, display=QUIET)
    assert report.dtype == "float16" and 1e-5 < report.largest_difference
    weights = load_file(tmp_path / "a" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    saved = json.loads((tmp_path / "a" / "config.json").read_text())
    assert saved["dtype"] == "float16" and "auto_map" not in saved
    with pytest.raises(ConfigError, match="did you mean `bfloat16`"):
        merge_run(adapter, tmp_path / "b", dtype="bfloat61", rows=ROWS, display=QUIET)


def test_a_merge_that_changes_answers_is_refused_and_leaves_nothing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = merge.fold_adapter

    def forgetful(model: Any) -> Any:
        model.base_model.model.model.layers[1].mlp.down_proj.scaling["default"] *= 1.2
        return honest(model)

    monkeypatch.setattr(merge, "fold_adapter", forgetful)
    with pytest.raises(Finding, match="changed greedy tokens") as refusal:
        merge_run(adapter, tmp_path / "out" / "model", rows=ROWS, display=QUIET)
    assert refusal.value.exit_code == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_rounding_that_turns_answers_is_refused_too(adapter: Path, tmp_path: Path) -> None:
    """A random model's logits all but tie, so bfloat16 turns more than one token in a hundred."""
    with pytest.raises(Finding, match="--dtype float32"):
        merge_run(adapter, tmp_path / "model", dtype="bfloat16", rows=ROWS, display=QUIET)
    assert not (tmp_path / "model").exists()


def test_nobodys_files_are_replaced(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    for output in (tmp_path / "taken", tmp_path / "taken" / "thesis.txt"):
        with pytest.raises(RunError, match="exists already"):
            merge_run(adapter, output, rows=ROWS, display=QUIET)
        with pytest.raises(RunError, match="exists already"):
            convert(adapter, output, to="loralib")
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="name a file"):
        convert(adapter, tmp_path / "empty", to="loralib")
    merge_run(adapter, tmp_path / "empty", rows=ROWS[:2], display=QUIET)


def test_a_disk_without_room_is_refused_before_anything_is_written(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("phlora.files.shutil.disk_usage", lambda path: usage)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(NoRoomError, match="are free"):
        merge_run(adapter, tmp_path / "model", rows=ROWS, display=QUIET)
    for to in ("peft", "loralib"):
        with pytest.raises(NoRoomError, match="are free"):
            convert(adapter, tmp_path / "x", to=to)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.filterwarnings("ignore:.*tie.*", "ignore:.*tied.*")
def test_an_adapter_on_tied_embeddings_is_refused_before_anything_is_written(
    model_folder: Path, tmp_path: Path
) -> None:
    tied = tmp_path / "tied"
    model, tokenizer = tiny_phi3()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tied)
    tokenizer.save_pretrained(tied)
    adapter = tiny_adapter(tied, tmp_path / "adapter", target_modules=["o_proj", "lm_head"])
    with pytest.raises(ModelError, match="share"):
        merge_run(adapter, tmp_path / "model", rows=ROWS, display=QUIET)
    assert not (tmp_path / "model").exists()
    plain = tiny_adapter(tied, tmp_path / "plain", target_modules=["o_proj"])
    merge_run(plain, tmp_path / "model", rows=ROWS, display=QUIET)
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")


@pytest.mark.parametrize(
    ("source", "error"), [("nowhere", RunError), ("empty", RunError), ("untrained", RunError)]
)
def test_a_source_without_an_adapter_is_one_message(
    source: str, error: type[PhloraError], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "untrained").mkdir()
    (tmp_path / "untrained" / "run.json").write_text('{"status": "failed"}')
    for act in (merge_run, lambda *paths, display: convert(*paths, to="peft")):
        with pytest.raises(error):
            act(tmp_path / source, tmp_path / "out", display=QUIET)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------- a quantised base


def held_out_loss(model: Any, tokenizer: Any) -> float:
    """The loss of the answers, by transformers' own forward."""
    total, count = 0.0, 0
    for row in tokenize_rows(load_rows(ROWS[14:]).rows, tokenizer).rows:
        ids, targets = torch.tensor([row.input_ids]), torch.tensor(row.labels[1:])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        count += int((targets != -100).sum())
    return total / count


def test_an_adapter_of_a_quantised_base_goes_where_the_measured_loss_is_lower(
    quantized_run: Path, model_folder: Path, tmp_path: Path
) -> None:
    reports = {
        name: merge_run(quantized_run, tmp_path / name, base=name, display=QUIET)
        for name in ("auto", "full", "dequantized")
    }
    for report in reports.values():
        assert report.losses == pytest.approx(reports["auto"].losses, rel=1e-6)
        assert report.storage == quantized_run.name and report.changed_tokens == 0
        assert report.largest_difference < 1e-5 * report.largest_logit
    losses = reports["auto"].losses
    assert losses["dequantized"] == pytest.approx(losses["adapter"], rel=1e-6)
    assert losses["full"] != pytest.approx(losses["adapter"], rel=1e-6)
    lower = min(("full", "dequantized"), key=losses.__getitem__)
    higher = {"full": "dequantized", "dequantized": "full"}[lower]
    assert reports["auto"].base == lower and lower in reports["auto"].why
    assert reports[higher].base == higher and f"although {lower} has the lower loss" in reports[higher].why

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "full")
    for name in ("full", "dequantized"):
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert held_out_loss(saved, tokenizer) == pytest.approx(losses[name], rel=1e-5)
        assert "quantization_config" not in saved.config.to_dict()
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_folder), quantized_run / "adapter" / "best"
    )
    assert held_out_loss(tuned, tokenizer) == pytest.approx(losses["full"], rel=1e-5)
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("auto", lower))
    assert all(torch.equal(left[name], right[name]) for name in left)
    text = reports["auto"].summary()
    assert f"on the {quantized_run.name} base, as trained" in text and reports["auto"].why in text
    evidence = json.loads((tmp_path / "auto" / "merge.json").read_text())
    assert evidence["losses"] == losses and evidence["base"] == lower


@pytest.mark.parametrize("quantized_run", ["nf4"], indirect=True)
def test_an_adapter_alone_knows_that_its_base_was_quantised(quantized_run: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(quantized_run / "adapter" / "best", tmp_path / "adapter")
    report = merge_run(alone, tmp_path / "model", rows=ROWS[14:], base="dequantized", display=QUIET)
    assert (report.base, report.storage) == ("dequantized", quantized_run.name)


@pytest.mark.parametrize("quantized_run", ["nf4"], indirect=True)
def test_losses_are_those_of_the_rounded_weights_that_are_saved(quantized_run: Path, tmp_path: Path) -> None:
    exact = merge_run(quantized_run, tmp_path / "a", display=QUIET).losses
    rounded = merge_run(quantized_run, tmp_path / "b", dtype="float16", display=QUIET).losses
    assert rounded["adapter"] == exact["adapter"]
    for name in ("full", "dequantized"):
        assert rounded[name] != exact[name] and rounded[name] == pytest.approx(exact[name], rel=1e-2)


@pytest.mark.parametrize("quantized_run", ["nf4"], indirect=True)
def test_no_more_than_two_models_are_in_memory(
    quantized_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted at every load, after the new one is there."""
    alive: list[Any] = []
    counts = []
    honest = resolve.load_model

    def counting(*arguments: Any, **options: Any) -> Any:
        loaded = honest(*arguments, **options)
        alive.append(weakref.ref(loaded.model))
        gc.collect()
        counts.append(sum(model() is not None for model in alive))
        return loaded

    for module in (resolve, merge):
        monkeypatch.setattr(module, "load_model", counting)
    merge_run(quantized_run, tmp_path / "model", display=QUIET)
    assert counts == [1, 2, 1]


@pytest.mark.parametrize("quantized_run", ["nf4"], indirect=True)
def test_a_base_that_was_not_quantised_cannot_be_dequantised(
    run: Path, quantized_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="not trained on a quantised base"):
        merge_run(run, tmp_path / "model", base="dequantized", display=QUIET)
    with pytest.raises(ConfigError, match="did you mean `dequantized`"):
        merge_run(quantized_run, tmp_path / "model", base="dequantised", display=QUIET)  # type: ignore[arg-type]
    assert not (tmp_path / "model").exists()
    report = merge_run(run, tmp_path / "model", base="full", display=QUIET)
    assert report.base == "full" and report.losses["full"] == pytest.approx(report.losses["adapter"])


# ---------------------------------------------------------------------------------------- the real model


@pytest.mark.slow
def test_the_embedded_model_answers_alike_after_a_merge(smollm2_folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["qkv_proj", "down_proj"]))
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    tuned.save_pretrained(str(adapter), save_embedding_layers=False)
    rows = ROWS[:5]
    report = merge_run(adapter, tmp_path / "model", model="smollm2-135m", rows=rows, display=QUIET)
    assert report.changed_tokens == 0 and report.largest_difference < 1e-4 * report.largest_logit
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tuned.generation_config = merged.generation_config
    before, after = answers(tuned.eval(), tokenizer), answers(merged, tokenizer)
    assert before == after
    with tuned.disable_adapter():
        assert answers(tuned, tokenizer) != after
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")


# ------------------------------------------------------------------------------------------ the page about it


def test_the_snippets_of_the_page_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[3] / "docs" / "export.md"
    snippets = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert len(snippets) == 5
    shutil.copytree(run, tmp_path / "runs" / "support")
    monkeypatch.chdir(tmp_path)
    merge_run("runs/support", "models/support", display=QUIET)
    namespace: dict[str, object] = {"__name__": "snippets"}
    for snippet in snippets:
        exec(compile(snippet, str(page), "exec"), namespace)
    assert {path.name for path in tmp_path.iterdir()} == {"models", "out", "runs", "support.pt"}


def test_the_page_names_the_bounds() -> None:
    page = (Path(__file__).parents[3] / "docs" / "export.md").read_text(encoding="utf-8")
    for dtype, bound in BOUNDS.items():
        assert f"| {dtype} | {bound.largest:g} | {100 * bound.changed:g} % |" in page
