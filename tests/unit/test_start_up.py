"""`import phlora` and `phlora --help` answer at once: they load nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "numpy")


def loaded_after(code: str) -> set[str]:
    script = f"{code}\nimport sys; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_phlora_loads_nothing_heavy() -> None:
    assert loaded_after("import phlora; phlora.__version__; dir(phlora)") == set()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["data", "check", "--help"], ["--version"]]
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['phlora', *{arguments!r}]\n"
        "from phlora.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
    )
    assert loaded_after(code) == set()


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import phlora

    with pytest.raises(AttributeError, match="finetun"):
        phlora.finetun  # noqa: B018
