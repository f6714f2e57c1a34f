"""Whether a client answers like the run's own model: the same prompts, token by token.

Prompt ids come first, since a wrong template or tokenizer spoils everything after it. Then both answer greedily: the
tokens, the log-probability of each as long as both write the same, and whether both stop. What a client takes, in which
file and by which library, is the client's matter: any that has `Client` can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch

from phlora.data.prompts import PromptItem, encode_prompt
from phlora.data.rows import Message, Row
from phlora.errors import Finding
from phlora.models.families import context_lengths
from phlora.models.generate import generate
from phlora.models.tokenizer import LoadedTokenizer

REPORT_IT = "report it with this text; phlora merge writes a model for other converters"
# The likeliest tokens that are kept of the own model at each position, to tell a near tie.
_KEPT = 8


@dataclass(frozen=True, kw_only=True)
class Question:
    """A held-out prompt, and its ids as the run made them."""

    messages: tuple[Message, ...] | None
    tools: list[Any] | None
    prompt_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is answered greedily.

    Attributes:
        token_ids: without the token that ends it.
        logprobs: of each, natural logarithm; of the first ones where the client does not tell all, None where none.
        stopped: it ended itself.
        likeliest: of the own model: the likeliest tokens at each position with their log-probabilities.
    """

    token_ids: list[int]
    logprobs: list[float] | None
    stopped: bool
    likeliest: tuple[Mapping[int, float], ...] = ()


