"""A chat on a terminal, or line by line from a file: prompts, commands, and what Ctrl-C does."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import TextIO, TypeAlias

from phlora.display import Display, printable
from phlora.errors import InputError, did_you_mean
from phlora.serve.chat import ChatSession, Speaker

# Asks the models, and yields their replies piece by piece.
Ask: TypeAlias = Callable[[], Generator[tuple[Speaker, str], None, None]]

HELP = """\
/base          the base model answers
/tuned         the tuned model answers
/compare       both answer, each knowing only its own replies (also /both)
/system        show the system prompt
/system TEXT   set it; /system "" removes it, /system reset takes that of the training rows again
/result TEXT   what the tool that was called gave back; one for each call, in their order
/undo          forget the last question and its replies
/reset         forget the whole chat of both models, but not the system prompt
/help          this list
/exit          leave (also /quit and Ctrl-D)
//TEXT         say something that begins with a slash

Ctrl-C stops a reply; what was said so far stays in the chat."""
# Command names are short: with less in common two of them are near by chance, such as /nope and /compare.
_NEAR = 0.75
COMMANDS = ("base", "tuned", "compare", "both", "system", "result", "undo", "reset", "help", "exit", "quit")


def converse(
    session: ChatSession, *, display: Display, stdin: TextIO | None = None, stdout: TextIO | None = None
) -> None:
    """Talk until the input ends or /exit.

    On a terminal there is a prompt, mistakes are explained, and Ctrl-C stops a reply. Otherwise each line is one
    user turn, standard output holds the replies alone, and a mistake ends the chat.

    Raises:
        InputError: not on a terminal: an unknown command, or a line that is no UTF-8 text.
    """
    stdin, stdout = stdin or sys.stdin, stdout or sys.stdout
    if stdin.isatty() and stdout.isatty():
        _converse_on_terminal(session, display, stdout)
        return
    for line in _lines(stdin):
        if not _take(session, line, display, lambda ask: _say(session, ask, stdout, display)):
            return


def _lines(stdin: TextIO) -> Iterator[str]:
    try:
        yield from stdin
    except UnicodeDecodeError as error:
        raise InputError(
            f"Standard input is not UTF-8 text (byte {error.start})", fix="convert it to UTF-8"
        ) from None


def _converse_on_terminal(session: ChatSession, display: Display, stdout: TextIO) -> None:
    _enable_line_editing()
    display.note("/help lists the commands; Ctrl-D leaves")
    while True:
        try:
            line = input(f"\n{'+'.join(session.speakers)} › ")
        except EOFError:
            stdout.write("\n")
            return
        except KeyboardInterrupt:
            stdout.write("\n")
            display.note("Ctrl-D or /exit leaves")
            continue
        except UnicodeDecodeError:
            display.warn("That was no UTF-8 text; set the terminal to UTF-8")
            continue
        try:
            if not _take(session, line, display, lambda ask: _say_stoppably(session, ask, stdout, display)):
                return
        except InputError as mistake:
            display.warn(str(mistake))


def _enable_line_editing() -> None:
    try:
        import readline  # noqa: F401
    except ImportError:
        # Windows: the console edits lines by itself.
        return


def _say_stoppably(session: ChatSession, ask: Ask, stdout: TextIO, display: Display) -> None:
    before = len(session.exchanges)
    try:
        _say(session, ask, stdout, display)
    except KeyboardInterrupt:
        stdout.write("\n")
        if len(session.exchanges) > before:
            display.note("Stopped; the reply stays as it is, /undo removes it")
        elif len(session.speakers) > 1:
            display.note("Stopped before both had answered; the question is forgotten")
        else:
            display.note("Stopped; nothing was said")


def _take(session: ChatSession, line: str, display: Display, say: Callable[[Ask], None]) -> bool:
    """Do what one line of input asks for; False when it asks to leave."""
    line = line.rstrip("\r\n")
    if not line.strip():
        return True
    if line.startswith("/result ") or line == "/result":
        _take_result(session, line.removeprefix("/result").strip(), display, say)
        return True
    session.results.clear()
    if line.startswith("/") and not line.startswith("//"):
        return _obey(session, line[1:], display)
    text = line[1:] if line.startswith("//") else line
    say(lambda: session.ask(text))
    return True


def _take_result(session: ChatSession, text: str, display: Display, say: Callable[[Ask], None]) -> None:
    """Keep the result of a call; once every call has its own, the model goes on."""
    wanted = max(session.num_calls().values(), default=0)
    if wanted and not text:
        raise InputError("The result is missing", expected="/result TEXT")
    given = [*session.results, text]
    if len(given) < wanted:
        session.results.append(text)
        display.note(f"{len(given)} of {wanted} results; /result TEXT for the next")
        return
    session.results.clear()
    say(lambda: session.give_results(*given))


def _say(session: ChatSession, ask: Ask, stdout: TextIO, display: Display) -> None:
    """Write a reply as it comes; when both models answer, each under its name."""
    silent = list(session.speakers)
    is_comparison, speaking = len(session.speakers) > 1, None
    clean = printable if stdout.isatty() else str
    # Closed also on Ctrl-C: that puts the part of the reply that was said into the history.
    with closing(ask()) as replies:
        for speaker, piece in replies:
            if speaker in silent:
                silent.remove(speaker)
            if is_comparison and speaker != speaking:
                stdout.write(f"[{speaker}] " if speaking is None else f"\n[{speaker}] ")
                speaking = speaker
            stdout.write(clean(piece))
            stdout.flush()
    stdout.write("\n")
    stdout.flush()
    _tell_calls(session, display, [speaker for speaker in session.speakers if speaker not in silent])
    for speaker in silent:
        display.note(f"The {speaker} model ended its reply without a word; it does not remember the question")


def _tell_calls(session: ChatSession, display: Display, speakers: Sequence[Speaker]) -> None:
    """Name the tools that the last replies call."""
    replies = session.exchanges[-1].replies if session.exchanges and speakers else {}
    for speaker in speakers:
        for call in session.calls_of(replies.get(speaker, "")):
            function = call["function"]
            arguments = json.dumps(function.get("arguments", {}), ensure_ascii=False)
            display.note(printable(f"The {speaker} model calls {function['name']} with {arguments}"))
    if session.num_calls():
        display.note("/result TEXT answers a call")


def _obey(session: ChatSession, command: str, display: Display) -> bool:
    """Carry out one command; False for the one that leaves."""
    name, _, text = command.strip().partition(" ")
    if name in ("exit", "quit"):
        return False
    if name in ("base", "tuned"):
        session.let_answer("base" if name == "base" else "tuned")
        display.note(f"The {name} model answers")
        _tell_unseen(session, display)
    elif name in ("compare", "both"):
        session.let_answer("base", "tuned")
        display.note("Both models answer, each knowing only its own replies")
        _tell_unseen(session, display)
    elif name == "system":
        _system(session, text.strip(), display)
    elif name == "undo":
        display.note("The last exchange is forgotten" if session.undo() else "There is nothing to forget")
    elif name == "reset":
        session.reset()
        display.note("The chat begins anew")
    elif name == "help":
        display.show(HELP)
    else:
        raise InputError(
            f"There is no command `/{name}`",
            expected=f"a command, or //{command} to say this",
            fix=did_you_mean(f"/{name}", [f"/{known}" for known in COMMANDS], cutoff=_NEAR),
        )
    return True


def _tell_unseen(session: ChatSession, display: Display) -> None:
    """A model that was not asked before does not know what was talked about."""
    for speaker in session.speakers:
        if count := session.num_unseen(speaker):
            questions = "question" if count == 1 else "questions"
            display.note(
                f"The {speaker} model has not seen {count} {questions} of this chat; /reset starts both anew"
            )


def _system(session: ChatSession, text: str, display: Display) -> None:
    """Show, set, remove or restore the system prompt; the turns so far stay."""
    if not text:
        shown = printable(session.system) if session.system else "(none)"
        display.show(f"{shown}\n")
        display.note('/system TEXT sets another, /system "" none, /system reset that of the training rows')
    elif text == "reset":
        session.system = session.trained_system
        display.note(
            "The system prompt is that of the training rows"
            if session.system
            else "The training rows had no system prompt in common; there is none now"
        )
    elif text in ('""', "''"):
        session.system = None
        display.note("There is no system prompt any more")
    else:
        session.system = text
        display.note("The system prompt is set")
