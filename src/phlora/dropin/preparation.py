"""A script's data sets on their way into the trainer: the columns that it means, and a look at what comes of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError
from trl.trainer.sft_config import SFTConfig as TrlConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TrlCollator

from phlora.data.chat_template import ChatTemplate, chat_template
from phlora.data.table import IGNORED
from phlora.dropin.columns import (
    CHATS,
    OTHERWISE_SHAPED,
    PAIR,
    Rows,
    as_meant,
    columns_of,
    formatted,
    tell_unused_text,
    with_known_roles,
    without_others_tokens,
)
from phlora.dropin.rows import Wanted, look, show
from phlora.dropin.tell import warn
from phlora.errors import DataError
from phlora.models.families import stop_token_ids


def ready(trainer: Any, dataset: Any, args: TrlConfig, formatting_func: Any, name: str) -> Any:
    """The rows of a data set as the script means them."""
    dataset = without_others_tokens(dataset, name=name, text_field=args.dataset_text_field)
    if "input_ids" in columns_of(dataset):
        return dataset
    if formatting_func is not None:
        return formatted(dataset, formatting_func, text_field=args.dataset_text_field, name=name)
    rows = as_meant(
        dataset,
        name=name,
        text_field=args.dataset_text_field,
        is_text_named=_names_text(args) and not trainer._marks_answers,
    )
    tell_unused_text(rows, name=name, text_field=args.dataset_text_field)
    template = _template_of(trainer)
    return rows if template is None else with_known_roles(rows, template, name=name)


@contextmanager
def template_errors(rows: Rows, name: str) -> Iterator[None]:
    """What a chat template raises while TRL renders chats with it.

    Raises:
        DataError: in its place.
    """
    try:
        yield
    except (TemplateError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        if isinstance(error, RuntimeError):
            if "no assistant tokens" not in str(error):
                raise
            raise DataError(
                "A chat has no answer, and answers alone should train (assistant_only_loss)",
                where=name,
                expected="a turn of the assistant in every row",
                fix="leave out rows without one",
            ) from error
        if not {*CHATS, *PAIR} & set(columns_of(rows)):
            raise
        raise DataError(
            f"A chat cannot be prepared: {error}",
            where=name,
            expected="messages with a role that the chat template knows, in its order, and a text as content",
            fix="`phlora data check FILE --model MODEL` names the rows",
        ) from error


def look_at(trainer: Any, prepared: Any, args: TrlConfig, packing: bool, name: str) -> None:
    """Tell what will be trained; packs that split rows lose nothing of them.

    Raises:
        DataError: rows would be trained as something else than what they say, or nothing of them.
    """
    loses = not packing or args.packing_strategy == "bfd"
    tokenizer = trainer._tokenizer
    config = getattr(trainer.model, "generation_config", None) if hasattr(trainer, "model") else None
    wanted = Wanted(
        tokenizer=tokenizer,
        template=_template_of(trainer),
        is_masked=bool(args.assistant_only_loss or trainer._marks_answers or args.completion_only_loss),
        max_length=args.max_length if loses else None,
        stop_ids=stop_token_ids(tokenizer, config),
        keeps_end=not packing and args.truncation_mode == "keep_end",
        is_packed=packing,
        heeds_turns=trainer._marks_answers,
    )
    found = look(prepared, wanted, name=name)
    show(found, tokenizer, row_problems=trainer.row_problems, with_preview=name == "train")


def _template_of(trainer: Any) -> ChatTemplate | None:
    tokenizer = trainer._tokenizer
    return chat_template(tokenizer, trainer.chat_template) if tokenizer.chat_template else None


def _names_text(args: TrlConfig) -> bool:
    """Whether the script says which column holds the texts; TRL's default is `text`, and masks are for chats."""
    if args.assistant_only_loss or args.completion_only_loss:
        return False
    return "dataset_text_field" in getattr(args, "given", ()) or args.dataset_text_field != "text"


def with_trained_columns(call: dict[str, Any]) -> dict[str, Any]:
    """The same call with the columns that are trained alone: TRL looks at the first row before it prepares any."""
    args, text = call["args"], call.get("formatting_func") is not None
    if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        return call
    if text:
        if args.completion_only_loss is None:
            # TRL takes it from the columns, which the texts replace.
            args = copy.copy(args)
            args.completion_only_loss = False
        return {**call, "args": args}

    def meant(rows: Any, name: str) -> Any:
        if isinstance(rows, Mapping):
            return {key: meant(value, str(key)) for key, value in rows.items()}
        if not isinstance(rows, Rows) or {"image", "images"} & set(columns_of(rows)):
            return rows
        return as_meant(rows, name=name, text_field=args.dataset_text_field, is_text_named=_names_text(args))

    sets = {f"{name}_dataset": meant(call.get(f"{name}_dataset"), name) for name in ("train", "eval")}
    return {**call, **{key: value for key, value in sets.items() if value is not None}}


@dataclass(frozen=True)
class WithoutLabels:
    """A data collator that gets rows without their labels."""

    collator: Any

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        return self.collator([{name: row[name] for name in row if name != "labels"} for row in rows])


def look_at_collator(trainer: Any) -> None:
    """A script's own data collator decides about labels once more: what it leaves untrained is told.

    What it raises with rows as they will be trained is raised here, before anything is trained.
    """
    rows, collator = trainer.train_dataset, trainer.data_collator
    if (
        isinstance(collator, TrlCollator)
        or not isinstance(rows, Dataset)
        or "labels" not in rows.column_names
    ):
        return
    as_trained = trainer._remove_unused_columns(rows, "training")
    first = [as_trained[number] for number in range(min(4, len(rows)))]
    try:
        made = collator(copy.deepcopy(first))
    except OTHERWISE_SHAPED as error:
        # Earlier versions of TRL left it to the collator to make labels.
        bare = WithoutLabels(collator)
        try:
            made = bare(copy.deepcopy(first))
        except OTHERWISE_SHAPED:
            raise error from None
        trainer.data_collator = bare
        warn(
            f"{type(collator).__name__} makes labels of its own, so it is given rows without the prepared ones"
        )
    labels = made.get("labels") if isinstance(made, Mapping) else None
    if labels is None:
        return
    stops = set(stop_token_ids(trainer._tokenizer))
    before = {int(label) for row in first for label in row["labels"]} - {IGNORED}
    after = set(labels.flatten().tolist()) - {IGNORED}
    if before and not after:
        warn(f"{type(collator).__name__} leaves no token of the first rows to train")
    for stop in sorted(stops & before - after):
        token = trainer._tokenizer.convert_ids_to_tokens(stop)
        is_pad = stop == trainer._tokenizer.pad_token_id
        warn(
            f"{type(collator).__name__} leaves {token} untrained, which ends an answer"
            + (": pad_token is the same token; set another, such as unk_token" if is_pad else "")
        )