class Client(Protocol):
    """A program that has opened what was exported."""

    name: str

    def prompt_ids(self, question: Question) -> list[int]:
        """The ids that the client makes of the messages, by its own template and tokenizer."""

    def answer(self, prompt_ids: Sequence[int], *, max_new_tokens: int) -> Answer:
        """Its greedy answer."""

    def text(self, ids: Sequence[int]) -> str:
        """Ids as text, markers included."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What is accepted of a client.

    Attributes:
        largest: difference of log-probabilities; of two tokens of which each side took another, how much likelier one
            may be for the own model. None: anything, since the weights were rounded on purpose, as long as not every
            answer is another one from its first token on.
        weights: of a tensor in the file against the merged one, relative to its norm; None: not measured.
        loss: that the weights in the file may cost on the held-out rows, in nats a token; None: not measured.
    """

    largest: float | None
    weights: float | None = None
    loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a client's answers differ from those of the run's own model.

    Attributes:
        client: name and version.
        verified: it was compared, and is within the bound.
        num_prompts: held-out prompts that were compared; those beyond the window or the original context are left out.
        num_left_out: so many were.
        prompts_differing: prompts of which the client makes other tokens.
        first_difference: the first of them, as text.
        num_tokens: answer tokens that both wrote, up to the first difference.
        changed_answers: prompts that are answered otherwise.
        largest_gap: where answers part, how much likelier the own model finds its own token, in nats.
        largest_difference, mean_difference: of the log-probabilities of tokens that both wrote, in nats.
        stops_differing: answers with the same tokens of which one side ended and the other went on, past the very
            token that ends it included, which is refused whatever the weights were rounded to.
        bound: accepted of `largest_difference` and `largest_gap`; None: these have none.
        weights_apart: the largest relative difference of a tensor in the file from the merged one; None where the file
            holds no whole model.
        weights_bound, loss_bound: accepted of it, and of what `losses` differ by.
        losses: of the held-out answers in nats a token: `own` of the run's own model, `file` with the weights as they
            are in the file; empty where the file holds no whole model.
        missing: what the comparison leaves open, or why there is none.
    """

    client: str
    verified: bool
    num_prompts: int = 0
    num_left_out: int = 0
    prompts_differing: int = 0
    first_difference: str = ""
    num_tokens: int = 0
    changed_answers: int = 0
    largest_gap: float = 0.0
    largest_difference: float | None = None
    mean_difference: float | None = None
    stops_differing: int = 0
    bound: float | None = None
    weights_apart: float | None = None
    weights_bound: float | None = None
    loss_bound: float | None = None
    losses: Mapping[str, float] = field(default_factory=dict)
    missing: str = ""

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    def summary(self) -> str:
        """A few lines for people."""
        if not self.num_prompts:
            return f"Written, not verified: {self.missing}"
        told = [
            f"{'Verified' if self.verified else 'NOT verified'} in {self.client}, "
            f"on {self.num_prompts} held-out prompts"
            + (f" ({self.num_left_out} left out: too long)" if self.num_left_out else ""),
            f"  prompts with other tokens  {self.prompts_differing} of {self.num_prompts}"
            + (f": {self.first_difference}" if self.first_difference else ""),
            f"  answers that changed       {self.changed_answers} of {self.num_prompts}"
            + (f" (at most {self.largest_gap:.2g} nats from a tie)" if self.changed_answers else ""),
            f"  answers that stop apart    {self.stops_differing} of {self.num_prompts}",
        ]
        if self.largest_difference is not None:
            accepted = "compared, no bound" if self.bound is None else f"accepted: {self.bound:g}"
            told.append(
                f"  log-probabilities          {self.largest_difference:.2g} apart at most, "
                f"{self.mean_difference:.2g} on average, of {self.num_tokens:,} tokens (nats; {accepted})"
                if self.num_tokens
                else "  log-probabilities          no token to compare"
            )
        if self.weights_apart is not None:
            told.append(
                f"  weights in the file        {self.weights_apart:.2g} of a tensor's norm from the merged ones "
                f"at most{_accepted(self.weights_bound)}"
            )
        if self.losses:
            told.append(
                f"  loss on held-out rows      {self.losses['own']:.4f}, with the weights in the file "
                f"{self.losses['file']:.4f}{_accepted(self.loss_bound, sign='+')}"
            )
        if self.missing:
            told.append(f"  {self.missing}")
        return "\n".join(told)


def _accepted(bound: float | None, sign: str = "") -> str:
    return "" if bound is None else f" (accepted: {sign}{bound:g})"


def with_weights(
    verdict: Verdict, bound: Bound, *, apart: float | None, losses: Mapping[str, float]
) -> Verdict:
    """A verdict, and what was measured of the weights in the file; beyond their bounds it is not verified."""
    within = verdict.verified
    if apart is not None and bound.weights is not None:
        within = within and apart <= bound.weights
    if losses and bound.loss is not None:
        within = within and losses["file"] - losses["own"] <= bound.loss
    return replace(
        verdict,
        verified=within,
        weights_apart=apart,
        weights_bound=None if apart is None else bound.weights,
        loss_bound=bound.loss if losses else None,
        losses=losses,
    )


def questions_of(
    rows: Sequence[Row], tokenizer: LoadedTokenizer, config: Any, *, max_new_tokens: int, most: int
) -> tuple[list[Question], int]:
    """The first prompts that stay, with their answer, within the window and the original context; how many did not.

    Clients choose between longrope's factors by the size of the context, not by the row, and some leave the window out.
    """
    lengths = context_lengths(config)
    limits = (lengths.max_tokens, lengths.original_max_tokens, lengths.sliding_window_tokens)
    room = min((limit for limit in limits if limit), default=2**31) - max_new_tokens
    found: list[Question] = []
    left_out = 0
    for row in rows:
        prompt: PromptItem | None = encode_prompt(row, tokenizer.tokenizer)
        if prompt is None or len(found) == most:
            continue
        if len(prompt.prompt_ids) > room:
            left_out += 1
            continue
        found.append(
            Question(messages=prompt.messages, tools=prompt.tools, prompt_ids=list(prompt.prompt_ids))
        )
    return found, left_out


def own_answers(
    model: Any, tokenizer: LoadedTokenizer, questions: Sequence[Question], *, max_new_tokens: int
) -> list[Answer]:
    """What the run's own model answers, with the likeliest tokens at each position."""
    answers = generate(
        model,
        [question.prompt_ids for question in questions],
        max_new_tokens=max_new_tokens,
        stop_token_ids=tokenizer.stop_token_ids,
        pad_token_id=int(tokenizer.tokenizer.pad_token_id),
    )
    return [
        _scored(model, question.prompt_ids, answer, stopped=len(answer) < max_new_tokens)
        for question, answer in zip(questions, answers, strict=True)
    ]


