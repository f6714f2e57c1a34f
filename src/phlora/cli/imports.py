"""`phlora import-config`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phlora.cli.console import make_display, print_result
from phlora.cli.options import Json, Quiet
from phlora.errors import ConfigError
from phlora.files import replaced_file

if TYPE_CHECKING:
    from phlora.importing.story import ImportedConfig

commands = typer.Typer()


@commands.command(
    name="import-config",
    short_help="Turn another tool's configuration into one of Phlora's.",
    epilog="\b\nExamples:\n"
    "  phlora import-config llama3_lora_sft.yaml -o phlora.yaml\n"
    "  phlora import-config sft.yaml --dataset-info data/dataset_info.json -o phlora.yaml   LLaMA-Factory\n"
    "  phlora import-config lora.yml --from axolotl -o phlora.yaml\n"
    "  phlora import-config mini_qlora_single_device.yaml --json                          torchtune",
)
def import_config(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="Configuration of LLaMA-Factory, Axolotl, torchtune or Unsloth Studio."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where to write it  [default: standard output]"),
    ] = None,
    tool: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="TOOL", help="llamafactory, axolotl, torchtune or unsloth, if not found out."
        ),
    ] = None,
    dataset_info: Annotated[
        Path | None,
        typer.Option(
            "--dataset-info",
            metavar="FILE",
            help="LLaMA-Factory's dataset_info.json, if not in the dataset_dir of the configuration.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that is there.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Turn a configuration of another tool into one of Phlora's that trains the same.

    Each value says in a comment where it comes from; defaults of that tool which Phlora does not share are written
    out. Settings that have no place are listed with the reason, none is dropped silently. What would train something
    else (preferences, the whole model, images) is refused.
    """
    if output is not None and output.exists() and not overwrite:
        raise ConfigError(
            "There is a file already", where=str(output), fix="name another one, or --overwrite"
        )
    from phlora.importing.story import import_config

    imported = import_config(file, tool=tool, dataset_info=dataset_info)
    if output is not None:
        _write(output, imported.text)
    if as_json:
        print_result({**imported.to_json(), "output": None if output is None else str(output)})
        return
    print_result(imported.text.rstrip("\n") if output is None else _summary(imported, output))
    if output is None and not quiet:
        make_display(quiet).note(_counts(imported))


def _write(output: Path, text: str) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(output) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"The file cannot be written: {error.strerror}", where=str(output)) from None


def _counts(imported: ImportedConfig) -> str:
    counts = f"{imported.tool}: {len(imported.mapped)} values, {len(imported.left_out)} settings left out"
    return counts + (f", {len(imported.notes)} to look at" if imported.notes else "")


def _summary(imported: ImportedConfig, output: Path) -> str:
    from phlora.display import printable
    from phlora.errors import shown

    lines = [_counts(imported), *(f"  to look at: {note}" for note in imported.notes)]
    lines += [f"  left out: {one.source} ({shown(one.value)[1:-1]}): {one.why}" for one in imported.left_out]
    return printable("\n".join([*lines, f"Written: {output}. Next: phlora plan {output}"]))
