"""How far the model is with its answers."""

from __future__ import annotations

import sys
import time

_SECONDS_BETWEEN_LINES = 30.0
"""Where it does not go to a terminal."""


class AnswerProgress:
    """A line that grows on a terminal; elsewhere a line now and then, and one at the end."""

    def __init__(self) -> None:
        self._begun: int | None = None
        self._tokens = 0
        self._start = self._last = time.monotonic()

    def show(self, done: int, total: int, num_tokens: int) -> None:
        """done: answers that are there, of `total`; num_tokens: of the newest. The first call tells what was there."""
        if self._begun is None:
            self._begun = done
            return
        self._tokens += num_tokens
        now, is_last, is_terminal = time.monotonic(), done == total, sys.stderr.isatty()
        if not (is_last or is_terminal or now - self._last >= _SECONDS_BETWEEN_LINES):
            return
        self._last = now
        seconds = max(now - self._start, 1e-9)
        left = (total - done) * seconds / (done - self._begun)
        rest = "" if is_last else f", {left / 60:.0f} min left"
        print(
            f"answers: {done:,}/{total:,}, {self._tokens:,} tokens, {self._tokens / seconds:,.0f} tokens/s{rest}   ",
            end="\r" if is_terminal and not is_last else "\n", file=sys.stderr, flush=True,
        )  # fmt: skip
