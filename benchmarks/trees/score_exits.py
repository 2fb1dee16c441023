"""Confidences of all exits over a text, into `exit_calibration.npz` of a checkpoint's folder: what planned exits need
in trees without tools/calibrate_exits.py.

    python benchmarks/trees/score_exits.py CHECKPOINTS PREFIX TOKENS          (run in that tree)
"""

from __future__ import annotations

import sys

import numpy as np

from megatron.early_exit.config.serialize import checkpoint_folder
from megatron.early_exit.data.text_samples import sample_sequences
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import ScoreParams


def main(checkpoint: str, prefix: str, num_tokens: str) -> None:
    llm = LLM.load(checkpoint, max_requests=4)
    length = min(256, llm.engine.description.num_positions)
    sequences = sample_sequences(prefix, llm.engine.description.vocab_size, int(num_tokens), length)
    scored = [result.check() for result in llm.score(sequences, ScoreParams(final=False))]
    confidences = [np.array([head.confidences for head in one.heads]).T for one in scored]
    np.savez_compressed(
        checkpoint_folder(checkpoint, None) / "exit_calibration.npz", confidences=np.concatenate(confidences)
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
