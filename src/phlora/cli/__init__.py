"""The command line: parse, call one public function, show what it returns, map errors to exit codes.

Results go to standard output, everything else to standard error. With `--json` standard output holds exactly
one JSON document, also when the command fails. Heavy modules are imported inside the commands that need them,
so that `--help` answers at once.
"""

from phlora.cli.entry import main
from phlora.cli.program import app

__all__ = ["app", "main"]
