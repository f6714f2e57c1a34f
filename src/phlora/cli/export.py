"""`phlora merge`, `phlora convert` and `phlora export`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

import typer

from phlora.cli.console import forbid_network, make_display, print_result, standard_output_kept
from phlora.cli.options import Json, LikeRunColumns, LikeRunFormat, Offline, Quiet, columns_in_place
from phlora.config import MergeBase
from phlora.errors import ConfigError

if TYPE_CHECKING:
    from phlora.export.convert import ConvertReport
    from phlora.export.merge import MergeReport
    from phlora.export.quantize import QuantizedReport

commands = typer.Typer()
BaseModel = Annotated[
    str | None, typer.Option("--model", "-m", help="The base model, if not the one that the adapter names.")
]
IntoBase = Annotated[
    MergeBase,
    typer.Option(
        "--base",
        help="Trained on nf4 or int8: merge into the full or the dequantized base; auto: the lower loss.",
        show_default=True,
    ),
]
SavedDtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Of the merged model: auto (as the base's files), float32, bfloat16, float16.",
        show_default=True,
    ),
]
ProofRows = Annotated[
    list[str] | None,
    typer.Option("--rows", metavar="FILE", help="Chats for the proof, if not the run's held-out ones."),
]


class _Loralib(TypedDict):
    """What the user says about a loralib file."""

    lora_alpha: float | None
    enable: list[str]
    blocks: Mapping[str, Mapping[str, int]] | None
    model: str | None


@commands.command(
    short_help="Merge an adapter into its base, and prove it.",
    epilog="\b\nExamples:\n"
    "  phlora merge runs/support -o models/support\n"
    "  phlora merge runs/support -o models/support --base dequantized\n"
    "  phlora merge runs/support -o models/support --quantize gptq\n"
    "  phlora merge some/adapter -o models/support --rows chats.jsonl --dtype bfloat16",
)
def merge(
    source: Annotated[str, typer.Argument(metavar="RUN|ADAPTER", help="Run folder or adapter folder.")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="New model folder.")],
    base: IntoBase = "auto",
    model: BaseModel = None,
    dtype: SavedDtype = "auto",
    rows: ProofRows = None,
    format: LikeRunFormat = None,
    columns: LikeRunColumns = None,
    max_rows: Annotated[
        int, typer.Option("--max-rows", min=1, help="Rows of the proof at most.", show_default=True)
    ] = 64,
    device: Annotated[
        str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", show_default=True)
    ] = "auto",
    quantize: Annotated[
        str | None,
        typer.Option(
            "--quantize",
            metavar="FORMAT",
            help="Save it in 4 bits: gptq, awq or int4-onnx; scored before and after.",
        ),
    ] = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fold an adapter into its 16- or 32-bit base and save the whole model, which stock transformers loads.

    What was saved is loaded again and compared with base and adapter on the run's held-out rows: largest and
    mean difference of the logits, changed greedy tokens. Beyond the bound nothing is kept and the exit code is 1.
    For an adapter of a quantised base the loss merged into either base is measured and shown. With --quantize the
    merged model is saved in 4 bits, its rounding tuned on the rows that the run trained on; loss and exact match of
    the merged and of the rounded model on the held-out rows are shown.
    """
    if offline:
        forbid_network()
    from phlora.export.merge import merge_run
    from phlora.export.quantize import merge_quantized

    how: dict[str, Any] = dict(
        base=base,
        model=model,
        dtype=dtype,
        rows=rows or None,
        max_rows=max_rows,
        format=format,
        columns=columns_in_place(columns),
        device=device,
        offline=offline,
        display=make_display(quiet),
    )
    report: MergeReport | QuantizedReport
    with standard_output_kept():
        if quantize is None:
            report = merge_run(source, output, **how)
        else:
            report = merge_quantized(source, output, quantize=quantize, **how)
    print_result(report.to_json() if as_json else report.summary())


