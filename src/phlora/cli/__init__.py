"""The command line: parse, call one public function, show what it returns, map errors to exit codes.

Results go to standard output, everything else to standard error. With `--json` standard output holds exactly
one JSON document, also when the command fails. Heavy modules are imported inside the commands that need them,
so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from phlora.errors import EXIT_INTERRUPTED
from phlora.stop import interrupted_by_stop


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code; from its first moment SIGTERM and SIGHUP interrupt it."""
    try:
        with interrupted_by_stop():
            from phlora.cli import entry

            entry.main(arguments)
    except KeyboardInterrupt:
        # Before or after what `entry.main` watches over.
        sys.stderr.write("Interrupted.\n")
        sys.exit(EXIT_INTERRUPTED)
