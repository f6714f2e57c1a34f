"""Small tokenizers; they are public in `phlora.testing`."""

from phlora.testing.rows import LANGUAGES as LANGUAGES
from phlora.testing.tokenizers import *  # noqa: F403
