"""Stock PEFT and stock transformers as clients: what was exported, opened as their own users open it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from phlora.export.agreement import Answer, Question
from phlora.export.output import no_bars
from phlora.models.locate import Location
from phlora.others import without_known_warnings


class TorchClient:
    """A model of transformers, with an adapter by PEFT or without, and the tokenizer beside it."""

    def __init__(self, name: str, model: Any, tokenizer: Any, stop_token_ids: Sequence[int]) -> None:
        self.name = name
        self._model, self._tokenizer, self._stops = model, tokenizer, list(stop_token_ids)

    def prompt_ids(self, question: Question) -> list[int]:
        """By `apply_chat_template` of the exported tokenizer."""
        if question.messages is None:
            return question.prompt_ids
        encoded = self._tokenizer.apply_chat_template(
            list(question.messages), tools=question.tools, add_generation_prompt=True, return_dict=True
        )
        return list(encoded["input_ids"])

    @torch.no_grad()
    def answer(self, prompt_ids: Sequence[int], *, max_new_tokens: int) -> Answer:
        """By `generate`, with the generation settings that were exported."""
        ids = torch.tensor([list(prompt_ids)])
        done = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=self._stops,
            pad_token_id=self._tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
        new = done.sequences[0, ids.shape[1] :].tolist()
        stopped = bool(new) and new[-1] in self._stops
        kept = new[:-1] if stopped else new
        logprobs = [
            step[0].float().log_softmax(-1)[token].item()
            for step, token in zip(done.logits, kept, strict=False)
        ]
        return Answer(token_ids=kept, logprobs=logprobs, stopped=stopped)

    def text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids)))


def open_adapter(folder: Path, base: Location, stop_token_ids: Sequence[int]) -> TorchClient:
    """An adapter folder on its base, by PEFT."""
    with without_known_warnings(), no_bars():
        model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32, **base.kwargs)
        tuned = PeftModel.from_pretrained(model, str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return TorchClient(f"PEFT {version('peft')}", tuned, tokenizer, stop_token_ids)


def open_model(folder: Path) -> TorchClient:
    """A whole model, by transformers; it ends replies where its own generation settings say."""
    with no_bars():
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    return TorchClient(f"transformers {version('transformers')}", model.eval(), tokenizer, stops)
