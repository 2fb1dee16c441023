"""What preprocessing reads and writes, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron.early_exit.config.data import DataConfig
from megatron.early_exit.data.documents import InputFormat, SplitBy

MOST_WORKERS = 512


@dataclass(frozen=True)
class PreprocessConfig:
    """What to read, what to write and how."""

    input: tuple[str, ...]
    """Files, glob patterns or folders."""

    output_prefix: str
    """Output is PREFIX_KEY_document.bin and .idx for each key."""

    data: DataConfig
    """Which tokenizer (the other settings play no part)."""

    json_keys: tuple[str, ...] = ("text",)
    """Keys of the JSON objects to tokenize; each has its own pair of files."""

    append_eod: bool = False
    """End every document with the tokenizer's end-of-document id."""

    chat: bool = False
    """Lines hold conversations, {"messages": [{"role": ..., "content": ...}, ...]}: only answers get a loss."""

    chat_template: str | None = None
    """How they are written, in Jinja; None: the tokenizer's way."""

    input_format: InputFormat = "auto"
    """How to read the files; `auto` takes .jsonl, .json and what begins with a JSON object as JSON lines, all others as
    text."""

    split_by: SplitBy = "file"
    """What one document is in a text file."""

    workers: int = 1
    """Processes that tokenize."""

    overwrite: bool = False
    """Replace existing output."""

    log_interval_sec: float = 5.0
    """Seconds between two lines of progress."""

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= self.workers <= MOST_WORKERS:
            problems.append(f"--workers {self.workers} must be at least 1 and at most {MOST_WORKERS}")
        if not self.json_keys or len(set(self.json_keys)) != len(self.json_keys):
            problems.append(f"--json-keys {' '.join(self.json_keys)} must be one or more different keys")
        if self.output_prefix.endswith(("/", "/.", "/..")) or Path(self.output_prefix).is_dir():
            example = Path(self.output_prefix) / "corpus"
            problems.append(f"--output-prefix {self.output_prefix} is a folder; add a name, such as {example}")
        elif not Path(self.output_prefix).name:
            problems.append("--output-prefix must not be empty")
        if self.chat and (self.json_keys != ("text",) or self.input_format == "text"):
            problems.append('--chat reads "messages" from JSON lines: leave out --json-keys and --input-format text')
        if self.chat_template is not None and not self.chat:
            problems.append("--chat-template has no effect without --chat")
        if self.log_interval_sec < 0:
            problems.append(f"--log-interval-sec {self.log_interval_sec} must not be negative")
        if problems:
            raise ValueError("\n".join(problems))
