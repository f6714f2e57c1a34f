"""Data sets that the `datasets` library reads: on the hub, and in folders that it saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from phlora.data.rows import Record
from phlora.errors import DataError, NetworkError, did_you_mean


def is_saved_folder(path: Path) -> bool:
    """Whether `save_to_disk` of the `datasets` library wrote a folder."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def read_saved_folder(path: Path, split: str | None) -> Iterator[Record]:
    """The rows of a folder that `save_to_disk` wrote.

    Raises:
        DataError: it is damaged, or has no such split.
    """
    from datasets import load_from_disk

    try:
        data: Any = load_from_disk(str(path))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"The folder cannot be read: {error}", where=str(path)) from None
    if isinstance(data, Mapping):
        data = data[pick_split(data.keys(), split, where=str(path))]
    return iter(enumerate(data, 1))


def pick_split(splits: Iterable[str], split: str | None, *, where: str) -> str:
    """The split asked for; by default `train`, or the only one."""
    names = list(splits)
    wanted = split or ("train" if "train" in names else names[0] if len(names) == 1 else None)
    if wanted in names:
        return str(wanted)
    hint = (
        did_you_mean(wanted, names)
        if wanted
        else f"name one: {', '.join(f'{where}:{name}' for name in names)}"
    )
    raise DataError(f"No split `{wanted or 'train'}`", where=where, fix=hint)


def read_hub(name: str, split: str | None) -> Iterator[Record]:
    """The rows of a data set on the hub."""
    from datasets import config, load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    if not config.HF_HUB_OFFLINE:
        _probe_hub(name)
    try:
        data: Any = load_dataset(name)
    except DatasetNotFoundError:
        raise _unknown_data_set(name) from None
    except (ConnectionError, TimeoutError) as error:
        if config.HF_HUB_OFFLINE:
            raise NetworkError(
                "There is no such file, and offline mode forbids asking the hub for a data set of this name",
                where=name,
                fix="check the path, or download the data set first with HF_HUB_OFFLINE unset",
            ) from None
        raise _unreachable(name, error) from None
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(f"The data set cannot be loaded: {error}", where=name) from None
    return iter(enumerate(data[pick_split(data.keys(), split, where=name)], 1))


def _probe_hub(name: str) -> None:
    """Ask for the data set once, because `load_dataset` tries an unreachable hub for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    # The hub library's own HTTP client: which package that is depends on its version.
    from huggingface_hub.utils import httpx

    try:
        HfApi().dataset_info(name, timeout=5)
    except GatedRepoError:
        raise DataError(
            "The data set is gated", where=name, fix="accept its terms on the hub and run `hf auth login`"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise _unknown_data_set(name) from None
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise _unreachable(name, error) from None


def _unknown_data_set(name: str) -> DataError:
    return DataError(
        "There is neither such a file nor such a data set on the hub",
        where=name,
        fix="check the spelling; a private data set needs `hf auth login`",
    )


def _unreachable(name: str, error: Exception) -> NetworkError:
    return NetworkError(
        f"There is no such file, and the hub cannot be reached ({type(error).__name__})",
        where=name,
        fix="check the path or the network; HF_HUB_OFFLINE=1 uses a data set downloaded before",
    )
