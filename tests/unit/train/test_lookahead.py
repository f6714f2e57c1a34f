"""What a run will take is known before its weights are read; too much is refused, made to fit, or insisted on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from phlora import finetune
from phlora.config import build_config
from phlora.display import Display
from phlora.errors import ModelError, NoRoomError
from phlora.measure import FreeMemory
from phlora.testing import chat_rows, tiny_folder, tiny_phi3, write_rows
from phlora.train import lookahead
from phlora.train.finetune import plan_run
from phlora.train.lookahead import Planned

QUIET = Display(quiet=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planned")
    tiny_folder(folder / "base")
    write_rows(folder / "chats.jsonl", chat_rows(40))
    return folder


Configured = Callable[..., Any]


@pytest.fixture
def configured(place: Path, tmp_path: Path) -> Configured:
    def made(training: dict[str, Any] | None = None, **sections: Any) -> Any:
        values = {
            "model": {"name": str(place / "base"), "dtype": "float32"},
            "data": {"files": str(place / "chats.jsonl")},
            "training_config": {
                "max_steps": 2,
                "save_strategy": "no",
                "eval_strategy": "no",
                **(training or {}),
            },
            "evaluation": {"enabled": False},
            "output": str(tmp_path / "run"),
            **sections,
        }
        return build_config(values)

    return made


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let so many bytes be free."""
    # Libraries would be most of what so small a model takes.
    monkeypatch.setattr("phlora.forecast.memory.LATER_LIBRARIES", 0)

    def free(number: int) -> None:
        monkeypatch.setattr(lookahead, "free_memory", lambda _: FreeMemory(number, "a test"))

    return free


@pytest.fixture
def too_little(only: Callable[[int], None]) -> Callable[[Any], None]:
    """Let a little less be free than a run takes."""

    def free(config: Any) -> None:
        only(1 << 40)
        only(needed(plan_run(config, display=QUIET)) - 1000)

    return free


def needed(planned: Planned) -> int:
    assert planned.ahead is not None
    return planned.ahead.forecast.needed


def test_no_weight_is_read_and_nothing_is_written(
    configured: Configured, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookahead.torch, "load", None)
    for name in ("load_model", "load_file"):
        monkeypatch.setattr(f"phlora.train.base.{name}", None, raising=False)
    before = sorted(place.rglob("*"))
    planned = plan_run(configured(), display=QUIET)
    assert planned.plan is not None and planned.plan.num_optimizer_steps == 2
    text, document = planned.render(), json.loads(json.dumps(planned.to_json()))
    assert "memory on cpu" in text and "a step" in text and "parameters will be trained" in text
    assert document["forecast"]["seconds"]["training"] > 0 and document["remedies"] == []
    assert sorted(place.rglob("*")) == before and not Path(configured().output).exists()


@pytest.mark.parametrize("left", ["nothing", "one of several files"])
def test_a_plan_needs_no_weights(configured: Configured, place: Path, tmp_path: Path, left: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(place / "base", base)
    model = tiny_phi3()[0].bfloat16()
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="100KB")
    whole = plan_run(configured(model={"name": str(base), "dtype": "float32"}), display=QUIET)
    for file in sorted(base.glob("model*"))[left == "one of several files" :]:
        if left == "nothing" or file.suffix == ".safetensors":
            file.unlink()
    planned = plan_run(configured(model={"name": str(base), "dtype": "float32"}), display=QUIET)
    assert planned.plan is not None and planned.ahead is not None and whole.ahead is not None
    sizes = [each.ahead.forecast.memory.parts["weights"] for each in (planned, whole)]
    assert sizes[0] == sizes[1]
    with pytest.raises(ModelError, match="lacks"):
        finetune(configured(model={"name": str(base), "dtype": "float32"}), display=QUIET)


def test_the_plan_of_a_run_is_that_of_the_run(configured: Configured) -> None:
    config = configured()
    planned, run = plan_run(config, display=QUIET), finetune(config, display=QUIET)
    assert planned.plan is not None and run.plan.to_json() == planned.plan.to_json()
    assert run.plan.forecast is not None and run.plan.forecast.memory.parts["weights"] > 0


