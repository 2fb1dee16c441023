"""How many answers are promised at once: more than may wait are refused, with a guess at when there will be room."""

from __future__ import annotations

import math
from collections import deque

from megatron.early_exit.server.errors import Overloaded

_RECENT = 32
"""Answers from whose durations the time to wait is estimated."""
_LONGEST_WAIT = 60
"""Seconds that a client is told to wait."""


class Admission:
    """Counts answers from their promise to their end."""

    def __init__(self, max_waiting: int) -> None:
        """max_waiting: answers that may wait for a slot."""
        self._max_waiting = max_waiting
        self.num_admitted = 0
        """Answers that were promised and have not ended: waiting, running or being tokenized."""
        self._durations: deque[float] = deque(maxlen=_RECENT)

    def reserve(self, num_answers: int, num_slots: int) -> None:
        """Promise so many more. num_slots: of the engine. Raises ValueError if that can never be, Overloaded if not
        now."""
        most = num_slots + self._max_waiting
        if num_answers > most:
            raise ValueError(
                f"the request asks for {num_answers} answers; at most {most} may run and wait at once (prompts times n)"
            )
        if self.num_admitted + num_answers > most:
            raise Overloaded(
                f"{self.num_admitted} answers run or wait, and {num_answers} more are too many; try again later",
                retry_after=self._seconds_to_wait(num_answers, num_slots),
            )
        self.num_admitted += num_answers

    def release(self, num_answers: int = 1) -> None:
        """Forget answers that were cancelled, or never begun."""
        self.num_admitted -= num_answers

    def end(self, seconds: float) -> None:
        """Note the end of an answer that took so long."""
        self.release()
        self._durations.append(seconds)

    def _seconds_to_wait(self, num_answers: int, num_slots: int) -> int:
        """Until so many answers have ended, by what the last ones took."""
        if not self._durations:
            return 1
        mean = sum(self._durations) / len(self._durations)
        return min(max(math.ceil(mean * num_answers / num_slots), 1), _LONGEST_WAIT)
