"""The training itself: the trainer, what watches it, and the adapters that it leaves in the run folder."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import EarlyStoppingCallback, PrinterCallback

from phlora.adapters.save import load_weights, save_adapter
from phlora.adapters.saved_facts import read_adapter_facts
from phlora.adapters.speed import at_speed
from phlora.data.packing import TokenSequences
from phlora.display import Display
from phlora.lora import matmul
from phlora.models.activation_memory import recomputing_mlps
from phlora.models.causal_lm import as_causal_lm
from phlora.models.families import longrope_limit
from phlora.models.load import LoadedModel
from phlora.runs.computing import COMPUTING, Computing, changed
from phlora.runs.folder import RunFolder
from phlora.runs.system_prompt import SYSTEM_PROMPTS
from phlora.train.arguments import Arguments
from phlora.train.batches import NewPacks, RunTrainer, SequenceCollator, number_sequences
from phlora.train.callbacks import (
    BestAdapter,
    CompleteCheckpoints,
    EventLog,
    GentleStop,
    TrainingProgress,
)
from phlora.train.prepare import PreparedData
from phlora.train.request import Objects
from phlora.train.trainer import SFTTrainer

# In run.json: which library multiplies each kind of product. Another one would give other last bits.
LIBRARIES = "products"


@dataclass(frozen=True)
class Training:
    """What trains, on what, and how.

    Attributes:
        shared: whether rows share the computation of their common starts.
        objects: of these the callbacks and the metrics count.
    """

    model: PeftModel
    loaded: LoadedModel
    data: PreparedData
    arguments: Arguments
    objects: Objects
    shared: bool


def fit(task: Training, folder: RunFolder, *, checkpoint: Path | None, display: Display) -> None:
    """Train the adapter, or continue from a checkpoint; afterwards the model carries the best adapter.

    Writes `adapter/last`, and `adapter/best` by held-out loss (the last one where nothing is held out).

    Raises:
        NonFiniteError: the loss or a gradient became no number; nothing was saved with it.
        KeyboardInterrupt: stopped by a signal; a checkpoint was written first.
    """
    model, loaded, data = task.model, task.loaded, task.data
    prompts = {SYSTEM_PROMPTS: data.system_prompts.to_json()} if data.system_prompts else {}

    def save(path: Path, **facts: Any) -> None:
        save_adapter(model, loaded, path, facts={**prompts, **facts})

    # The name that the user knows, rather than the place in this machine's cache that it was loaded from.
    model.peft_config["default"].base_model_name_or_path = loaded.source.name
    best_before = _best_before(folder)
    best = BestAdapter(
        lambda step, loss: save(folder.best_adapter, step=step, held_out_loss=loss), **best_before
    )
    progress, stop = TrainingProgress(display), GentleStop(display)
    try:
        before = folder.facts()
        recomputing = (
            recomputing_mlps(model) if task.arguments.activation_memory == "recompute_mlp" else nullcontext()
        )
        acceleration = at_speed(model, data.speed, libraries=before.get(LIBRARIES))
        with acceleration as chosen, _for_training(model), recomputing:
            display.note(chosen)
            computing = _computing(task)
            if change := changed(before.get(COMPUTING, {}), computing):
                display.warn(change)
            folder.update_facts(**{LIBRARIES: matmul.libraries(), COMPUTING: computing.to_json()})
            trainer = _trainer(task, name=folder.path.resolve().name)
            trainer.remove_callback(PrinterCallback)
            for callback in (
                NewPacks(data.train),
                EventLog(folder.events),
                progress,
                stop,
                best,
                CompleteCheckpoints(folder.checkpoints, folder.events, run=folder.identity_digest()),
            ):
                trainer.add_callback(callback)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.close()
        stop.restore()
    if stop.signal is not None:
        step = trainer.state.global_step
        raise KeyboardInterrupt(
            f"Stopped after step {step}, with a checkpoint; resume=True continues from it"
        )
    if task.shared:
        display.note(f"{trainer.num_tokens:,} tokens computed as {trainer.num_positions:,}{_merged(trainer)}")
    save(folder.last_adapter, step=trainer.state.global_step)
    if not best.step:
        save(folder.best_adapter, step=trainer.state.global_step)
    elif best.step != trainer.state.global_step:
        display.note(f"The best adapter is that of step {best.step} (held-out loss {best.loss:.4f})")
        load_weights(model, folder.best_adapter)


def _computing(task: Training) -> Computing:
    args, loaded = task.arguments.args, task.loaded
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else loaded.dtype.value
    return Computing.of(task.model, dtype=dtype, storage=loaded.storage.value)


def _merged(trainer: SFTTrainer) -> str:
    before, after = trainer.num_micro_batches, trainer.num_passes
    return f", {before:,} micro-batches as {after:,}" if after < before else ""


@contextmanager
def _for_training(model: PeftModel) -> Iterator[None]:
    """What holds while the trainer works and is as before afterwards.

    PEFT's "auto" asks the hub, at every save, whether the vocabulary was resized; Phlora never resizes it. The trainer
    turns the cache of keys and values off in the model's configuration.
    """
    config = as_causal_lm(model.get_base_model()).config
    use_cache = config.use_cache
    vars(model)["save_pretrained"] = functools.partial(model.save_pretrained, save_embedding_layers=False)
    try:
        yield
    finally:
        config.use_cache = use_cache
        del vars(model)["save_pretrained"]


def _trainer(task: Training, *, name: str) -> SFTTrainer:
    model, loaded, data, arguments, objects = task.model, task.loaded, task.data, task.arguments, task.objects
    args, packed = copy.copy(arguments.args), arguments.args.packing
    # The rows are tokenised, cut and packed already, and say so themselves.
    args.packing, args.max_length = False, None
    # What trackers call the run.
    args.run_name = args.run_name or name
    # With several GPUs in sight transformers would wrap the model in DataParallel, which TRL refuses.
    args._n_gpu = min(args.n_gpu, 1)
    args.dataset_kwargs, args.remove_unused_columns = {"skip_prepare_dataset": True}, False
    if any(_is_early_stopping(callback) for callback in objects.callbacks):
        args.metric_for_best_model, args.greater_is_better = "eval_loss", False
    if not data.held_out:
        args.eval_strategy = type(args.eval_strategy)("no")
    held_out = TokenSequences(data.held_out)
    numbers = number_sequences([*data.train.lengths, *held_out.lengths])
    return RunTrainer(
        model=model,
        callbacks=list(objects.callbacks),
        compute_metrics=objects.compute_metrics,
        args=args,
        loraplus_lr_ratio=arguments.loraplus_lr_ratio,
        z_loss=arguments.z_loss,
        train_dataset=numbers.select(range(len(data.train))),
        eval_dataset=numbers.select(range(len(data.train), len(numbers))) if data.held_out else None,
        processing_class=loaded.tokenizer.tokenizer,
        data_collator=SequenceCollator(
            data.train,
            held_out,
            loaded.tokenizer.tokenizer.pad_token_id,
            packed=packed,
            shared=task.shared,
            rope_limit=longrope_limit(model.config),
        ),
    )


def _is_early_stopping(callback: Any) -> bool:
    kind = callback if isinstance(callback, type) else type(callback)
    return issubclass(kind, EarlyStoppingCallback)


def _best_before(folder: RunFolder) -> dict[str, Any]:
    """Where a resumed run already reached its lowest held-out loss."""
    facts = read_adapter_facts(folder.best_adapter)
    step, loss = facts.get("step"), facts.get("held_out_loss")
    return {"step": step, "loss": loss} if step is not None and loss is not None else {}