def test_a_run_over_the_free_memory_is_refused_with_what_makes_it_fit(
    configured: Configured, too_little: Callable[[Any], None]
) -> None:
    config = configured({"activation_memory": "keep"})
    too_little(config)
    with pytest.raises(NoRoomError) as found:
        finetune(config, display=QUIET)
    for words in (
        "activation_memory=recompute",
        "per_device_train_batch_size=4",
        "--fit",
        "--overcommit",
        "a test",
    ):
        assert words in str(found.value)
    assert not Path(config.output).exists()
    assert "does NOT fit" in plan_run(config, display=QUIET).render()
    run = finetune(config, display=QUIET, overcommit=True)
    assert run.folder is not None


def test_fit_changes_the_run_and_writes_down_what(
    configured: Configured, too_little: Callable[[Any], None]
) -> None:
    config = configured({"activation_memory": "keep"})
    too_little(config)
    run = finetune(config, display=QUIET, fit_memory=True)
    assert run.plan.forecast is not None and run.plan.forecast.fits
    assert run.folder is not None and "# --fit" in run.config_text
    # Steps of the same rows.
    assert run.plan.sequences_per_step == 8


def test_a_fitted_run_is_continued_as_it_began(
    configured: Configured,
    only: Callable[[int], None],
    too_little: Callable[[Any], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = configured({"activation_memory": "keep", "save_strategy": "steps", "save_steps": 1})
    # What recomputes is no choice here, so that the rows of a pass become fewer.
    monkeypatch.setattr("phlora.forecast.remedies._recomputing", lambda _: iter(()))
    too_little(config)
    begun = finetune(config, display=QUIET, fit_memory=True)
    assert begun.folder is not None and "per_device_train_batch_size: 4  # --fit" in begun.config_text
    only(1 << 40)
    again = finetune(config, display=QUIET, fit_memory=True, resume=True)
    assert "per_device_train_batch_size: 4  # --fit" in again.config_text


@pytest.mark.parametrize("traced_or_probed", ["memory.step_bytes", "forecast.measure_pace"])
def test_a_forecast_that_fails_stops_no_run(
    configured: Configured, monkeypatch: pytest.MonkeyPatch, capsys: Any, traced_or_probed: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no tensor without numbers")

    monkeypatch.setattr(f"phlora.forecast.{traced_or_probed}", fail)
    run = finetune(configured({"max_steps": 1}), display=Display())
    assert run.plan.forecast is None and "RuntimeError: no tensor without numbers" in capsys.readouterr().err


def test_a_model_whose_code_needs_numbers_is_trained_and_why_it_is_not_forecast_is_said(
    configured: Configured, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    begin = Phi3MLP.__init__

    def looks_at_a_number(self: Any, config: Any) -> None:
        begin(self, config)
        assert torch.ones(1).item()

    monkeypatch.setattr(Phi3MLP, "__init__", looks_at_a_number)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place / "base"), dtype=torch.float32)
    run = finetune(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(place / "base"),
        data=str(place / "chats.jsonl"),
        training_config={"max_steps": 1, "save_strategy": "no"},
        evaluation={"enabled": False},
        output=tmp_path / "run",
        display=Display(),
    )
    said = capsys.readouterr().err
    assert run.folder is not None and run.plan.num_optimizer_steps == 1 and run.plan.forecast is None
    assert "not forecast: RuntimeError: Tensor.item() cannot be called on meta tensors" in said
    # Why there is no plan is said where something else forbids the forecast too.
    planned = plan_run(configured({"loss_type": "dft"}), display=Display())
    said = capsys.readouterr().err
    assert planned.plan is None and "not forecast: loss_type dft is TRL's own; RuntimeError" in said


@pytest.mark.parametrize(
    "own", ["lookahead.remedies", "lookahead.make_plan", "lookahead.forecast_run", "fitting.render_remedies"]
)
def test_a_defect_of_the_forecast_itself_is_not_hidden(
    configured: Configured, too_little: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AttributeError("a defect")

    too_little(configured({"activation_memory": "keep"}))
    monkeypatch.setattr(f"phlora.train.{own}", fail)
    with pytest.raises(AttributeError, match="a defect"):
        finetune(configured({"activation_memory": "keep", "max_steps": 1}), display=QUIET)


def test_a_model_without_heads_of_attention_is_not_forecast() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, state_size=2))
    assert lookahead._unknown_step(model) == "how large its keys and values are is not known"


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(
    "kind, says", [("gemma2", "changes its logits after the head"), ("gpt2", "layers is not known")]
)
def test_models_whose_step_is_not_known_are_trained_all_the_same(
    place: Path, tmp_path: Path, capsys: Any, kind: str, says: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    small = (
        {"n_embd": 32, "n_layer": 2, "n_head": 2} if kind == "gpt2" else {"hidden_size": 32, "head_dim": 8}
    )
    if kind == "gemma2":
        small |= {
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
        }
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer) + 20, pad_token_id=0, **small)
    run = finetune(
        model=AutoModelForCausalLM.from_config(config),
        tokenizer=tokenizer,
        data=str(place / "chats.jsonl"),
        training_config={"max_steps": 1, "save_strategy": "no"},
        evaluation={"enabled": False},
        output=tmp_path / kind,
        display=Display(),
    )
    assert run.plan.forecast is None and says in capsys.readouterr().err


