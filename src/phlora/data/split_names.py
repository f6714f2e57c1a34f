"""Which split a name speaks of: of a file, of a folder above it, or in a column such as `split`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath

TRAIN = "train"
_SAME = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "validate", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "tests", "heldout", "holdout"), "test"),
    **dict.fromkeys(("eval", "evaluation"), "eval"),
}
# As in `test`, `test_00`, `test2` and `testset`, and not as in `contest` or `latest`.
_WORDS = re.compile(
    r"(?<![^\W_])(held[-_ ]?out|hold[-_ ]?out|[a-z]+?)(?:set|sets|data|split)?(?=\d*(?:[\W_]|$))"
)
_SEPARATORS = re.compile(r"[-_ ]")


def same_split(name: str) -> str:
    """One name for all that a split is called: `val` and `dev` are `validation`."""
    return _SAME.get(_SEPARATORS.sub("", name.lower()), name)


def _splits_in(text: str) -> list[str]:
    words = (_SEPARATORS.sub("", word) for word in _WORDS.findall(text.lower()))
    return [_SAME[word] for word in words if word in _SAME]


def split_of_path(path: str) -> str | None:
    """The split of a file, by its name and those of the folders above it; None where no name says one.

    >>> split_of_path("data/train-00000-of-00002.parquet"), split_of_path("test/part-000.jsonl")
    ('train', 'test')

    The last word of the file's own name counts. A folder counts where its name speaks of one split (`train_test` does
    not). One that is held out wins over a `train` below it.
    """
    *folders, file = PurePath(path).parts
    own = _splits_in(PurePath(file).name)
    found = own[-1:]
    for folder in reversed(folders):
        splits = set(_splits_in(folder))
        if len(splits) == 1:
            found += splits
    return next((split for split in found if split != TRAIN), found[0] if found else None)


def is_held_out(value: object) -> bool:
    """Whether what stands in a column such as `split` keeps a row out of training."""
    splits = set(_splits_in(value[:64])) if isinstance(value, str) else set()
    return bool(splits) and TRAIN not in splits


def other_splits(names: Sequence[str], split: str | None = None) -> set[str]:
    """Those of several files that their names keep out: of training, or of the split that was asked for.

    None are where all of them are held out, as in a folder of nothing but test files. Files that no name puts into a
    split belong to training.
    """
    splits: Mapping[str, str | None] = {name: split_of_path(name) for name in names}
    wanted = same_split(split) if split else TRAIN
    others = {name for name, found in splits.items() if found not in (wanted, None if not split else wanted)}
    return others if len(others) < len(names) else set()
