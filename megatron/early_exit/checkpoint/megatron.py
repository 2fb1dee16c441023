"""Checkpoints of Megatron-LM and Megatron-Bridge: a plain GPT or Llama, to our parameters.

    LOAD/latest_checkpointed_iteration.txt                   a number, or the word release
    LOAD/iter_0000100/ or LOAD/release/                      one checkpoint, in one of two formats:
        .metadata, __0_0.distcp, ...; common.pt              torch_dist; Megatron-LM's arguments are in common.pt,
        run_config.yaml                                      Megatron-Bridge's settings in this file
        mp_rank_00/ or mp_rank_00_001/model_optim_rng.pt     torch: one file of each TP or (TP, PP) rank

The first is read by `megatron_sharded.py`, the second by `megatron_ranks.py`; `megatron_writing.py` writes the first.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from megatron.early_exit.checkpoint.legacy_files import RANK_FILE
from megatron.early_exit.checkpoint.megatron_ranks import read_megatron_ranks, tensors_of_ranks
from megatron.early_exit.checkpoint.megatron_settings import model_config
from megatron.early_exit.checkpoint.megatron_sharded import sharded_settings, sharded_tensors
from megatron.early_exit.checkpoint.parameters import check_parameters
from megatron.early_exit.checkpoint.tensors import Tensors
from megatron.early_exit.checkpoint.vocabulary import WORD_EMBEDDING
from megatron.early_exit.config.checkpoint_files import METADATA_FILE, chosen_folder
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.formats import is_own
from megatron.early_exit.config.model import ModelConfig


class MegatronCheckpoint(NamedTuple):
    """A model of Megatron-LM's or Megatron-Bridge's."""

    model: ModelConfig
    tensors: Tensors
    """Under our names."""
    settings: argparse.Namespace
    """All arguments that it was trained with, in Megatron-LM's words."""


def is_megatron(folder: Path) -> bool:
    """Whether `folder` is one checkpoint of Megatron-LM or Megatron-Bridge."""
    if any(folder.glob(f"mp_rank_*/{RANK_FILE}")):
        return True
    return (folder / METADATA_FILE).is_file() and not is_own(folder)


def find_megatron(load: Path, iteration: int | None = None) -> Path:
    """Folder of the checkpoint to read: the given iteration, else the last. Raises FileNotFoundError with what is
    missing, ValueError for a checkpoint of ours."""
    if is_megatron(load):
        return load
    folder = chosen_folder(load, iteration)
    if is_own(folder):
        raise ValueError(f"{folder} is a checkpoint of this project already")
    if not is_megatron(folder):
        raise FileNotFoundError(
            f"{folder} holds no checkpoint of Megatron-LM ({METADATA_FILE} or mp_rank_*/{RANK_FILE})"
        )
    return folder


def read_megatron(folder: Path) -> MegatronCheckpoint:
    """One checkpoint. Its parameters are read when asked for.

    Raises OSError for files that are missing or damaged, ValueError for settings that our model does not know, and if
    the parameters are not those that the settings say."""
    if (folder / METADATA_FILE).is_file():
        settings = sharded_settings(folder)
        model = model_config(settings)
        tensors = sharded_tensors(folder, model)
    else:
        ranks = read_megatron_ranks(folder)
        settings = ranks[0][0]["args"]
        model = model_config(settings)
        tensors = tensors_of_ranks(ranks, model)
    if WORD_EMBEDDING not in tensors:
        raise ValueError(f"{folder} has no {WORD_EMBEDDING}")
    model = replace(model, padded_vocab_size=tensors[WORD_EMBEDDING].shape[0])
    check_parameters(tensors, model, ExitConfig())
    return MegatronCheckpoint(model, tensors, settings)


# torch_dist


# Writing
