"""What a script's trainer says: by one process, through logging where that is set up, else on standard error."""

from __future__ import annotations

import logging
import os

from phlora.display import Display

_log = logging.getLogger("phlora.dropin")
# Scripts set up logging and leave the level at warnings; what trains is to be seen there all the same.
if _log.level == logging.NOTSET:
    _log.setLevel(logging.INFO)


def warn(text: str) -> None:
    """Something that a person should look at."""
    if _is_first():
        _log.warning("%s", text)


def tell(text: str) -> None:
    """A fact about the training; a block of lines is kept as it is."""
    if not _is_first():
        return
    if _log.hasHandlers():
        _log.info("%s", text)
    else:
        Display().show(text)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"
