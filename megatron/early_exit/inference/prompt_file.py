"""Prompts from --prompt-file, for all programs that have the flag."""

from __future__ import annotations

from pathlib import Path

from megatron.early_exit.data.text_files import read_text_lines


def prompts_of_file(path: Path | None) -> list[str]:
    """The prompts of a file or pipe, one a line; none without a path. Raises ValueError if there are none, or one is
    not text."""
    if path is None:
        return []
    try:
        lines = read_text_lines(path)
    except OSError as error:
        raise ValueError(f"--prompt-file {path} cannot be read: {error.strerror}") from error
    if not lines:
        raise ValueError(f"--prompt-file {path} holds no prompt: all lines are empty")
    return lines
