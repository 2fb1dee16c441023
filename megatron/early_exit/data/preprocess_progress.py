"""How far preprocessing has come, on standard error."""

from __future__ import annotations

import sys
import time

from megatron.early_exit.data.encoding import MARKS, EncodedChunk


class Progress:
    """Lines on standard error with documents, rates and the time left."""

    def __init__(self, total_bytes: int | None, interval_sec: float) -> None:
        """total_bytes: None if nobody knows, as of a pipe."""
        self.total_bytes = total_bytes
        self.interval_sec = interval_sec
        self.start = self.last = time.monotonic()
        self.num_documents = self.num_tokens = self.read_bytes = 0

    def update(self, chunk: EncodedChunk) -> None:
        self.num_documents += chunk.num_documents
        self.num_tokens += sum(len(tokens) for key, tokens in chunk.tokens.items() if key != MARKS)
        self.read_bytes += chunk.read_bytes
        now = time.monotonic()
        if now - self.last >= self.interval_sec:
            self.last = now
            print(self.line(now - self.start), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        seconds = max(seconds, 1e-9)
        rate = max(self.read_bytes, 1) / seconds
        rates = (
            f"{self.num_documents:,} documents  {self.num_documents / seconds:,.0f} docs/s  "
            f"{rate / 1e6:.2f} MB/s  {self.num_tokens / seconds:,.0f} tokens/s"
        )
        if self.total_bytes is None:
            return rates
        share = min(self.read_bytes / self.total_bytes, 1.0)
        remaining = max(self.total_bytes - self.read_bytes, 0) / rate
        return f"{share:4.0%}  {rates}  ETA {_clock(remaining)}"

    def finish(self) -> None:
        seconds = time.monotonic() - self.start
        print(
            f"done: {self.num_documents:,} documents, {self.num_tokens:,} tokens, {self.read_bytes / 1e6:.1f} MB "
            f"in {_clock(seconds)} ({self.num_tokens / max(seconds, 1e-9):,.0f} tokens/s)",
            file=sys.stderr,
            flush=True,
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