def test_fit_joins_several_changes_and_says_where_none_is_enough(
    configured: Configured, only: Callable[[int], None]
) -> None:
    config = configured({"activation_memory": "keep"})
    only(1 << 40)
    settings = {"activation_memory": "recompute", "per_device_train_batch_size": 1}
    least = needed(plan_run(configured({**settings, "gradient_accumulation_steps": 8}), display=QUIET))
    only(least)
    planned = plan_run(config, display=QUIET, fit_memory=True)
    assert planned.ahead is not None and planned.ahead.forecast.fits
    only(1000)
    with pytest.raises(NoRoomError, match="No single change"):
        plan_run(config, display=QUIET, fit_memory=True)


def test_auto_computes_again_where_keeping_does_not_fit(
    configured: Configured, only: Callable[[int], None]
) -> None:
    only(1 << 40)
    assert plan_run(configured(), display=QUIET).arguments.activation_memory == "keep"
    mlp = needed(plan_run(configured({"activation_memory": "recompute_mlp"}), display=QUIET))
    only(int(1.11 * mlp))
    planned = plan_run(configured(), display=QUIET)
    assert planned.arguments.activation_memory == "recompute_mlp"
    assert "keeping everything takes" in planned.render()


def test_every_level_trains_the_same_adapter_to_the_bit(configured: Configured, tmp_path: Path) -> None:
    found = []
    for level in ("keep", "recompute_mlp", "recompute"):
        config = configured({"activation_memory": level, "learning_rate": 1e-2}, output=str(tmp_path / level))
        run = finetune(config, display=QUIET)
        assert run.folder is not None
        found.append(load_file(run.folder / "adapter" / "last" / "adapter_model.safetensors"))
        written = yaml.safe_load(run.config_text)["training_config"]
        assert written["activation_memory"] == level and "gradient_checkpointing" not in written
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])


def test_a_model_in_memory_is_forecast_too(configured: Configured, place: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    run = finetune(
        model=model,
        tokenizer=tokenizer,
        data=str(place / "chats.jsonl"),
        training_config={"max_steps": 1},
        output=str(place / "unused"),
        dry_run=True,
        display=QUIET,
    )
    assert run.plan.forecast is not None and run.plan.forecast.memory.parts["weights"] > 0


def test_the_weights_of_a_model_in_memory_are_not_taken_twice(
    configured: Configured, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(lookahead, "free_memory", lambda device: FreeMemory(10**9, "this machine"))
    run = finetune(
        model=AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(place / "base"),
        data=str(place / "chats.jsonl"),
        training_config={"max_steps": 1},
        output=str(place / "unused"),
        dry_run=True,
        display=QUIET,
    )
    assert run.plan.forecast is not None
    assert run.plan.forecast.free.num_bytes == 10**9 + run.plan.forecast.memory.parts["weights"]
    assert plan_run(configured(), display=QUIET).plan.forecast.free.num_bytes == 10**9  # type: ignore[union-attr]


def test_what_cannot_be_forecast_is_said_and_trains(configured: Configured, capsys: Any) -> None:
    config = configured({"loss_type": "dft", "max_steps": 1})
    run = finetune(config, display=Display())
    assert run.plan.forecast is None
    assert "not forecast: loss_type dft" in capsys.readouterr().err
    planned = plan_run(config, display=QUIET)
    assert "1 optimizer step" in planned.render() and planned.to_json()["forecast"] is None


def test_a_forecast_that_takes_long_is_said_to(
    configured: Configured, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(lookahead, "_MANY_TOKENS", 100)
    plan_run(configured(), display=Display())
    assert "tokens, so that reckoning with it may take minutes" in capsys.readouterr().err
