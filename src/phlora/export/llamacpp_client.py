"""llama.cpp as a client, by the `xllamacpp` wheel: its server in this process, asked over loopback as anybody asks it.

Prompts go the way of a chat: the template in the file renders them, and its vocabulary makes them tokens. Adapters are
named with their scale in every request, since a request without a list means all of them at once.
"""

from __future__ import annotations

import json
import math
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from phlora.errors import EnvironmentProblem
from phlora.export.agreement import Answer, Question

_SECONDS = 600
# Tokens of which the log-probability is told at each position; only the chosen one is read.
_TOLD = 1


class LlamaCppClient:
    """A server with one GGUF model, and an adapter at a scale where there is one."""

    def __init__(self, server: Any, *, scale: float | None) -> None:
        self.name = f"llama.cpp (xllamacpp {version('xllamacpp')})"
        self._server, self._scale = server, scale

    def prompt_ids(self, question: Question) -> list[int]:
        """By the template and the vocabulary in the file."""
        if question.messages is None:
            return question.prompt_ids
        request: dict[str, Any] = {"messages": list(question.messages)}
        if question.tools:
            request["tools"] = question.tools
        text = self._ask("/apply-template", request)["prompt"]
        return [
            int(token)
            for token in self._ask(
                "/tokenize", {"content": text, "add_special": True, "parse_special": True}
            )["tokens"]
        ]

    def answer(self, prompt_ids: Sequence[int], *, max_new_tokens: int) -> Answer:
        request: dict[str, Any] = {
            "prompt": list(prompt_ids),
            "n_predict": max_new_tokens,
            "temperature": 0.0,
            "top_k": 1,
            "n_probs": _TOLD,
            "return_tokens": True,
            "cache_prompt": False,
        }
        if self._scale is not None:
            request["lora"] = [{"id": 0, "scale": self._scale}]
        done = self._ask("/completion", request)
        told = done.get("completion_probabilities", [])
        stopped = done.get("stop_type") == "eos"
        ids = [int(token) for token in done["tokens"]]
        if stopped:
            # The token that ends the answer is among them.
            ids = ids[:-1]
        logprobs = _of_the_beginning(ids, told)
        return Answer(token_ids=ids, logprobs=logprobs, stopped=stopped)

    def text(self, ids: Sequence[int]) -> str:
        return str(self._ask("/detokenize", {"tokens": list(ids)})["content"])

    def _ask(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps(request).encode()
        asked = urllib.request.Request(
            self._server.listening_address + path, data=body, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=_SECONDS) as reply:
            answered: dict[str, Any] = json.load(reply)
        return answered


def _of_the_beginning(ids: Sequence[int], told: Sequence[dict[str, Any]]) -> list[float]:
    """The log-probabilities of the first tokens: the server tells none of a token that ends inside of a character."""
    whole = len(told) >= len(ids)
    found: list[float] = []
    for place, (token, step) in enumerate(zip(ids, told, strict=False)):
        repeats = place + 1 < len(ids) and ids[place + 1] == token
        if step["id"] != token or (repeats and not whole):
            break
        # Null stands for what is no number: the weights are broken.
        found.append(-math.inf if step["logprob"] is None else float(step["logprob"]))
    return found


@contextmanager
def open_gguf(
    model: Path, *, adapter: Path | None = None, scale: float = 1.0, context: int
) -> Iterator[LlamaCppClient]:
    """Open a GGUF model, with an adapter file on it or without.

    Args:
        context: tokens of prompt and answer; longrope's factors are chosen by it.

    Raises:
        EnvironmentProblem: llama.cpp does not open it.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx = context
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = max(1, torch.get_num_threads())
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), scale)]
    try:
        server = xllamacpp.Server(params)
    except Exception as error:  # what llama.cpp's bindings raise has no type of its own
        raise EnvironmentProblem(
            f"llama.cpp does not open the file ({error})", where=str(adapter or model)
        ) from None
    try:
        yield LlamaCppClient(server, scale=scale if adapter is not None else None)
    finally:
        del server
