"""What the tests use leaves the machine as it was."""

from pathlib import Path

import pytest

from phlora.files import cache_root


def test_no_test_writes_into_the_users_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert cache_root().is_relative_to(tmp_path_factory.getbasetemp())


def test_the_embedded_model_is_found_by_name_without_being_converted_again(smollm2_folder: Path) -> None:
    (link,) = cache_root().glob("smollm2-135m-*")
    assert link.is_symlink() and link.samefile(smollm2_folder)


def test_file_names_are_unique() -> None:
    """Test folders are no packages, so Python knows a file by its name alone."""
    # Scripts that are read as data, and run by themselves, are no modules.
    files = [path for path in Path(__file__).parents[1].rglob("*.py") if "shapes" not in path.parts]
    names = [path.name for path in files if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
