"""`SFTTrainer`: TRL's trainer with an exact loss on trained tokens only, and a guard against garbage.

What is overridden, and why:

- `compute_loss`: the head runs on the positions that predict a trained token, never on all of them; tokens may carry
  weights (`loss_weights`); nothing waits for the device between two logs.
- `_get_num_items_in_batch`: the divisor of the loss is the trained weight of the whole optimizer step.
- `training_step`, `prediction_step`: a micro-batch that does not fit into memory is done in pieces that do (`pieces`).
- `get_batch_samples`, `training_step`: the micro-batches of an optimizer step whose rows may share their starts are
  laid out together, in fewer forward passes where they fit. What remains of the others is empty and costs nothing.
- `evaluation_loop`: the held-out loss is that of all trained tokens, however they fall into batches.
- `_get_grad_norm`: training stops at the first loss or gradient that is no number, before the optimizer step, so that
  no weight is ever written with one. The library's own default logs 0.0 and trains on.
- `train`: resuming a finished run takes no further step.
- `__init__`: an adapter on a quantised base keeps PEFT's dtype, fp32 unless the caller has set another. TRL 1.16
  casts it to bf16, to which most of AdamW's updates are too small to be added. So are they to weights that are stored
  in 16 bits: of such a base, what trains is widened.
- what TRL, accelerate and this class put on the model itself (`forward`) is there while something is computed, and
  taken off again (`worn`): after training the model is an ordinary one, and its copies compute with their own weights.
- `create_optimizer`: with `loraplus_lr_ratio` every B of the adapter has a learning rate of its own.

Everything else is TRL's. Whatever needs all logits (`compute_metrics`, a caller's loss function, `loss_type="dft"`)
goes through TRL's own path, and so does all that this loss cannot give exactly, with one line that says so: a model
that changes its logits after the head (Gemma 2, Granite, Cohere), prompt tuning and its kin, batches of embeddings.
"""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from phlora.adapters.base_view import widen_adapted, widen_what_trains
from phlora.data.collate import share_step
from phlora.errors import ConfigError, NonFiniteError, RunError
from phlora.files import read_json
from phlora.models.lm_head import (
    LossTerms,
    TrainedTokens,
    trained_weight,
)
from phlora.models.prefix_attention import copy_cost
from phlora.train.dtypes import keep_dtypes, trained_values
from phlora.train.field_values import word_of
from phlora.train.optimizer import raise_rate_of_B
from phlora.train.pieces import Passes, Pieces
from phlora.train.token_losses import offer_token_losses, refuse_z_loss, why_trls_loss
from phlora.train.worn import Worn

_log = logging.getLogger(__name__)

_LOSS_WEIGHTS = "loss_weights"
# In a checkpoint's trainer_state.json: how large passes may be, where larger ones did not fit into memory.
_MOST_POSITIONS = "MostPositions"
# What batches may hold that only this trainer's own loss can read, in the words of a message.
_OWN_INPUTS = {"segments": "share their first tokens", _LOSS_WEIGHTS: "carry loss weights"}
# In the place of a micro-batch whose rows stand in another one of its step.
_NOTHING = {"input_ids": torch.empty(1, 0, dtype=torch.long)}


