"""What `full_size.py` runs in processes of their own on Phlora's side: loading, training steps, a chat."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from common import Shapes, flops_of, gemm_rate, timed, work_of_rows, work_of_segments
from peer import Row, lora_settings, make_trainer, measured_step, set_adapter, trained_steps
from phlora.data.collate import SharedPrefixCollator
from phlora.data.dataset import load_rows
from phlora.models.tokenizer import load_tokenizer
from resident import end_first_when_memory_is_short, peak_bytes
from rowsets import token_rows


def demo_rows(folder: str, file: str, count: int) -> list[Row]:
    """Some of the rows of a file of chats as tokens of a model, in an order that a seed gives."""
    rows = random.Random(7).sample(load_rows(file).rows, count)
    return token_rows(rows, load_tokenizer(folder).tokenizer)


class Steps:
    """Phlora's training steps, with what `phlora train` puts on a model. The methods are those of `peer.Peer`.

    Args:
        folder: of the model.
        fields: of `load_model`: dtype, quantization and the like.
        start: B is zero, as training begins.
    """

    def __init__(self, folder: str, fields: dict[str, Any], start: bool = False) -> None:
        import phlora
        from phlora.adapters.attach import attach
        from phlora.adapters.speed import speed_up
        from phlora.models.load import load_model

        end_first_when_memory_is_short()
        started = time.perf_counter()
        loaded = load_model(folder, device="cpu", **fields)
        self._loading = {
            "seconds": time.perf_counter() - started,
            "peak": peak_bytes(),
            "dtype": str(loaded.dtype.value).removeprefix("torch."),
            "why": loaded.dtype.reason,
        }
        self.model = attach(loaded.model, lora_settings()).model
        speed_up(self.model)
        set_adapter(self.model, start=start)
        self.model.train()
        self.trainer = make_trainer(phlora.SFTTrainer, self.model, loaded.tokenizer.tokenizer)
        self.dtype = loaded.dtype.value

    def loading(self) -> dict[str, Any]:
        """Seconds that loading took, its peak, and what was chosen to compute with."""
        return self._loading

    def step(self, rows: Sequence[Row], layout: str = "shared", *, trim: bool = False) -> dict[str, Any]:
        """Forward and backward of all rows; see `peer.measured_step`."""
        return measured_step(self.model, lambda: self._step(rows), trim=trim)

    def train(self, batches: Sequence[Sequence[Row]], layout: str, *, rate: float) -> dict[str, Any]:
        """One optimizer step for each batch; see `peer.trained_steps`."""
        return trained_steps(self.model, [lambda rows=rows: self._step(rows) for rows in batches], rate)

    def floor(self, rows: Sequence[Row]) -> dict[str, float]:
        """Seconds that the products of a step take alone, at this moment, with shared starts once and with each row."""
        shapes = Shapes.of(self.model.config)
        segments = SharedPrefixCollator()(rows)["segments"]
        plain = work_of_rows(rows)
        rate = gemm_rate(shapes, segments.num_positions, dtype=self.dtype)
        shared = work_of_segments(segments, plain.trained)
        return {
            "rate": rate,
            "seconds": flops_of(shapes, shared) / rate,
            "plain_seconds": flops_of(shapes, plain) / rate,
            "positions": segments.num_positions,
        }

    def profile(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Where the seconds of a step go: those of each operation itself, the longest first, and how often it ran."""
        from torch.profiler import ProfilerActivity, profile

        self.step(rows)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            result = self.step(rows)
        events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
        return {
            "seconds": result["seconds"],
            "peak": result["peak"],
            "operations": [
                {"name": event.key, "seconds": event.self_cpu_time_total / 1e6, "calls": event.count}
                for event in events[:25]
            ],
        }

    def _step(self, rows: Sequence[Row]) -> tuple[float, int]:
        batch = SharedPrefixCollator()(rows)
        positions = batch["input_ids"].numel()
        count = self.trainer._get_num_items_in_batch([batch], self.trainer.args.device)
        return float(self.trainer.training_step(self.model, batch, count)), positions


class Loading:
    """The model alone, as `load_model` loads it."""

    def __init__(self, folder: str, fields: dict[str, Any]) -> None:
        from phlora.models.load import load_model

        before = time.perf_counter()
        load_model(folder, device="cpu", **fields)
        self.result = {"seconds": time.perf_counter() - before, "peak": peak_bytes()}

    def loading(self) -> dict[str, Any]:
        return self.result


class Chat:
    """A chat with a run's tuned model, token by token on the clock."""

    def __init__(self, run: str, tokens: int) -> None:
        from phlora.display import Display
        from phlora.serve.chat import open_chat

        started = time.perf_counter()
        self.session = open_chat(run, max_new_tokens=tokens, display=Display(quiet=True))
        self.loaded_in = time.perf_counter() - started

    def ask(self, question: str) -> dict[str, Any]:
        """Seconds to the first token and tokens a second after it; the share that reading all weights once takes."""
        model = self.session.model
        times: list[float] = []
        hook = model.register_forward_hook(lambda *_: times.append(time.perf_counter()))
        started = time.perf_counter()
        try:
            for _ in self.session.ask(question):
                pass
        finally:
            hook.remove()
        per_token = (times[-1] - times[0]) / max(1, len(times) - 1)
        held = weight_bytes(model)
        bandwidth = read_bandwidth(min(held, 1 << 30))
        return {
            "loading_seconds": self.loaded_in,
            "first_token": times[0] - started,
            "tokens": len(times),
            "tokens_per_second": 1 / per_token if len(times) > 1 else 0.0,
            "weight_bytes": held,
            "read_bandwidth": bandwidth,
            "bandwidth_share": held / bandwidth / per_token if len(times) > 1 else 0.0,
            "peak": peak_bytes(),
        }


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes that one new token has to read: all parameters but the embedding, of which it reads one row."""
    embedding = model.get_input_embeddings().weight
    return sum(p.nbytes for p in model.parameters() if p is not embedding)


def read_bandwidth(size: int) -> float:
    """Bytes a second at which this machine reads memory: the fastest of a sum, a matrix by a vector and a copy.

    Args:
        size: bytes that are read, far more than the caches hold.
    """
    columns = 4096
    values = torch.ones(max(1, size // 4 // columns), columns)
    vector, other = torch.ones(columns), torch.empty_like(values)
    ways: list[tuple[Callable[[], Any], int]] = [
        (values.sum, values.nbytes),
        (lambda: values @ vector, values.nbytes),
        # What is written is read from memory first.
        (lambda: other.copy_(values), 2 * values.nbytes),
    ]
    return max(moved / min(timed(way) for _ in range(4)) for way, moved in ways)
