"""The values of a configuration as they are written: files, overrides, and every way to get them wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from phlora.config import load_config
from phlora.config_values import apply_overrides, read_mapping, set_value
from phlora.errors import ConfigError

SMALLEST = {"model": "smollm2-135m", "data": "chats.jsonl"}


def written(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_overrides_are_yaml_and_leave_their_input_alone() -> None:
    values = {"peft_config": {"r": 8}}
    changed, _ = apply_overrides(values, ["peft_config.target_modules=[q_proj, v_proj]", "model=m"])
    assert changed == {"peft_config": {"r": 8, "target_modules": ["q_proj", "v_proj"]}, "model": "m"}
    assert values == {"peft_config": {"r": 8}}


def test_set_value_takes_the_value_as_it_is() -> None:
    values, origins = set_value({}, "model.name", "5: [", {}, origin="--model")
    assert values == {"model": {"name": "5: ["}}
    assert origins == {"model.name": "--model"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: m\ndata: [a\n", "run.yaml:3"),
        ("model: m\n\tdata: d\n", "run.yaml:2"),
        ("model: m\ndata: d\nmodel: n\n", "run.yaml:3: The file is no valid YAML: the key `model`"),
        ("peft_config:\n  r: 8\n  r: 16\n", "run.yaml:3"),
        ("model: \x00\n", "no valid YAML"),
        ("model: !!python/object:os.system x\n", "run.yaml:1"),
        ("", "holds nothing"),
        ("- a\n- b\n", "holds a list"),
        ("just words\n", "holds `just words`"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_mapping(written(tmp_path, text))
    assert says in str(caught.value)


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    written(tmp_path, "", "quickstart.yaml")
    with pytest.raises(ConfigError, match="did you mean `.*quickstart.yaml`"):
        read_mapping(tmp_path / "quickstrat.yaml")


@pytest.mark.parametrize("name", ["none/run.yaml", "file.txt/run.yaml"])
def test_a_file_in_no_folder_is_missing(tmp_path: Path, name: str) -> None:
    written(tmp_path, "x", "file.txt")
    with pytest.raises(ConfigError, match="does not exist"):
        read_mapping(tmp_path / name)


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="A folder was given"):
        read_mapping(tmp_path)


def test_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("model: é\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        read_mapping(path)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("learning_rate", "is no assignment"),
        ("=3", "is no assignment"),
        ("peft_config.r=[", "no valid YAML"),
        ("output.name=x", "`output` is no section"),
    ],
)
def test_a_wrong_override_is_named(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match="--set") as caught:
        apply_overrides({**SMALLEST, "output": "runs/x"}, [override])
    assert says in str(caught.value)


@pytest.mark.parametrize("value", ["2026-13-45", "9" * 5000, "[" * 1500])
def test_values_that_yaml_itself_stumbles_over_are_one_message(value: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"output: {value}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no valid YAML"):
        load_config(file)
    with pytest.raises(ConfigError, match="no valid YAML"):
        apply_overrides({}, [f"output={value}"])


@pytest.mark.parametrize(
    ("text", "read"),
    [("010", "8"), ("-0_17", "-15"), ("1:30", "90"), ("1:30.5", "90.5"), ("12:30:45", "45045")],
)
def test_numbers_that_yaml_counts_in_other_bases_are_refused_everywhere(
    text: str, read: str, tmp_path: Path
) -> None:
    for given in (text, f"[1, {text}]", f"{{a: {text}}}"):
        with pytest.raises(ConfigError, match=f"`{text}` would be {read}"):
            load_config(written(tmp_path, f"model: m\ndata: d\ntraining_config: {{seed: {given}}}\n"))
        with pytest.raises(ConfigError, match=f"`{text}` would be {read}"):
            apply_overrides(SMALLEST, [f"training_config.seed={given}"])
    for quoted in (f"'{text}'", f'"{text}"'):
        assert apply_overrides({}, [f"output={quoted}"])[0]["output"] == text


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("00", 0), ("10", 10), ("0x10", 16), ("0b11", 3), ("1_000", 1000), ("0.10", 0.1)],
)
def test_other_numbers_are_read_as_they_look(text: str, value: float) -> None:
    assert apply_overrides({}, [f"a={text}"])[0]["a"] == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{a: 1, a: 2}", "a second time"),
        ("&a [*a]", "refers to itself"),
        ("[" * 200 + "]" * 200, "too deeply"),
    ],
)
def test_what_files_may_not_say_overrides_may_not_either(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        apply_overrides({}, [f"output={text}"])
    assert "--set" in str(caught.value)


@pytest.mark.parametrize("wide", [10, 300])
def test_mappings_merged_again_and_again_are_refused_quickly(tmp_path: Path, wide: int) -> None:
    lines = ["x0: &x0 {a: 1}"]
    lines += [f"x{n}: &x{n} {{<<: [{', '.join([f'*x{n - 1}'] * wide)}]}}" for n in range(1, 11)]
    with pytest.raises(ConfigError, match="merged into one another again and again"):
        read_mapping(written(tmp_path, "\n".join(lines)))


def test_a_long_text_named_again_and_again_is_refused(tmp_path: Path) -> None:
    text = f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 1000)}]\n"
    with pytest.raises(ConfigError, match="again and again"):
        read_mapping(written(tmp_path, text))


def test_a_merged_mapping_is_read(tmp_path: Path) -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: [*b, *a], z: 4}\n"
    assert read_mapping(written(tmp_path, text))["c"] == {"x": 1, "y": 3, "z": 4}
