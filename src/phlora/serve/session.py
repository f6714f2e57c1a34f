"""A chat that can switch between the base and the tuned model.

Both are one model in memory: the base answers with the adapter disabled. A chat keeps one history; when both
answer, the tuned model's reply is the one that the next turn builds on. A reply that Ctrl-C stops stays in the
history as far as it got, because the person has read it. Nothing is written anywhere.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from phlora.config import ModelConfig, build_config
from phlora.data.template import TemplateRefusal
from phlora.data.tokenize import encode_chat
from phlora.display import Display, printable
from phlora.errors import InputError, ModelError, RunError, did_you_mean
from phlora.files import read_json
from phlora.models.generate import stream
from phlora.models.load import LoadedModel, LoadedTokenizer, load_adapter, load_model, prepare_tokenizer
from phlora.models.phi3 import context_lengths
from phlora.models.speed import speed_pass

Speaker = Literal["base", "tuned"]

HELP = """\
/base          the base model answers
/tuned         the tuned model answers
/compare       both answer; the chat goes on with the tuned model's reply (also /both)
/system TEXT   set the system prompt; without TEXT remove it
/undo          forget the last question and its reply
/reset         forget the whole chat, but not the system prompt
/help          this list
/exit          leave (also /quit and Ctrl-D)
//TEXT         say something that begins with a slash

Ctrl-C stops a reply; what was said so far stays in the chat."""
COMMANDS = ("base", "tuned", "compare", "both", "system", "undo", "reset", "help", "exit", "quit")


@dataclass(kw_only=True)
class ChatSession:
    """One chat with a model, bare or with an adapter on it.

    Attributes:
        model: a transformers model, or a `peft.PeftModel` when `has_adapter`.
        tokenizer: with the chat template that the adapter was trained with.
        has_adapter: whether `tuned` differs from `base`.
        system: the system prompt, None for none.
        max_new_tokens: longest reply, in tokens.
        temperature: 0 always takes the likeliest token.
        seed: of the first reply; each further one counts on, so that a whole chat can be repeated.
        speakers: who answers, in order; the history keeps the reply of the last.
        history: user and assistant turns in turn.
    """

    model: Any
    tokenizer: LoadedTokenizer
    has_adapter: bool
    system: str | None = None
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int | None = None
    speakers: tuple[Speaker, ...] = ()
    history: list[dict[str, str]] = field(default_factory=list)
    _num_asked: int = 0

    def __post_init__(self) -> None:
        if not self.tokenizer.tokenizer.chat_template:
            raise ModelError(
                "The model's tokenizer has no chat template",
                expected="a model that was made for chats, such as an -instruct variant",
            )
        self.speakers = self.speakers or (("tuned",) if self.has_adapter else ("base",))

    def ask(self, text: str) -> Generator[tuple[Speaker, str], None, None]:
        """Add a user turn and yield the reply piece by piece, with who is speaking.

        When the generator is closed or interrupted early, the part of the reply that was yielded is kept; when
        the last speaker has said nothing, the question is forgotten.

        Raises:
            InputError: the chat does not fit into the model's context, or its template refuses it.
        """
        prompt_ids = self._prompt_ids([*self._messages(), {"role": "user", "content": text}])
        reply = ""
        try:
            for speaker in self.speakers:
                for piece in self._stream(speaker, prompt_ids):
                    if speaker == self.speakers[-1]:
                        reply += piece
                    yield speaker, piece
        finally:
            if reply:
                self.history += [
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": reply},
                ]
                self._num_asked += 1

    def let_answer(self, *speakers: Speaker) -> None:
        """Choose who answers from now on.

        Raises:
            InputError: the tuned model, where there is no adapter.
        """
        if "tuned" in speakers and not self.has_adapter:
            raise InputError(
                "There is no tuned model here, only a base model", fix="start the chat with a run folder"
            )
        self.speakers = speakers

    def undo(self) -> bool:
        """Forget the last question and its reply; False when there is none."""
        had_any = bool(self.history)
        del self.history[-2:]
        return had_any

    def reset(self) -> None:
        """Forget all turns."""
        self.history.clear()

    def _messages(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.history

    def _prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            ids = encode_chat(messages, self.tokenizer.tokenizer)
        except TemplateRefusal as refusal:
            raise InputError(f"The model's chat template refuses the chat: {refusal}") from None
        most = self._max_tokens()
        if most is not None and len(ids) >= most:
            raise InputError(
                f"The chat has {len(ids)} tokens, the model holds {most}",
                fix="/undo, /reset or a shorter text",
            )
        return ids

    def _max_tokens(self) -> int | None:
        return context_lengths(self.model.config).max_tokens

    def _stream(self, speaker: Speaker, prompt_ids: list[int]) -> Iterator[str]:
        is_bare = speaker == "base" and self.has_adapter
        most = self._max_tokens()
        room = self.max_new_tokens if most is None else min(self.max_new_tokens, most - len(prompt_ids))
        with self.model.disable_adapter() if is_bare else nullcontext():
            yield from stream(
                self.model,
                prompt_ids,
                self.tokenizer.tokenizer,
                max_new_tokens=room,
                stop_token_ids=self.tokenizer.stop_token_ids,
                temperature=self.temperature,
                seed=None if self.seed is None else self.seed + self._num_asked,
            )


# ------------------------------------------------------------------------------------------------- opening


def open_chat(
    source: str,
    *,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    seed: int | None = None,
    display: Display | None = None,
) -> ChatSession:
    """Load a run folder, an adapter folder or a model, and begin a chat with it.

    Raises:
        RunError: a run without an adapter.
        ModelError: no such model, or an adapter that does not fit it.
    """
    display = display or Display()
    base, adapter = _parts(source)
    display.stage(f"Loading {base.name}" + (f" with {adapter}" if adapter else ""))
    loaded = load_model(**{**asdict(base), "use_cache": True})
    model: Any = loaded.model
    tokenizer, notes = loaded.tokenizer, loaded.notes
    if adapter:
        adapted = load_adapter(loaded.model, adapter)
        model, tokenizer = adapted.model, _tokenizer_of(adapter, loaded)
        notes += adapted.report.notes
    for note in notes:
        display.note(note)
    speed_pass(model.requires_grad_(False))
    return ChatSession(
        model=model,
        tokenizer=tokenizer,
        has_adapter=adapter is not None,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )


def _parts(source: str) -> tuple[ModelConfig, Path | None]:
    """The base model, and the folder of the adapter on it."""
    folder = Path(source).expanduser()
    if (folder / "run.json").is_file():
        adapter = _adapter_in(folder)
        return _base_of(folder), adapter
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        run = folder.resolve().parent.parent
        is_of_run = folder.resolve().parent.name == "adapter" and (run / "run.json").is_file()
        return (_base_of(run) if is_of_run else _named_base(folder)), folder
    return ModelConfig(name=source), None


def _adapter_in(run: Path) -> Path:
    for folder in (run / "adapter" / "best", run / "adapter" / "last", run / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder
    status = read_json(run / "run.json", RunError).get("status", "unknown")
    raise RunError(
        f"The run has no adapter yet ({status})", where=str(run), fix="finish it: phlora train … --resume"
    )


def _base_of(run: Path) -> ModelConfig:
    """The base model of a run as its configuration asked for it; the device may be another one today."""
    config = read_json(run / "run.json", RunError).get("config")
    if not isinstance(config, dict):
        raise RunError("The run does not say what its base model is", where=str(run / "run.json"))
    return replace(build_config(config).model, device="auto", attn_implementation="auto")


def _named_base(adapter: Path) -> ModelConfig:
    facts = read_json(adapter / "adapter_config.json", ModelError)
    base = facts.get("base_model_name_or_path")
    if not base:
        raise ModelError(
            "The adapter does not say what its base model is",
            where=str(adapter / "adapter_config.json"),
            expected="`base_model_name_or_path`",
        )
    return ModelConfig(name=base, revision=facts.get("revision"))


def _tokenizer_of(adapter: Path, base: LoadedModel) -> LoadedTokenizer:
    """The tokenizer saved with the adapter, because its chat template is the one that was trained; or the base's."""
    if not (adapter / "tokenizer_config.json").is_file():
        return base.tokenizer
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(adapter), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"The adapter's tokenizer cannot be read ({str(error).splitlines()[0]})",
            where=str(adapter),
            fix="copy the folder again, or remove its tokenizer files to use the base model's",
        ) from error
    return prepare_tokenizer(
        tokenizer, config=base.model.config, generation_config=base.model.generation_config
    )


