"""`phlora chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phlora.cli.console import forbid_network, make_display, standard_output_kept
from phlora.cli.options import Offline

commands = typer.Typer()


@commands.command(
    epilog="\b\nExamples:\n"
    "  phlora chat runs/support\n"
    '  phlora chat smollm2-135m --system "Answer in one sentence."\n'
    '  echo "Where is my parcel?" | phlora chat runs/support'
)
def chat(
    source: Annotated[
        str,
        typer.Argument(metavar="RUN|MODEL", help="Run folder, adapter folder, or whatever --model takes."),
    ],
    system: Annotated[
        str | None,
        typer.Option(
            "--system",
            metavar="TEXT",
            help='System prompt; "" for none  [default: that of the training rows]',
        ),
    ] = None,
    tools: Annotated[
        Path | None,
        typer.Option(
            "--tools", metavar="FILE.json", help="Tools that may be called: a list of descriptions."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Longest reply, in tokens.", show_default=True)
    ] = 512,
    temperature: Annotated[
        float,
        typer.Option("--temperature", min=0.0, help="0 always takes the likeliest token.", show_default=True),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p",
            min=0.0,
            max=1.0,
            help="Above temperature 0: draw among the likeliest tokens that sum up to this.",
            show_default=True,
        ),
    ] = 1.0,
    top_k: Annotated[
        int,
        typer.Option(
            "--top-k",
            min=0,
            help="Above temperature 0: draw among so many of the likeliest tokens; 0: among all.",
            show_default=True,
        ),
    ] = 0,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Makes replies repeatable above temperature 0.")
    ] = None,
    offline: Offline = False,
) -> None:
    """Chat with a tuned model, its base, or both.

    A run is opened with the system prompt that its training rows share. /base, /tuned and /compare choose who
    answers; /help lists all commands. Ctrl-C stops a reply, Ctrl-D or /exit leaves. When standard input is no
    terminal, each line is one user turn. Nothing is stored.
    """
    if offline:
        forbid_network()
    from phlora.data.prompts import read_tools
    from phlora.serve.chat import open_chat
    from phlora.serve.terminal import converse

    display = make_display(quiet=False)
    offered = read_tools(tools) if tools else None
    with standard_output_kept():
        session = open_chat(
            source,
            system=system,
            tools=offered,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            display=display,
        )
    converse(session, display=display)