class SFTTrainer(trl.SFTTrainer):  # type: ignore[name-defined,misc]
    """A drop-in for `trl.SFTTrainer`: same arguments, same results to rounding, less work.

    Batches hold `input_ids`, `labels` (-100 where not trained) and optionally `attention_mask`, `position_ids` and
    `loss_weights` (float, the shape of `labels`), or what `SharedPrefixCollator` returns. The loss of an optimizer
    step is

        sum over its trained tokens of weight * cross-entropy / sum over its trained tokens of weight,

    whatever the number of micro-batches. `mean_token_accuracy`, `entropy` and the held-out loss are means over the
    trained tokens since the last log, or of the held-out rows, by the same weights; TRL's are means over batches.

    Where this loss is not exactly the model's own (logits changed after the head, prompt learning, batches without
    `input_ids`), and where all logits are needed, TRL's loss is taken, and the log says so once. A forward hook on the
    model finds `models.lm_head.TrainedTokens`, whose `loss` is the mean over the batch and whose `logits` are None.

    Args:
        loraplus_lr_ratio: the learning rate of every `lora_B`, as a multiple of that of all else (LoRA+).
        z_loss: weight of the squared log-normaliser of each trained token (`models.lm_head.LossTerms`); the held-out
            loss is without it. The other arguments are those of `trl.SFTTrainer`.

    Raises:
        ConfigError: `loraplus_lr_ratio` beside an optimizer of one's own, or for a model without LoRA; `z_loss` beside
            a loss that is not this trainer's.
        NonFiniteError: from `train`, at the first loss or gradient that is NaN or infinite.
    """

    def __init__(
        self, *args: Any, loraplus_lr_ratio: float | None = None, z_loss: float = 0.0, **kwargs: Any
    ) -> None:
        given = args[0] if args else kwargs.get("model")
        if z_loss and isinstance(given, nn.Module):
            refuse_z_loss(why_trls_loss(given))
        if isinstance(given, nn.Module) and kwargs.get("peft_config") is not None:
            widen_what_trains(given, kwargs["peft_config"])
        before = trained_values(given) if isinstance(given, PeftModel) else None
        self._worn = Worn(given if isinstance(given, nn.Module) else None)
        with warnings.catch_warnings():
            # TRL 1.16 announces a slow way through all logits, which is not taken here.
            warnings.filterwarnings("ignore", "`label_smoothing_factor`", FutureWarning)
            try:
                super().__init__(*args, **kwargs)
            except BaseException:
                self._worn.take_off()
                raise
        keep_dtypes(self.model, before)
        for line in widen_adapted(self.model):
            _log.warning("%s", line)
        if loraplus_lr_ratio is not None and self.optimizer is not None:
            raise ConfigError(
                "An optimizer was given, which has its learning rates already",
                where="loraplus_lr_ratio",
                fix="leave out one of the two",
            )
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self._why_trls_loss = why_trls_loss(self.model)
        if z_loss:
            asked = "Another loss than cross-entropy is asked for" if self._needs_logits else None
            refuse_z_loss(asked or self._why_trls_loss)
        self._said: set[str] = set()
        if not self._needs_logits:
            self._say(self._why_trls_loss)
        smoothing = self.args.label_smoothing_factor
        self._terms = {True: LossTerms(smoothing, z_loss), False: LossTerms(smoothing)}
        offer_token_losses(self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model)
        self._worn.take_off(self.model)
        self._step_losses: list[torch.Tensor] = []
        self._sums: dict[str, dict[str, torch.Tensor | int]] = {
            "train": defaultdict(int),
            "eval": defaultdict(int),
        }
        self._tokens_seen: torch.Tensor | int = 0
        self._pieces, self._held_out_pieces, self.is_in_backward = Pieces(), Pieces(), False
        self.num_positions = self.num_micro_batches = self.num_passes = 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        why = self._why_trls_loss
        if "input_ids" not in inputs and not self._needs_logits:
            why = "The batches hold no input_ids"
        if return_outputs or self._needs_logits or why is not None:
            return self._trls_loss(model, inputs, return_outputs, num_items_in_batch, why)
        with self._worn:
            tokens = model(**inputs, token_losses=self._terms[self.model.training])
        divisor = tokens.weights.sum() if num_items_in_batch is None else num_items_in_batch
        # Clamped so that a batch without trained tokens is a finite zero.
        total = (tokens.losses * tokens.weights).sum()
        loss = total / torch.as_tensor(divisor, device=total.device).clamp(min=1e-12)
        self._count(inputs, tokens, total)
        if self.model.training:
            self._step_losses.append(loss.detach())
            self.is_in_backward = True
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The divisor counts the tokens of every process, and DDP averages the gradients over them.
            loss = loss * self.accelerator.num_processes
        return loss

    def _trls_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        num_items_in_batch: torch.Tensor | int | None,
        why: str | None,
    ) -> Any:
        """The loss as TRL computes it, for what this trainer's own is not exact for, or has no logits for."""
        for name, words in _OWN_INPUTS.items():
            if inputs.get(name) is not None:
                raise ConfigError(
                    f"The rows {words}, which TRL's own loss would ignore",
                    where=why or "",
                    fix="leave them out; or loss_type, compute_metrics and loss functions where they are given",
                )
        self._say(why)
        self._count_tokens(inputs)
        with self._worn:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.model.training:
            self._step_losses.append((result[0] if return_outputs else result).detach())
        return result

    def _say(self, why: str | None) -> None:
        if why is not None and why not in self._said and self.accelerator.is_main_process:
            self._said.add(why)
            _log.warning("%s: TRL's own loss is used.", why)

    @property
    def _needs_logits(self) -> bool:
        return bool(
            self.compute_loss_func is not None
            or self.args.loss_type != "nll"
            or getattr(self, "aux_loss_enabled", False)
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the rows trained on so far, by this process.

        `num_positions` were computed for them, and `num_micro_batches` in `num_passes`.
        """
        return int(self._tokens_seen)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.num_micro_batches += len(batches)
        self._pieces.begin_step()
        # The ranks of a group have to agree on the number of passes, and DeepSpeed counts them itself.
        alone = self.args.world_size == 1 and not self.is_deepspeed_enabled
        if alone and len(batches) > 1 and all("rows" in batch for batch in batches):
            longest = max(batch["segments"].longest for batch in batches)
            together = share_step(
                batches,
                max_positions=self._max_positions,
                copy_cost=copy_cost(self.model, self.args.device, longest=longest),
            )
            batches = [_NOTHING] * (len(batches) - len(together)) + together
        return batches, num_items

    @functools.cached_property
    def _max_positions(self) -> int | None:
        """Positions of the batch that holds the longest sequence, padded; None where lengths are not known."""
        name = self.args.length_column_name
        if not isinstance(self.train_dataset, Dataset) or name not in self.train_dataset.column_names:
            return None
        return int(self._train_batch_size * max(self.train_dataset[name][:]))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> Any:
        if inputs is _NOTHING:
            return torch.zeros((), device=self.args.device)
        if num_items_in_batch is None or not self._may_be_cut:
            return super().training_step(model, inputs, num_items_in_batch)
        one_pass = functools.partial(super().training_step, model, num_items_in_batch=num_items_in_batch)
        passes = Passes(self, one_pass, self._draws)
        return self._pieces.run(inputs, passes, when=f"at step {self.state.global_step + 1}")

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        step = functools.partial(super().prediction_step, model)
        if not (prediction_loss_only and self._may_be_cut and self._is_held_out_by_token):
            return step(inputs, prediction_loss_only, *args, **kwargs)
        passes = Passes(self, lambda batch: step(batch, True, *args, **kwargs)[0])
        when = f"in the held-out loss after step {self.state.global_step}"
        self._held_out_pieces.begin_step()
        # `evaluation_loop` counts tokens, so that this sum is read by nobody.
        return self._held_out_pieces.run(inputs, passes, when=when), None, None

    @functools.cached_property
    def _may_be_cut(self) -> bool:
        """Whether rows may be computed in other company: the loss is their sum, and gradients are this process's."""
        alone = self.args.world_size == 1 and self.args.n_gpu <= 1 and not self.is_deepspeed_enabled
        steps_in_backward = word_of(self.args.optim) in ("lomo", "adalomo")
        own_loss = not self._needs_logits and self._why_trls_loss is None
        return alone and own_loss and not self.is_fsdp_enabled and not steps_in_backward

    @property
    def _is_held_out_by_token(self) -> bool:
        """Whether the held-out loss is what `compute_loss` here has counted, and nobody changes it afterwards."""
        return True

    @functools.cached_property
    def _draws(self) -> bool:
        """Whether passes draw random numbers: dropout, or NEFTune's noise."""
        drop = any(isinstance(part, nn.Dropout) and part.p > 0 for part in self.model.modules())
        return drop or bool(self.args.neftune_noise_alpha)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        sizes = {"training": self._pieces.most_positions, "evaluation": self._held_out_pieces.most_positions}
        if any(sizes.values()):
            self.state.stateful_callbacks[_MOST_POSITIONS] = {"args": {}, "attributes": sizes}
        super()._save_checkpoint(*args, **kwargs)

    def _load_callback_state(self) -> None:
        """Cut passes as before the checkpoint: sums in another order have other last bits."""
        kept = self.state.stateful_callbacks.pop(_MOST_POSITIONS, {}).get("attributes", {})
        self._pieces.most_positions = kept.get("training")
        self._held_out_pieces.most_positions = kept.get("evaluation")
        super()._load_callback_state()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Where rows come from is nothing to compute with."""
        prepared: dict[str, Any] = super()._prepare_inputs(
            {name: value for name, value in inputs.items() if name != "origins"}
        )
        return prepared

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if not any(_LOSS_WEIGHTS in batch for batch in batch_samples):
            return super()._get_num_items_in_batch(batch_samples, device)
        total = sum(trained_weight(batch) for batch in batch_samples)
        total = torch.as_tensor(total, device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return total

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        step_loss, self._step_losses = sum(self._step_losses), []
        # The loss scaler of fp16 meets infinite gradients by design, and skips their step itself.
        checked = {"loss": step_loss} if self.args.fp16 else {"loss": step_loss, "gradient": grad_norm}
        for name, value in checked.items():
            if value is not None and not math.isfinite(float(value)):
                raise NonFiniteError(
                    f"The {name} is {float(value)} at optimizer step {self.state.global_step + 1}",
                    expected="a finite number; nothing was written with this one",
                    fix="lower learning_rate, set max_grad_norm, and look at the rows of this step; "
                    "the last checkpoint is intact and can be resumed from",
                )
        return grad_norm

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if is_new and self.loraplus_lr_ratio is not None:
            raise_rate_of_B(optimizer, self.model if model is None else model, self.loraplus_lr_ratio)
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        if resume_from_checkpoint is True:
            # None there is for the library to say.
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        finished = _finished_step(resume_from_checkpoint, self._num_planned_steps)
        if finished is not None:
            # transformers 5.23 takes one more optimizer step here when the last epoch was cut by max_steps.
            self._load_from_checkpoint(str(resume_from_checkpoint))
            state = str(Path(str(resume_from_checkpoint)) / TRAINER_STATE_NAME)
            self.state = TrainerState.load_from_json(state)
            return TrainOutput(finished, 0.0, {})
        with self._worn:
            output: TrainOutput = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            return output

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self._worn:
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with self._worn:
            return super().predict(*args, **kwargs)

    def _num_planned_steps(self) -> int:
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        batches = len(self.get_train_dataloader())
        per_epoch = max(1, math.ceil(batches / self.args.gradient_accumulation_steps))
        return math.ceil(float(self.args.num_train_epochs) * int(per_epoch))

    def _count(self, inputs: dict[str, Any], tokens: TrainedTokens, total: torch.Tensor) -> None:
        """Sums for the next log, kept on the device."""
        assert tokens.correct is not None and tokens.weights is not None and tokens.entropies is not None
        sums = self._sums["train" if self.model.training else "eval"]
        # Not in place: a pass that is done again takes its counts back.
        sums["mean_token_accuracy"] = sums["mean_token_accuracy"] + (tokens.correct * tokens.weights).sum()
        sums["entropy"] = sums["entropy"] + (tokens.entropies * tokens.weights).sum()
        sums["trained"] = sums["trained"] + tokens.weights.sum()
        sums["loss"] = sums["loss"] + total.detach()
        self._count_tokens(inputs)

    def _count_tokens(self, inputs: dict[str, Any]) -> None:
        if not self.model.training:
            return
        mask = inputs.get("attention_mask")
        positions = (
            inputs["input_ids"].numel() if "input_ids" in inputs else inputs["inputs_embeds"][..., 0].numel()
        )
        self.num_positions += positions
        self.num_passes += 1
        seen = inputs.get("num_tokens", positions if mask is None else mask.sum())
        self._tokens_seen = self._tokens_seen + seen

    def counts(self) -> tuple[Any, ...]:
        """What the passes of training have counted, for `put_back`."""
        sums, losses = dict(self._sums["train"]), list(self._step_losses)
        return sums, losses, self._tokens_seen, self.num_positions, self.num_passes

    def put_back(self, counts: tuple[Any, ...]) -> None:
        sums, losses, self._tokens_seen, self.num_positions, self.num_passes = counts
        self._sums["train"], self._step_losses = defaultdict(int, sums), list(losses)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As the library's, with the loss of all trained tokens in the place of the mean over batches."""
        self._sums["eval"].clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums, name = self._sums["eval"], f"{metric_key_prefix}_loss"
        if sums["trained"] > 0 and name in output.metrics and self._is_held_out_by_token:
            output.metrics[name] = self._across(sums["loss"]) / self._across(sums["trained"])
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        sums, metrics = self._sums[mode], self._metrics[mode]
        if sums["trained"] > 0:
            trained = self._across(sums["trained"])
            for name in ("mean_token_accuracy", "entropy"):
                metrics[name] = [self._across(sums[name]) / trained]
            metrics["num_tokens"] = []
        if "num_tokens" in metrics:
            metrics["num_tokens"] = [self._across(self._tokens_seen)]
        sums.clear()
        super().log(logs, start_time)

    def _across(self, count: torch.Tensor | int) -> float:
        """A count summed over all processes."""
        total = torch.as_tensor(count, device=self.accelerator.device, dtype=torch.float64)
        return float(self.accelerator.reduce(total, reduction="sum"))


def _finished_step(checkpoint: str | bool | None, planned: Any) -> int | None:
    """The step of a checkpoint that already is at the end of its run, else None."""
    if not isinstance(checkpoint, str | Path):
        return None
    state_file = Path(checkpoint) / TRAINER_STATE_NAME
    if not state_file.is_file():
        return None
    step = int(read_json(state_file, RunError)["global_step"])
    return step if step >= planned() else None