# -------------------------------------------------------------------------------------------- the terminal


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
        if not _take(session, line, display, lambda text: _say(session, text, stdout)):
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
            if not _take(session, line, display, lambda text: _say_stoppably(session, text, stdout, display)):
                return
        except InputError as mistake:
            display.warn(str(mistake))


def _enable_line_editing() -> None:
    try:
        import readline  # noqa: F401
    except ImportError:
        # Windows: the console edits lines by itself.
        return


def _say_stoppably(session: ChatSession, text: str, stdout: TextIO, display: Display) -> None:
    before = len(session.history)
    try:
        _say(session, text, stdout)
    except KeyboardInterrupt:
        stdout.write("\n")
        kept = len(session.history) > before
        display.note(
            "Stopped; the reply stays as it is, /undo removes it" if kept else "Stopped; nothing was said"
        )


def _take(session: ChatSession, line: str, display: Display, say: Callable[[str], None]) -> bool:
    """Do what one line of input asks for; False when it asks to leave."""
    line = line.rstrip("\r\n")
    if not line.strip():
        return True
    if line.startswith("/") and not line.startswith("//"):
        return _obey(session, line[1:], display)
    say(line[1:] if line.startswith("//") else line)
    return True


def _say(session: ChatSession, text: str, stdout: TextIO) -> None:
    """Write a reply as it comes; when both models answer, each under its name."""
    is_comparison, speaking = len(session.speakers) > 1, None
    clean = printable if stdout.isatty() else str
    # Closed also on Ctrl-C: that puts the part of the reply that was said into the history.
    with closing(session.ask(text)) as replies:
        for speaker, piece in replies:
            if is_comparison and speaker != speaking:
                stdout.write(f"[{speaker}] " if speaking is None else f"\n[{speaker}] ")
                speaking = speaker
            stdout.write(clean(piece))
            stdout.flush()
    stdout.write("\n")
    stdout.flush()


def _obey(session: ChatSession, command: str, display: Display) -> bool:
    """Carry out one command; False for the one that leaves."""
    name, _, text = command.strip().partition(" ")
    if name in ("exit", "quit"):
        return False
    if name in ("base", "tuned"):
        session.let_answer("base" if name == "base" else "tuned")
        display.note(f"The {name} model answers")
    elif name in ("compare", "both"):
        session.let_answer("base", "tuned")
        display.note("Both models answer; the chat goes on with the tuned model's reply")
    elif name == "system":
        session.system = text.strip() or None
        display.note("The system prompt is set" if session.system else "There is no system prompt any more")
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
            fix=did_you_mean(f"/{name}", [f"/{known}" for known in COMMANDS]),
        )
    return True
