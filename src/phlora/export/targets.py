"""Where an adapter can go: what each target takes, and the line that starts it there.

Read in the sources of vLLM 0.32 and SGLang 0.5.23: vLLM from 0.32 on honours PEFT's patterns of ranks and alphas;
before, and in SGLang, one rank and one alpha are read for all layers, so they get the uniform form.
"""

from __future__ import annotations

import shlex
from typing import Literal, get_args

from phlora.errors import ConfigError, ModelError, did_you_mean, shown

Target = Literal["peft", "vllm", "sglang", "loralib", "merged", "gguf", "ollama"]
TARGETS: tuple[Target, ...] = get_args(Target)
# What --max-lora-rank of vLLM may be; 16 where it is not given.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def require_target(name: str) -> Target:
    """The target of that name.

    Raises:
        ConfigError: there is none.
    """
    for target in TARGETS:
        if target == name:
            return target
    raise ConfigError(f"There is no target {shown(name)}", where="--for", fix=did_you_mean(name, TARGETS))


def reads_patterns(target: Target, *, vllm_before: str | None) -> bool:
    """Whether a target reads a rank and an alpha for each layer.

    Args:
        vllm_before: versions of vLLM below this are to read it, 0.31 among them; None: 0.32 and later are.

    Raises:
        ConfigError: no version, or one is named for another target.
    """
    if vllm_before is None:
        return target != "sglang"
    if target != "vllm":
        raise ConfigError("--vllm-before is for --for vllm", where="phlora export", fix="leave it out")
    parts = vllm_before.split(".")
    if not all(part.isdecimal() for part in parts) or len(parts) < 2:
        raise ConfigError(
            f"{shown(vllm_before)} is no version", where="--vllm-before", expected="one such as 0.32"
        )
    return False


def vllm_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` that takes a rank.

    Raises:
        ModelError: none does.
    """
    for allowed in _VLLM_RANKS:
        if rank <= allowed:
            return allowed
    raise ModelError(
        f"The adapter's largest rank is {rank}, where row blocks count together",
        expected=f"at most {_VLLM_RANKS[-1]}, which is all that vLLM serves",
        fix="export the whole model: --for merged",
    )


def launch_line(
    target: Target, *, folder: str, base: str, name: str, rank: int, file: str, context: int
) -> str:
    """The command or the lines of Python with which a target starts what was exported.

    Args:
        folder: what was exported.
        base: name of the base model.
        name: under which the adapter is asked for.
        rank: the adapter's largest.
        file: the main file in the folder, where there is one.
        context: tokens that a llama.cpp server holds.
    """
    place, quoted, called = shlex.quote(folder), shlex.quote(base), shlex.quote(name)
    if target == "vllm":
        return (
            f"vllm serve {quoted} --enable-lora --max-lora-rank {vllm_rank(rank)} "
            f"--lora-modules {called}={place}"
        )
    if target == "sglang":
        return (
            f"python -m sglang.launch_server --model-path {quoted} --enable-lora --max-lora-rank {rank} "
            f"--lora-paths {called}={place}"
        )
    if target == "peft":
        return f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{folder}")'
    if target == "loralib":
        return f'model.load_state_dict(torch.load("{folder}/{file}"), strict=False)'
    if target == "merged":
        return f"vllm serve {place}"
    if target == "ollama":
        return f"ollama create {called} -f {place}/Modelfile && ollama run {called}"
    return f"llama-server -m {place}/{shlex.quote(file)} --jinja -c {context}"
