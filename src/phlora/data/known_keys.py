"""Every column and message key that data sets of other tools are known to have, and what is done with each.

This table is all there is: `heeding` reads rows by it, and docs/data.md lists it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Treatment = Literal["used", "converted", "warned", "refused"]


@dataclass(frozen=True)
class Known:
    """One meaning, under the names that it has in the wild.

    Attributes:
        names: of the columns or message keys.
        seen: the tools and data sets that have it.
        treatment: `used` as it is; `converted` into what Phlora has for it; `warned`: not used, and said;
            `refused`: an error, since to go on would train something else than the row says.
        what: what is done, or why not.
        fix: what a person can do.
    """

    names: tuple[str, ...]
    seen: str
    treatment: Treatment
    what: str
    fix: str = ""


TRAINED = ("train", "trainable", "training", "train_on_turn", "loss", "loss_mask")
UNTRAINED = ("masked",)
# As `masked`, where they are true or false.
EXCLUDED = (
    *("exclude", "excluded", "is_excluded", "ignore", "ignored", "skip", "skipped", "do_not_train"),
    *("deleted", "is_deleted", "discarded"),
)
WEIGHTS = ("weight", "loss_weight", "loss_scale")
ROW_WEIGHTS = ("weight", "sample_weight", "loss_weight", "loss_scale")
CONTEXTS = ("context", "passage", "article", "document", "paragraph")
LABELS = ("label", "labels", "label_text", "label_name", "class", "sentiment", "target")
# What a text is answered with, in sets whose text is the question.
ANSWERS_TO_TEXT = (
    *("summary", "highlights", "translation", "paraphrase", "correction", "target_text", "output_text"),
    *("intent", "emotion", "emotions", "polarity", "stance", "toxicity", "toxic", "sarcasm", "entities"),
)
SPLITS = ("split", "set", "partition", "subset", "dataset_split", "data_split")
IS_HELD_OUT = ("is_test", "is_eval", "is_validation", "is_val", "is_dev", "is_held_out")
IS_TRAINED = ("is_train", "is_training", "in_train")
# What annotators decided.
STATUSES = ("status", "review_status", "annotation_status", "decision")
NOT_ACCEPTED = frozenset(
    (
        *("rejected", "reject", "declined", "discarded", "deleted", "removed", "excluded", "ignored"),
        *("spam", "invalid"),
    )
)
APPROVALS = ("approved", "is_approved", "accepted", "is_accepted", "is_valid")
KEEPING_OUT = frozenset((*SPLITS, *IS_HELD_OUT, *IS_TRAINED, *STATUSES, *APPROVALS))
SYSTEMS = ("system_prompt", "system_message")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# What names a row, and is done nothing with.
QUIET = frozenset(("id", "conversation_id", "prompt_id", "source", "meta", "metadata"))
# What is lost where a schema has no place for it.
TEXTS = frozenset(
    (
        *("messages", "conversations", "prompt", "completion", "instruction", "output", "input", "response"),
        *("question", "answer", "query", "text", "system", "tools", "history", *CONTEXTS, *THOUGHTS),
    )
)
RATINGS = (
    *("score", "rating", "reward", "quality", "stars", "is_correct", "correct", "is_good"),
    *("thumbs", "thumbs_up", "feedback", "vote"),
)
MEDIA = ("image", "images", "audio", "audios", "video", "videos", "objects")

COLUMNS = (
    Known(("messages",), "OpenAI, TRL, swift, torchtune", "used", "the chat"),
    Known(("conversations",), "ShareGPT, LLaMA-Factory, Axolotl, Unsloth", "used", "the chat"),
    Known(
        ("prompt", "completion"), "TRL, OpenAI", "used", "as text or as messages; the completion is trained"
    ),
    Known(("instruction", "output", "input"), "Alpaca, LLaMA-Factory", "used", "question and answer"),
    Known(
        ("response",),
        "Dolly, swift, UltraFeedback",
        "used",
        "the answer to an `instruction`, `query` or `prompt`",
    ),
    Known(("question", "answer", "query", "q", "a"), "OpenOrca, GSM8K, swift", "used", "question and answer"),
    Known(("text",), "TRL, plain corpora", "used", "all of it is trained"),
    Known(("tools", "functions"), "OpenAI, TRL, swift, xLAM", "used", "the tools that the chat may call"),
    Known(
        ("system", *SYSTEMS),
        "LLaMA-Factory, OpenOrca, swift",
        "used",
        "the system message",
    ),
    Known(
        CONTEXTS,
        "Dolly, SQuAD, HotpotQA, PubMedQA",
        "converted",
        "stands before the question of an instruction or a question/answer pair; lists are joined",
    ),
    Known(
        THOUGHTS,
        "OpenR1, distilled sets",
        "used",
        "beside a question and its answer: what was thought before the answer, as in a message",
    ),
    Known(("history",), "LLaMA-Factory, swift", "used", "earlier exchanges, as pairs"),
    Known(
        ROW_WEIGHTS,
        "scikit-learn, swift, Axolotl",
        "converted",
        "multiplies the loss weight of the row, as do several; 0 leaves it out",
    ),
    Known(
        (*TRAINED, *UNTRAINED),
        "swift, Axolotl, torchtune",
        "converted",
        "false leaves the row out, of several any; `masked` the other way round",
    ),
    Known(
        EXCLUDED,
        "annotated data sets",
        "converted",
        "true leaves the row out; a value that is neither true nor false says nothing",
    ),
    Known(
        ("mask",),
        "several, with opposite meanings",
        "refused",
        "true or false, 1 or 0: trained to some and left out to others",
        "say `train: true` or `train: false`",
    ),
    Known(
        ("category", "task", "topic", "domain", "language"),
        "Dolly, FLAN",
        "used",
        "the split takes its share of each value, where there are few",
    ),
    Known(
        ("id", "conversation_id", "prompt_id", "source", "meta", "metadata"),
        "many",
        "warned",
        "only as `data.group_by` and `data.stratify_by`",
    ),
    Known(
        (*SPLITS, *IS_HELD_OUT, *IS_TRAINED),
        "merged data sets",
        "warned",
        "a row that says it is a test row is trained on all the same",
        "filter the rows, and name the others with `data.eval`",
    ),
    Known(
        (*STATUSES, *APPROVALS),
        "Argilla, Label Studio, annotated data sets",
        "warned",
        "a row that says `rejected`, or false, is trained on all the same",
        "filter the rows, or say `train: false` in them",
    ),
    Known(
        ("choices", "options", "distractors"),
        "MMLU, ARC, SciQ; also in columns of their own, as `A` to `D` or `option1`, `option2`",
        "warned",
        "the model is not shown them",
        "write them into the question",
    ),
    Known(
        RATINGS,
        "OpenAssistant, UltraFeedback, logs of feedback",
        "warned",
        "every row trains alike",
        "filter by it, or turn it into `weight`",
    ),
    Known(
        MEDIA,
        "LLaVA, swift, LLaMA-Factory",
        "refused",
        "only text is trained; without them the answers would be guesses",
        "leave these rows out",
    ),
    Known(
        ("chosen", "rejected"),
        "TRL, HH-RLHF, UltraFeedback, LLaMA-Factory, Axolotl",
        "refused",
        "preference pairs",
        "`--format preference_chosen` trains on the chosen side",
    ),
    Known(
        ("preferred_output", "non_preferred_output"),
        "OpenAI",
        "refused",
        "preference pairs",
        "`--format preference_chosen` trains on the preferred side",
    ),
    Known(
        ("rejected_response", "rejected_messages"),
        "swift",
        "refused",
        "preference pairs",
        "`--format preference_chosen` trains on the chosen side",
    ),
    Known(
        ("kto_tag",),
        "LLaMA-Factory",
        "refused",
        "answers marked good or bad (KTO)",
        "`--format preference_chosen` trains on the good ones",
    ),
    Known(
        ("completions",),
        "UltraFeedback",
        "refused",
        "several rated answers",
        "`--format preference_chosen` trains on the best one",
    ),
    Known(
        LABELS,
        "classification sets; TRL's KTO where true or false",
        "refused",
        "beside a `text` the labels would be dropped; true or false beside an answer is KTO: "
        "answers marked good or bad",
        "`--format classification` trains to answer with the label, `--format preference_chosen` on the good answers",
    ),
    Known(
        ANSWERS_TO_TEXT,
        "summaries, translations, classification sets",
        "warned",
        "beside a `text` all of the text is trained, and this is not",
        "name it as the answer: `--columns question=text,answer=summary`",
    ),
    Known(
        ("role",),
        "logs with one row a turn",
        "refused",
        "beside a `text`: single messages of a chat",
        "give each chat as one list of `messages`",
    ),
    Known(
        ("parent_id", "message_id", "message_tree_id"),
        "OpenAssistant",
        "refused",
        "beside a `text`: single messages of a tree of chats",
        "give each branch as one list of `messages`",
    ),
    Known(
        ("ts", "thread_ts"),
        "Slack",
        "refused",
        "beside a `text`: single messages of a channel",
        "give each thread as one list of `messages`",
    ),
)
MESSAGE_KEYS = (
    Known(("role", "from"), "OpenAI, ShareGPT", "used", "who speaks"),
    Known(("content", "value"), "OpenAI, ShareGPT", "used", "what is said; parts of type text are joined"),
    Known(("tool_calls", "function_call"), "OpenAI, TRL", "used", "the calls of an assistant turn"),
    Known(("name", "tool_call_id"), "OpenAI", "used", "by templates that read them"),
    Known(
        ("reasoning_content", "reasoning", "thinking"),
        "DeepSeek, Qwen3, gpt-oss",
        "used",
        "by templates that read it; elsewhere `data.reasoning` says whether it is kept as text",
    ),
    Known(
        TRAINED,
        "Axolotl, swift, torchtune, Mistral",
        "converted",
        "false or 0: the turn is not trained; true: it is",
    ),
    Known(UNTRAINED, "torchtune", "converted", "true: the turn is not trained"),
    Known(
        EXCLUDED,
        "annotated data sets",
        "converted",
        "true: the turn is not trained; a value that is neither true nor false says nothing",
    ),
    Known(
        WEIGHTS, "OpenAI, Mistral, swift", "converted", "the loss weight of the turn; several are multiplied"
    ),
    Known(
        ("train_detail",),
        "Axolotl",
        "refused",
        "where it trains a part of a turn only",
        "split the turn, or say `train` for the whole turn",
    ),
    Known(
        ("mask",),
        "several, with opposite meanings",
        "refused",
        "1 means trained to some and left out to others",
        "say `train: true` or `train: false`",
    ),
    Known(("rejected",), "swift", "refused", "preference pairs", "leave it out"),
    Known(
        (*MEDIA, "image_url"),
        "Ollama, swift",
        "refused",
        "only text is trained; without them the answers would be guesses",
        "leave these rows out",
    ),
    Known(
        RATINGS,
        "logs of feedback",
        "warned",
        "every turn trains alike",
        "say `train: false` for the turns that are not to be learned",
    ),
)


def table(entries: Sequence[Known]) -> str:
    """The entries as a Markdown table, as docs/data.md has them."""
    lines = ["| key | seen in | |", "|---|---|---|"]
    for known in entries:
        names = ", ".join(f"`{name}`" for name in known.names)
        fix = f"; {known.fix}" if known.fix else ""
        lines.append(f"| {names} | {known.seen} | **{known.treatment}**: {known.what}{fix} |")
    return "\n".join(lines)
