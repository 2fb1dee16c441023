"""What `tools/generate.py` shows of answers: text as it comes, tables, JSON; and the conversation at a terminal."""

from __future__ import annotations

import json
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from types import FrameType

from megatron.early_exit.data.text_files import replace_surrogates
from megatron.early_exit.inference import report
from megatron.early_exit.inference.executor.base import ExecutorError
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.prompt_input import typed_prompts
from megatron.early_exit.inference.text_engine import OutputDelta, RequestOutput


class AnswerDisplay:
    """Answers prompts and shows the answers. Whoever refuses a prompt says so on standard error."""

    def __init__(
        self, llm: LLM, params: GenerationParams, colour: str, *, chat: bool, as_json: bool, predictions: bool
    ) -> None:
        """colour: of --color. chat: each answer sees the conversation before it. as_json: one document a line for each
        answer. predictions: show what evaluated exits predict for each token."""
        self._llm, self._params = llm, params
        self._in_colour, self._num_layers = report.in_colour(colour), llm.engine.description.num_layers
        self._is_chat, self._as_json, self._predictions = chat, as_json, predictions

    def check_workers(self) -> None:
        """Raise ExecutorError if they have ended."""
        if self._llm.engine.failure is not None:
            raise ExecutorError(self._llm.engine.failure)

    def answer(self, prompts: Sequence[str]) -> bool:
        """Whether all prompts were answered. One answer alone is shown as it comes."""
        if len(prompts) == 1 and self._params.n == 1 and not self._as_json:
            return self._show_live(prompts[0], prompts[0]) is not None
        return self._answer_all(list(prompts))

    def converse(self) -> bool:
        """Answer what is typed until standard input ends. Returns whether all was answered.

        At a terminal Ctrl-C stops the answer, and the conversation goes on with what was shown of it; it ends the
        program where nothing is being answered, or when the answer does not stop."""
        messages: list[dict[str, str]] = []
        all_answered = True
        for line in typed_prompts():
            turn = [*messages, {"role": "user", "content": line}]
            try:
                prompt: str | list[int] = self._llm.tokenizer.chat(turn) if self._is_chat else line
            except ValueError as error:
                self._refuse(line, str(error))
                all_answered = False
                continue
            output = self._show_live(line, prompt, may_stop=sys.stdin.isatty())
            if output is None:
                all_answered = False
            elif output.text or output.result is not None:  # else it was stopped before it began
                messages = [*turn, {"role": "assistant", "content": output.text}]
        return all_answered

    def _show_live(self, typed: str, prompt: str | list[int], may_stop: bool = False) -> RequestOutput | None:
        """Answer one prompt and show the text as it comes, after what was typed unless it is a chat. None if the prompt
        was refused; an output without a result if Ctrl-C stopped it (`may_stop`)."""
        before, output = "" if self._is_chat else typed, RequestOutput(None, [])
        with closing(self._llm.stream(prompt, self._params)) as deltas, _noted_interrupts(may_stop) as is_stopped:
            for delta in deltas:
                output = delta.output
                if output.result is None and output.error is not None:
                    break
                if not self._as_json:
                    print(before + self._text_of(delta), end="", flush=True)
                    before = ""
                if is_stopped():
                    break
        if output.error is not None:
            self.check_workers()
            self._refuse(typed, output.error)
            return None
        if output.result is None:
            print(flush=True)
            print("generate.py: stopped", file=sys.stderr, flush=True)
        elif self._as_json:
            _print_json(typed, output)
        else:
            print("\n")
            self._print_tables(output)
        return output

    def _text_of(self, one: OutputDelta | RequestOutput) -> str:
        if not self._in_colour:
            return one.text
        return report.coloured_text(one.pieces, one.tokens, self._num_layers)

    def _print_tables(self, output: RequestOutput) -> None:
        if len(output.check().usage) > 1 and not self._in_colour:
            print(report.marked(output.pieces, output.tokens) + "\n")
        if self._predictions:
            print(report.predictions_table(output.pieces, output.tokens, self._llm.tokenizer) + "\n")
        print(report.usage_table(output, self._llm.engine.description.num_stages) + "\n", flush=True)

    def _answer_all(self, prompts: list[str]) -> bool:
        """Answer all prompts at once and show each when it and those before it are done. False if one was refused."""
        order = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(self._params.n)]
        expected, all_answered = deque(order), True
        done: dict[tuple[int, int], RequestOutput] = {}
        for delta in self._llm.stream(prompts, self._params):
            if delta.is_finished:
                done[delta.output.prompt_index, delta.output.sample_index] = delta.output
            while expected and expected[0] in done:
                following = expected.popleft()
                output, prompt = done.pop(following), prompts[following[0]]
                if output.error is not None:
                    all_answered = False
                    self._refuse(prompt, output.error)
                if self._as_json:
                    _print_json(prompt, output)
                elif output.error is None:
                    print(f"{prompt}{self._text_of(output)}\n")
                    self._print_tables(output)
        return all_answered

    def _refuse(self, prompt: str, error: str) -> None:
        """Say so, unless the workers have ended, which is said once for all prompts (`check_workers`)."""
        if self._llm.engine.failure is None:
            print(f"generate.py: prompt {prompt[:40]!r} was refused: {error}", file=sys.stderr, flush=True)


def _print_json(prompt: str, output: RequestOutput) -> None:
    # A prompt that was refused may be no text.
    document = report.as_json(replace_surrogates(prompt), output)
    is_utf_8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(document, ensure_ascii=not is_utf_8), flush=True)


@contextmanager
def _noted_interrupts(are_noted: bool) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, which then raises nothing: the answer is stopped between two steps, with engine and
    workers in order. Ctrl-C for the second time raises KeyboardInterrupt. are_noted: if not, all of them do."""
    is_pressed = False
    if not are_noted:
        yield lambda: is_pressed
        return

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal is_pressed
        is_pressed = True
        signal.signal(signal.SIGINT, usual)

    usual = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: is_pressed
    finally:
        signal.signal(signal.SIGINT, usual)
