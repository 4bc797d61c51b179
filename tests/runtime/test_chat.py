"""The interactive chat: what it remembers, what it reads again, and what a terminal sees."""

import io
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from formats.dtypes import Float32
from formats.errors import RequestError
from runtime import Engine
from runtime.chat import Conversation, answer, chat_loop
from runtime.sampling import Sampler
from tests.runtime.helpers import PLENTY, STREAM_RUN, floor_bytes

SETTINGS: dict[str, Any] = {"temperature": 0, "max_new_tokens": 6}
IM_END = 2


@pytest.fixture
def engine(demo4: Path) -> Iterator[Engine]:
    with Engine.open(demo4, ram_bytes=PLENTY) as opened:
        yield opened


@pytest.fixture
def says(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the model says, answer after answer, whatever it is asked."""
    answers: list[str] = []
    ids: list[int] = []

    def sample(self: Sampler, logits: Float32, history: list[int]) -> int:
        if not ids:
            ids.extend([*engine.text.encode(answers.pop(0)), IM_END])
        return ids.pop(0)

    monkeypatch.setattr(Sampler, "sample", sample)
    return answers


def talk(engine: Engine, system: str | None = None, *, chat: bool = True, **settings: Any) -> Conversation:
    return Conversation(engine, SETTINGS | {"max_new_tokens": 50} | settings, system, chat)


def ask(conversation: Conversation, line: str) -> str:
    return "".join(conversation.reply(line))


def prefilled(conversation: Conversation, line: str) -> int:
    """How many tokens were read for an answer."""
    before = conversation.engine.stats.prompt_tokens
    ask(conversation, line)
    return conversation.engine.stats.prompt_tokens - before


def turns(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in conversation.messages]


# ---- what is remembered


def test_question_and_answer_are_remembered(engine: Engine, says: list[str]) -> None:
    says += ["Good day.", "It rains."]
    conversation = talk(engine, "Be brief.")
    assert ask(conversation, "Hello") == "Good day."
    assert ask(conversation, "How is the weather?") == "It rains."
    assert turns(conversation) == [
        ("system", "Be brief."),
        ("user", "Hello"),
        ("assistant", "Good day."),
        ("user", "How is the weather?"),
        ("assistant", "It rains."),
    ]


def test_the_model_reads_all_that_was_said(engine: Engine, says: list[str]) -> None:
    says += ["Good day.", "It rains."]
    conversation = talk(engine)
    ask(conversation, "Hello")
    ask(conversation, "And now?")
    assert conversation.session is not None
    expected = engine.text.encode_chat(conversation.messages, add_generation_prompt=False)
    assert conversation.session.token_ids == expected[: len(conversation.session.token_ids)]


def test_an_empty_answer_is_remembered_as_one(engine: Engine, says: list[str]) -> None:
    says += [""]
    conversation = talk(engine)
    assert ask(conversation, "Hello") == ""
    assert turns(conversation) == [("user", "Hello"), ("assistant", "")]


def test_a_reset_forgets_all_but_the_system_message(engine: Engine, says: list[str]) -> None:
    says += ["Good day."]
    conversation = talk(engine, "Be brief.")
    ask(conversation, "Hello")
    conversation.reset()
    assert turns(conversation) == [("system", "Be brief.")]
    assert conversation.session is None


def test_an_answer_that_was_stopped_is_remembered_as_far_as_it_went(engine: Engine, says: list[str]) -> None:
    says += ["It was a fine morning, and the sun shone."]
    conversation = talk(engine)
    with closing(conversation.reply("Tell me")) as pieces:
        said = next(pieces) + next(pieces)
    assert turns(conversation) == [("user", "Tell me"), ("assistant", said)]


def test_a_question_that_was_never_answered_is_forgotten(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, says: list[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    conversation = talk(engine)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "prefill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask(conversation, "Hello")
    assert turns(conversation) == []
    says += ["Good day."]
    assert ask(conversation, "Hello again") == "Good day."


def test_a_question_that_does_not_fit_is_refused_and_forgotten(demo4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine.open(demo4, ram_bytes=PLENTY, ctx_size=40) as engine:
        conversation = talk(engine, max_new_tokens=3, ignore_eos=True)
        ask(conversation, "Hello")
        before = turns(conversation)
        with pytest.raises(RequestError, match="--ctx-size is 40"):
            ask(conversation, "word " * 50)
        assert turns(conversation) == before


# ---- what is read again


def test_a_second_question_reads_only_what_is_new(engine: Engine, says: list[str]) -> None:
    says += ["Good day.", "It rains."]
    conversation = talk(engine)
    first = prefilled(conversation, "Hello")
    assert conversation.session is not None
    seen = len(conversation.session.token_ids)
    second = prefilled(conversation, "And now?")
    everything = len(engine.text.encode_chat(conversation.messages[:-1]))
    assert seen == first + len(engine.text.encode("Good day."))
    assert second == everything - seen


def test_after_a_reset_all_is_read_again(engine: Engine, says: list[str]) -> None:
    says += ["Good day.", "Good day."]
    conversation = talk(engine, "Be brief.")
    first = prefilled(conversation, "Hello")
    conversation.reset()
    assert prefilled(conversation, "Hello") == first


def test_a_history_that_was_changed_is_read_again(engine: Engine, says: list[str]) -> None:
    says += ["Good day.", "It rains."]
    conversation = talk(engine)
    ask(conversation, "Hello")
    conversation.messages[1]["content"] = "Farewell."
    read = prefilled(conversation, "And now?")
    assert read == len(engine.text.encode_chat(conversation.messages[:-1]))


def test_a_stopped_answer_goes_on_as_a_new_conversation_would(demo4: Path) -> None:
    with Engine.open(demo4, ram_bytes=PLENTY) as engine:
        conversation = talk(engine, max_new_tokens=8, ignore_eos=True)
        with closing(conversation.reply("Tell me a story.")) as pieces:
            next(pieces)
        fresh = talk(engine, max_new_tokens=8, ignore_eos=True)
        fresh.messages = list(conversation.messages)
        assert ask(conversation, "Go on.") == ask(fresh, "Go on.")


def test_without_a_template_it_is_one_growing_text(engine: Engine, says: list[str]) -> None:
    says += [" a time", " a king"]
    conversation = talk(engine, chat=False)
    ask(conversation, "Once upon")
    ask(conversation, " there was")
    assert conversation.session is not None
    text = "Once upon a time there was a king"
    assert conversation.session.token_ids == engine.text.encode(text)[: len(conversation.session.token_ids)]


# ---- the loop


def loop(
    engine: Engine, lines: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[str, str]:
    """(stdout, stderr) of a chat with these lines as its input, which then ends."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    chat_loop(engine, SETTINGS | {"max_new_tokens": 50}, None, chat=True)
    return capsys.readouterr()


@pytest.fixture
def capture(engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda *lines: loop(engine, list(lines), capsys, monkeypatch)


def test_answers_go_to_stdout_and_all_else_to_stderr(capture: Any, says: list[str]) -> None:
    says += ["Good day.", "It rains."]
    out, err = capture("Hello", "And now?", "/quit")
    assert [line.strip() for line in out.split("\n")] == ["Good day.", "It rains.", ""]
    assert "/reset begins anew" in err


def test_an_answer_that_a_limit_ended_says_so(capture: Any, says: list[str]) -> None:
    says += ["word " * 60, "Good day."]
    err = capture("Hello", "And now?")[1]
    assert err.count("[--max-new-tokens ended this]") == 1


def test_quit_ends_the_loop_before_the_next_line(capture: Any, says: list[str]) -> None:
    says += ["Good day."]
    capture("/quit", "Hello")
    assert says == ["Good day."]


def test_the_end_of_input_ends_the_loop(capture: Any, says: list[str]) -> None:
    says += ["Good day."]
    assert "Good day." in capture("Hello")[0]


def test_reset_in_the_loop_begins_anew(capture: Any, says: list[str], engine: Engine) -> None:
    says += ["Good day.", "Good day."]
    capture("Hello", "/reset", "Hello", "/quit")
    hello = [{"role": "user", "content": "Hello"}]
    assert engine.stats.prompt_tokens == 2 * len(engine.text.encode_chat(hello))


def test_stats_in_the_loop_are_one_line_on_stderr(capture: Any) -> None:
    out, err = capture("/stats", "/quit")
    assert out.strip() == ""
    assert "cache hits 0 %, peak memory " in err


def test_help_is_shown_again(capture: Any) -> None:
    err = capture("/help", "/quit")[1]
    assert err.count("/reset begins anew") == 2
    assert "unknown" not in err


def test_an_unknown_command_is_named(capture: Any) -> None:
    assert "unknown command /bye" in capture("/bye bye", "/quit")[1]


def test_an_empty_line_asks_nothing(capture: Any, says: list[str]) -> None:
    says += ["Good day."]
    capture("", "  ", "/quit")
    assert says == ["Good day."]


def test_a_question_that_cannot_be_read_is_one_line_and_the_loop_goes_on(
    demo4: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine.open(demo4, ram_bytes=PLENTY, ctx_size=30) as engine:
        out, err = loop(engine, ["word " * 50, "Hello", "/quit"], capsys, monkeypatch)
    assert "error: the prompt makes " in err
    assert "/reset begins anew" in err
    assert out.strip()


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(
    engine: Engine, says: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    says += ["It was a fine morning."]
    step = Engine.step
    steps: list[int] = []

    def interrupted(self: Engine, batch: Any) -> Any:
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(Engine, "step", interrupted)
    conversation = talk(engine)
    answer(conversation, "Tell me")
    out, err = capsys.readouterr()
    assert err == " [stopped]"
    assert turns(conversation) == [("user", "Tell me"), ("assistant", out.removesuffix("\n"))]
    assert out.removesuffix("\n") == engine.text.spelling(engine.text.encode("It")[0]) + " was a"


# ---- a real terminal


class Terminal:
    """A process whose stdin, stdout and stderr are one terminal."""

    def __init__(self, words: list[str]) -> None:
        self.master, slave = pty.openpty()
        attributes = termios.tcgetattr(slave)
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(slave, termios.TCSANOW, attributes)
        self.process = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)
        self.shown = ""

    def until(self, text: str) -> str:
        """All that is shown up to this text."""
        deadline = time.monotonic() + 60
        while text not in self.shown:
            ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {text!r} in {self.shown!r}"
            self.shown += os.read(self.master, 4096).decode()
        before, self.shown = self.shown.split(text, 1)
        return before

    def type(self, line: str) -> None:
        os.write(self.master, line.encode(errors="surrogateescape") + b"\n")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(demo4: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """A chat in a terminal that knows no escape sequences, with the strict decoding of most locales."""
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    ram = str(floor_bytes(demo4, threads=1))
    words = [*STREAM_RUN, str(demo4), "--temp", "0", "-n", "8", "--ignore-eos", "-t", "1", "--ram", ram]
    with closing(Terminal(words)) as terminal:
        terminal.until("> ")
        yield terminal


def test_a_terminal_without_a_prompt_is_a_chat(terminal: Terminal) -> None:
    terminal.type("Tell me a story.")
    assert terminal.until("> ").replace("Tell me a story.", "").strip()
    terminal.type("/quit")
    assert terminal.process.wait(timeout=60) == 0


def test_a_line_can_be_edited(terminal: Terminal) -> None:
    terminal.type("help\x01/")  # Ctrl-A goes to its beginning
    terminal.until("/reset begins anew")


def test_a_line_that_is_no_text_is_told_and_the_loop_goes_on(terminal: Terminal) -> None:
    terminal.type("\udcff")
    terminal.until("error: the line is not UTF-8 text (byte 0)")
    terminal.type("/help")
    terminal.until("/reset begins anew")
