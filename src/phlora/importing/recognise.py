"""Which tool a configuration is of, by the names that only that tool has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phlora.errors import ConfigError, did_you_mean, shown
from phlora.importing.llamafactory import INFO_FILE, is_dataset_info

# Tool as it is named on the command line -> as people call it.
TOOLS = {
    "llamafactory": "LLaMA-Factory",
    "axolotl": "Axolotl",
    "torchtune": "torchtune",
    "unsloth": "Unsloth Studio",
}
_SIGNS: Mapping[str, frozenset[str]] = {
    tool: frozenset(names.split())
    for tool, names in {
        "llamafactory": """
            stage finetuning_type dataset_dir cutoff_len lora_target lora_rank template model_name_or_path
            quantization_bit val_size overwrite_cache plot_loss
        """,
        "axolotl": """
            base_model datasets sequence_len micro_batch_size adapter val_set_size lora_r lora_target_linear
            sample_packing num_epochs dataset_prepared_path train_on_inputs
        """,
        "torchtune": """
            model._component_ dataset._component_ tokenizer._component_ checkpointer._component_
            optimizer._component_ checkpointer.checkpoint_dir max_steps_per_epoch
        """,
        "unsloth": """
            training.max_seq_length training.random_seed training.train_on_completions lora.lora_r
            data.format_type data.local_dataset lora.use_rslora lora.use_loftq training.batch_size
        """,
    }.items()
}
_OF_PHLORA = ("training_config", "peft_config", "evaluation")
_ENOUGH = 2


def tool_of(
    values: Mapping[str, Any], flat: Mapping[str, Any], *, file: str, asked: str | None = None
) -> str:
    """The tool, as it is asked for or as the names tell.

    Args:
        values: the file as it is.
        flat: with dotted keys.

    Raises:
        ConfigError: no tool has these names, several have, or it is another kind of file.
    """
    if asked is not None:
        if asked not in TOOLS:
            raise ConfigError(
                f"There is no tool {shown(asked)}", where="--from", fix=did_you_mean(asked, TOOLS)
            )
        return asked
    if is_dataset_info(values):
        raise ConfigError(
            f"This is LLaMA-Factory's table of data sets ({INFO_FILE})",
            where=file,
            expected="the configuration of a training that names some of them",
            fix=f"phlora import-config TRAINING.yaml --dataset-info {file}",
        )
    counts = {tool: len(signs & {*flat, *map(str, values)}) for tool, signs in _SIGNS.items()}
    best = max(counts.values())
    found = [tool for tool, count in counts.items() if count == best]
    if best >= _ENOUGH and len(found) == 1:
        return found[0]
    own = [key for key in _OF_PHLORA if key in values]
    if own:
        raise ConfigError(
            f"This is a configuration of Phlora already ({', '.join(own)})",
            where=file,
            fix=f"phlora train {file}",
        )
    names = ", ".join(f"`{key}`" for key in list(map(str, values))[:8])
    raise ConfigError(
        f"It is not clear which tool this configuration is of; it has {names or 'nothing'}",
        where=file,
        expected="a configuration of " + ", ".join(TOOLS.values()),
        fix=f"name the tool: --from {'|'.join(found if best else TOOLS)}",
    )