@commands.command(
    short_help="Convert an adapter: PEFT, loralib, merged model.",
    epilog="\b\nExamples:\n"
    "  phlora convert runs/support --to loralib -o support.pt\n"
    "  phlora convert gpt2.pt --to peft -o adapter --lora-alpha 32 --enable q,v\n"
    "  phlora convert phi3.pt --to merged -o model --lora-alpha 32 --enable q,v --model PHI3 --rows chats.jsonl",
)
def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="loralib file (.pt), PEFT adapter folder or run folder.")
    ],
    to: Annotated[Literal["peft", "loralib", "merged"], typer.Option("--to", help="What to convert to.")],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="OUT", help="New folder; for loralib a new file.")
    ],
    model: BaseModel = None,
    lora_alpha: Annotated[
        float | None,
        typer.Option("--lora-alpha", help="Of the layers of a loralib file, which does not know it."),
    ] = None,
    enable: Annotated[
        str | None,
        typer.Option("--enable", metavar="q,v", help="Adapted row blocks, where shapes do not tell."),
    ] = None,
    blocks: Annotated[
        list[str] | None,
        typer.Option(
            "--blocks",
            metavar="LAYER=ROWS,...",
            help="Rows of each block, such as qkv_proj=3072,1024,1024; by default those of --model; repeatable.",
        ),
    ] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(
            "--kernel",
            metavar="LAYER=SIZES",
            help="Kernel of a convolution in a loralib file, such as conv1=3,3; repeatable.",
        ),
    ] = None,
    base: IntoBase = "auto",
    dtype: SavedDtype = "auto",
    rows: ProofRows = None,
    format: LikeRunFormat = None,
    columns: LikeRunColumns = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Convert an adapter between loralib's file and PEFT's folder without losing a bit, or merge it.

    Every tensor is used or nothing is written. Pickles that hold more than tensors are not opened.
    `--to merged` is `phlora merge`, also for a loralib file; --base, --dtype, --rows, --format and --columns are for
    it.
    """
    if to == "merged" and kernel:
        raise ConfigError(
            "--kernel is for --to peft: chat models have no convolutions",
            where="phlora convert",
            fix="leave it out",
        )
    if to != "merged" and (rows or dtype != "auto" or base != "auto" or format or columns):
        raise ConfigError(
            "--base, --dtype, --rows, --format and --columns are for --to merged",
            where="phlora convert",
            fix="leave them out",
        )
    if offline:
        forbid_network()
    from phlora.export import convert as conversion

    loralib: _Loralib = {
        "lora_alpha": lora_alpha,
        "enable": [name.strip() for name in (enable or "").split(",") if name.strip()],
        "blocks": conversion.parse_blocks(blocks or []),
        "model": model,
    }
    with standard_output_kept():
        report: MergeReport | ConvertReport
        if to == "merged":
            report = conversion.convert_to_model(
                source,
                output,
                **loralib,
                base=base,
                dtype=dtype,
                rows=rows or None,
                format=format,
                columns=columns_in_place(columns),
                offline=offline,
                display=make_display(quiet),
            )
        else:
            kernels = conversion.parse_kernels(kernel or [])
            report = conversion.convert(source, output, to=to, kernels=kernels, offline=offline, **loralib)
    print_result(report.to_json() if as_json else report.summary())


@commands.command(
    short_help="Take a run to PEFT, vLLM, llama.cpp, Ollama, ..., proven there.",
    epilog="\b\nExamples:\n"
    "  phlora export runs/support --for gguf --type q4_k_m -o out/support\n"
    "  phlora export runs/support --for gguf --adapter-only -o out/adapter\n"
    "  phlora export runs/support --for vllm -o out/vllm\n"
    "  phlora export runs/support --for gguf --verify-only -o out/support",
)
def export(
    source: Annotated[str, typer.Argument(metavar="RUN|ADAPTER", help="Run folder or adapter folder.")],
    target: Annotated[
        str,
        typer.Option("--for", metavar="TARGET", help="peft, vllm, sglang, loralib, merged, gguf or ollama."),
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="New folder.")],
    type: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="GGUF: f32, f16 (default), bf16, q8_0, q6_k, q5_k_m, q4_k_m; merged: as --dtype of merge.",
        ),
    ] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="GGUF: the adapter alone, for a GGUF file of its base.")
    ] = False,
    vllm_before: Annotated[
        str | None,
        typer.Option(
            "--vllm-before", metavar="VERSION", help="vLLM below this reads it; 0.31 and older know one rank."
        ),
    ] = None,
    model: BaseModel = None,
    rows: Annotated[
        list[str] | None,
        typer.Option("--rows", metavar="FILE", help="Chats to compare on, if not the run's held-out ones."),
    ] = None,
    format: LikeRunFormat = None,
    columns: LikeRunColumns = None,
    max_rows: Annotated[
        int, typer.Option("--max-rows", min=1, help="Prompts that are compared at most.", show_default=True)
    ] = 16,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Tokens of an answer at most.", show_default=True)
    ] = 32,
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Open it in its client and compare.", show_default=True),
    ] = True,
    verify_only: Annotated[
        bool, typer.Option("--verify-only", help="Compare what was exported before, and write nothing else.")
    ] = False,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a run's adapter as what another program takes, open it there, and compare the answers.

    The new folder holds all that the program needs, the line that starts it, and the verdict (export.json): prompt
    tokens, greedy answers, log-probabilities and where answers stop, beside the run's own model on its held-out
    prompts. Beyond the bound nothing is kept and the exit code is 1. Where the program is not installed it says
    "written, not verified"; --verify-only catches up.
    """
    if offline:
        forbid_network()
    from phlora.export.run import export_run

    with standard_output_kept():
        report = export_run(
            source,
            output,
            target=target,
            type=type,
            adapter_only=adapter_only,
            vllm_before=vllm_before,
            model=model,
            rows=rows or None,
            format=format,
            columns=columns_in_place(columns),
            max_rows=max_rows,
            max_new_tokens=max_new_tokens,
            verify=verify,
            verify_only=verify_only,
            offline=offline,
            display=make_display(quiet),
        )
    print_result(report.to_json() if as_json else report.summary())
