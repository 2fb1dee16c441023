"""A tiny model whose last exit is the final head again, for certificates and probes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.data_files import write_documents
from tests.server.models import NUM_LAYERS, chat_model

LENGTH, ANSWER = 6, 8
"""Tokens of a prompt, and of an answer."""


def make_model(folder: Path, num_documents: int) -> None:
    """FOLDER/exits, a checkpoint with exits after layers 2 and 6, the last one, and FOLDER/text, documents."""
    from megatron.early_exit.checkpoint.convert_command import main as convert

    chat_model(folder)
    exits = ["--exit-layer-nums", "2", str(NUM_LAYERS), "--use-exit-norm", "--init", "copy"]
    assert convert(["add-exits", "--load", str(folder / "plain"), "--save", str(folder / "exits"), *exits]) == 0
    draw = np.random.default_rng(0)
    write_documents(folder / "text", [draw.integers(0, 200, LENGTH + 2).tolist() for _ in range(num_documents)])


def iteration(folder: Path) -> Path:
    """The only one of a checkpoint."""
    (only,) = folder.glob("iter_*")
    return only