@torch.no_grad()
def _scored(model: Any, prompt: Sequence[int], answer: Sequence[int], *, stopped: bool) -> Answer:
    ids = torch.tensor([[*prompt, *answer]], device=next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float().cpu()
    logprobs = logits.log_softmax(-1)
    values, tokens = logprobs.topk(min(_KEPT, logprobs.shape[-1]))
    likeliest = tuple(
        dict(zip(row.tolist(), value.tolist(), strict=True))
        for row, value in zip(tokens, values, strict=True)
    )
    own = [logprobs[place, token].item() for place, token in enumerate(answer)]
    return Answer(token_ids=list(answer), logprobs=own, stopped=stopped, likeliest=likeliest)


def compare_client(
    client: Client,
    questions: Sequence[Question],
    own: Sequence[Answer],
    *,
    max_new_tokens: int,
    bound: Bound,
    num_left_out: int = 0,
    missing: str = "",
) -> Verdict:
    """Ask a client the same prompts, and count what differs."""
    prompts_differing, first, changed, stops, gap = 0, "", 0, 0, 0.0
    runs_on = 0
    differences: list[float] = []
    told = True
    num_tokens = 0
    for question, mine in zip(questions, own, strict=True):
        theirs_ids = client.prompt_ids(question)
        if theirs_ids != question.prompt_ids:
            prompts_differing += 1
            first = first or _where_prompts_part(question.prompt_ids, theirs_ids, client)
        theirs = client.answer(question.prompt_ids, max_new_tokens=max_new_tokens)
        same = _common(mine.token_ids, theirs.token_ids)
        num_tokens += same
        if theirs.logprobs is None or mine.logprobs is None:
            told = False
        else:
            both = range(min(same, len(theirs.logprobs)))
            differences += [abs(mine.logprobs[i] - theirs.logprobs[i]) for i in both]
        if mine.token_ids != theirs.token_ids:
            changed += 1
            apart = _gap(mine, theirs, same)
            gap = max(gap, apart)
            # The client took the very token that ends the own answer, and went on.
            runs_on += mine.stopped and same == len(mine.token_ids) < len(theirs.token_ids) and not apart
        elif mine.stopped != theirs.stopped:
            stops += 1
    largest = max(differences, default=0.0) if told else None
    if bound.largest is None:
        # Every answer another one from its first token on: no rounding, and nothing that was compared.
        within = bool(num_tokens) or changed < len(questions)
    else:
        within = (largest or 0.0) <= bound.largest and gap <= bound.largest and not stops
    return Verdict(
        client=client.name,
        verified=within and not prompts_differing and not runs_on,
        num_prompts=len(questions),
        num_left_out=num_left_out,
        prompts_differing=prompts_differing,
        first_difference=first,
        num_tokens=num_tokens,
        changed_answers=changed,
        largest_gap=gap,
        largest_difference=largest,
        mean_difference=sum(differences) / max(1, len(differences)) if told else None,
        stops_differing=stops + runs_on,
        bound=bound.largest,
        missing=missing,
    )


def require_verified(verdict: Verdict, *, where: str, kept: str, fix: str) -> None:
    """Refuse what its client runs otherwise.

    Raises:
        Finding: it was compared, and is beyond the bound.
    """
    if verdict.num_prompts and not verdict.verified:
        raise Finding(
            f"{verdict.client} does not answer like the run's own model; {kept}\n{verdict.summary()}",
            where=where,
            fix=fix,
        )


def _common(mine: Sequence[int], theirs: Sequence[int]) -> int:
    for place, (left, right) in enumerate(zip(mine, theirs, strict=False)):
        if left != right:
            return place
    return min(len(mine), len(theirs))


def _gap(mine: Answer, theirs: Answer, place: int) -> float:
    """How much likelier the own model finds what it did than what the client did, where they part."""
    likeliest = mine.likeliest[place]
    best = max(likeliest.values())
    lowest = min(likeliest.values())
    if place < len(theirs.token_ids):
        return best - likeliest.get(theirs.token_ids[place], lowest)
    # The client ended where the own model went on: by which token is not told.
    return best - sorted(likeliest.values())[-2]


def _where_prompts_part(own: Sequence[int], theirs: Sequence[int], client: Client) -> str:
    place = _common(own, theirs)
    sides = [client.text(ids[place : place + 6]) for ids in (own, theirs)]
    return f"at token {place} of {len(own)}: {sides[0]!r} became {sides[1]!r}"
