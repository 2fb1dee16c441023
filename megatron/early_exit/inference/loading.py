"""Loads a checkpoint for inference: what cannot work is refused before anything is read, then this rank's part is read.

It builds no training model and needs nothing of core.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron.early_exit.checkpoint.read_model import fingerprint, read_model
from megatron.early_exit.checkpoint.start import reading
from megatron.early_exit.config.checkpoint_choice import checkpoint_folder
from megatron.early_exit.config.checkpoint_files import PROBES_FILE
from megatron.early_exit.config.description import ModelDescription
from megatron.early_exit.config.saved_description import read_description
from megatron.early_exit.data.tokenizer import Tokenizer
from megatron.early_exit.inference import checked
from megatron.early_exit.inference.executor.layout import Layout
from megatron.early_exit.inference.exit_probes import ExitProbes
from megatron.early_exit.inference.fingerprint import ExitFingerprint
from megatron.early_exit.inference.params import ExitScore
from megatron.early_exit.inference.shortlist import Shortlist
from megatron.early_exit.inference.stage_layers import layer_ranges, split_layers, stages_in_words
from megatron.early_exit.inference.worker.certified_head import (
    CERTIFIED_HEAD_SETTINGS,
    CertifiedHeadSetting,
    certified_bytes,
    certified_in_words,
)
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.inference.worker.kv_cache import CacheSize, bytes_per_token, cache_memory, choose_cache_size
from megatron.early_exit.inference.worker.linear import Int8Linear, fastest_linear
from megatron.early_exit.inference.worker.placement import AlonePlacement, Placement
from megatron.early_exit.inference.worker.stage import FlowControl, Stage
from megatron.early_exit.inference.worker.weight_reading import (
    check_can_decode,
    decoder_weights,
    num_output_weights,
    shapes_of_layers,
)
from megatron.early_exit.inference.worker.weights import num_ids_with_rows
from megatron.early_exit.inference.worker.worker import Worker
from megatron.early_exit.platform.device import claim_device, device, free_memory_bytes, use_cuda

log = logging.getLogger(__name__)

_ALONE = AlonePlacement()

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LoadConfig:
    """Which checkpoint to load, and how: plain values, the same on all ranks. Impossible ones raise ValueError."""

    path: str
    """Folder of checkpoints (--save of the training)."""
    iteration: int | None = None
    """Default: the last one."""
    tensor_parallel_size: int = 1
    """Ranks that share the weights, of each pipeline stage."""
    pipeline_parallel_size: int = 1
    """Stages, each with some consecutive layers."""
    pipeline_layers: tuple[int, ...] | None = None
    """Layers of each stage, default as many on each, as far as that comes out even."""
    fill_min_rows: int | None = None
    """Rows of a request that must have exited on a stage before they go on to the next ones; default 1, and
    `default_fill_min_rows` where `LLM.load` starts the ranks."""
    dtype: str | None = None
    """fp32 or bf16, default that of the training, fp32 for one in fp16."""
    max_requests: int | None = None
    """Slots, each with keys and values: at most so many, default 16."""
    max_length: int | None = None
    """Positions of the longest sequence, default what the model takes, at most 4,096: a prompt and its answer but for
    the answer's last token, which is never fed back."""
    kv_cache_gib: float | None = None
    """Memory of each rank for keys and values (GiB); default: 90% of what a GPU has free beside the weights; on the CPU
    4, or half of what is free."""
    quantize: str | None = None
    """all: keep all linear layers in int8. On the CPU."""
    shortlist: bool | None = None
    """Evaluate exits first over the frequent tokens of the checkpoint's shortlist; default if it has few enough."""
    certified_head: CertifiedHeadSetting = "auto"
    """Greedy tokens, where neither log-probabilities nor confidences are wanted, from output weights in int8, certified
    to be the exact head's. On the CPU, beside the weights: memory for an int8 copy. auto: of large heads, for as many
    rows as it is faster; on: always; off: never."""
    cuda_graphs: bool = True
    """Start the kernels of several layers at once where that can be done."""

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        sizes = ("tensor_parallel_size", "pipeline_parallel_size", "fill_min_rows", "max_requests", "max_length")
        for name in sizes:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, checked.integer(name, value))
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.pipeline_layers is not None:
            layers = checked.several("pipeline_layers", self.pipeline_layers, checked.integer)
            object.__setattr__(self, "pipeline_layers", layers)
        if self.pipeline_parallel_size == 1 and self.fill_min_rows is not None:
            raise ValueError("fill_min_rows has no effect on one stage; leave it out, or raise pipeline_parallel_size")
        most = FlowControl().fill_credit
        if self.fill_min_rows is not None and self.fill_min_rows > most:
            raise ValueError(f"fill_min_rows is {self.fill_min_rows}; at most {most} rows go on at once")
        if self.kv_cache_gib is not None:
            object.__setattr__(self, "kv_cache_gib", checked.number("kv_cache_gib", self.kv_cache_gib))
            if not (0 < self.kv_cache_gib < math.inf):
                raise ValueError(f"kv_cache_gib is {self.kv_cache_gib}; it must be a number above 0")
        if self.quantize is not None:
            checked.quantize(self.quantize)
            if use_cuda():
                raise ValueError("quantize is for decoding on the CPU; on a GPU choose dtype bf16")
        self._check_certified_head()

    def _check_certified_head(self) -> None:
        if self.certified_head not in CERTIFIED_HEAD_SETTINGS:
            raise ValueError(
                f"certified_head is {self.certified_head!r}; choose one of {', '.join(CERTIFIED_HEAD_SETTINGS)}"
            )
        if self.certified_head == "on" and use_cuda():
            raise ValueError("certified_head is for decoding on the CPU; leave it at auto, or off")
        if self.certified_head == "on" and self.quantize == "all":
            raise ValueError(
                "certified_head is on, but with quantize 'all' the heads are in int8 themselves; leave it out"
            )

    @property
    def layout(self) -> Layout:
        return Layout(self.tensor_parallel_size, self.pipeline_parallel_size)


class InferenceCheckpoint:
    """A checkpoint and how it is loaded: what its settings tell is checked, and no parameter has been read."""

    def __init__(self, config: LoadConfig, stage: int | None = 0) -> None:
        """stage: whose weights, keys and values this process will hold; None: it will have none, and memory is not
        asked for. (On a GPU the question alone takes some.)

        Raises ConfigError if there is no checkpoint, ValueError for what cannot work."""
        self.config, self._stage = config, stage
        self.folder: Path = checkpoint_folder(config.path, config.iteration)
        self.description: ModelDescription = read_description(self.folder)
        longest = self.description.max_position_embeddings
        if config.max_length is not None and config.max_length > longest:
            raise ValueError(f"max_length is {config.max_length}; the model takes sequences of 1 to {longest} tokens")
        check_can_decode(self.description.model, config.tensor_parallel_size)
        self._check_exits()
        num_layers = self.description.model.num_layers
        self.layers_per_stage = split_layers(num_layers, config.pipeline_parallel_size, config.pipeline_layers)
        self._shortlist = Shortlist.load(self.folder)
        if config.shortlist and self._shortlist is None:
            raise ValueError(
                "shortlist needs frequent tokens; tools/evaluate.py calibrate --shortlist-size counts them"
            )
        self.probes, self.no_probes = self._read_probes()
        """Those of the exits, and why there are none."""
        if stage is not None:
            self._check_cache(self._weights_bytes)

    def _check_exits(self) -> None:
        layers, num_layers = self.description.exits.exit_layer_nums, self.description.model.num_layers
        if outside := [number for number in layers if not 1 <= number <= num_layers]:
            raise ValueError(
                f"the settings in {self.folder} name an exit at layer {outside[0]}, which no stage has: the model has "
                f"the layers 1 to {num_layers}; correct exit_layer_nums there"
            )

    def _read_probes(self) -> tuple[ExitProbes | None, str]:
        """Raises ValueError if they cannot be read."""
        probes = ExitProbes.load(self.folder)
        if probes is None:
            return None, "the checkpoint has none"
        mismatch = probes.mismatch(
            fingerprint(self.folder),
            self.description.exits.leaving_layers,
            self.description.model.hidden_size,
        )
        if mismatch is None:
            return probes, ""
        return None, f"of those in {self.folder / PROBES_FILE}, {mismatch}"

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, keys and values."""
        return DTYPES[self.config.dtype or ("bf16" if self.description.dtype == "bf16" else "fp32")]

    @property
    def _layers(self) -> range:
        """Those of this process, counted from 0."""
        assert self._stage is not None, "this process holds no weights"
        return layer_ranges(self.layers_per_stage)[self._stage]

    @property
    def stages_in_words(self) -> str:
        """Which layers and exits each stage has."""
        return stages_in_words(self.layers_per_stage, self.description.exits.exit_layer_nums)

    @property
    def _weights_bytes(self) -> int:
        """What this rank's weights take at least."""
        shapes = shapes_of_layers(self.description, self._layers).values()
        itemsize = 1 if self.config.quantize == "all" else self.dtype.itemsize
        return sum(map(math.prod, shapes)) * itemsize // self.config.tensor_parallel_size + self._certified_bytes

    @property
    def _certified_bytes(self) -> int:
        """What certified forms of this rank's heads may take."""
        if use_cuda() or self.config.quantize == "all":
            return 0
        model, setting = self.description, self.config.certified_head
        shape = (-(-model.padded_vocab_size // self.config.tensor_parallel_size), model.model.hidden_size)
        of_one = certified_bytes(shape, self.dtype, setting)
        if not of_one:
            return 0
        count = num_output_weights(model, self._layers)
        # The weight is needed as it is, which the plain head may have packed; an embedding is there anyway.
        is_embedding = self._layers.start == 0 and not model.model.untie_embeddings_and_output_weights
        return count * of_one + max(count - is_embedding, 0) * math.prod(shape) * self.dtype.itemsize

    def _check_cache(self, weights_bytes: int) -> CacheSize:
        """The size of keys and values on this rank, if weights will take `weights_bytes` of what is free now. Raises
        ValueError with sizes that fit, if those asked for do not."""
        config = self.config
        token_bytes = bytes_per_token(self.description, config.tensor_parallel_size, self.dtype.itemsize, self._layers)
        memory = cache_memory(max(free_memory_bytes() - weights_bytes, 0), use_cuda(), config.kv_cache_gib)
        longest = self.description.max_position_embeddings
        return choose_cache_size(token_bytes, memory, longest, config.max_requests, config.max_length)

    def shortlist(self, num_ids: int) -> Shortlist | None:
        """The frequent tokens that exits are evaluated with first; None: with all. num_ids: of the tokenizer."""
        is_wanted = self.config.shortlist
        if is_wanted is None:
            is_wanted = self._shortlist is not None and 2 * len(self._shortlist.ids) <= num_ids
        return self._shortlist if is_wanted else None

    def exit_fingerprint(self, tokenizer: Tokenizer, score: ExitScore = "head") -> ExitFingerprint:
        """What the scores of this model's exits depend on. Probes do without a shortlist."""
        is_probe = score == "probe"
        shortlist = None if is_probe else self.shortlist(tokenizer.vocab_size)
        return ExitFingerprint(
            weights=fingerprint(self.folder),
            exit_layers=self.description.exits.leaving_layers,
            dtype="bf16" if self.dtype == torch.bfloat16 else "fp32",
            quantize=self.config.quantize,
            shortlist=None if shortlist is None else shortlist.digest,
            tokenizer=tokenizer.fingerprint,
            ends=tuple(sorted(tokenizer.ends)),
            probes=self.probes.digest if is_probe and self.probes is not None else None,
        )

    def load_decoder(self, num_ids: int, placement: Placement = _ALONE) -> Decoder:
        """Read this rank's weights and take the memory for keys and values. All ranks call it together.

        num_ids: of the tokenizer. placement: of this rank; it is asked when nothing more can be refused by one rank
        alone.
        Raises OSError if the checkpoint is damaged, ValueError if it is not the same on all ranks."""
        _, tensors = read_model(self.folder)
        shortlist = self.shortlist(num_ids)
        tp = placement.join()
        self._check_same_checkpoint(placement)
        with reading(self.folder):
            weights = decoder_weights(
                tensors,
                self.description,
                layers=self._layers,
                tp=tp,
                device=device(),
                dtype=self.dtype,
                make_linear=Int8Linear if self.config.quantize == "all" else fastest_linear,
                certified_heads=self.config.certified_head,
                shortlist=() if shortlist is None else tuple(shortlist.ids.tolist()),
                probes=self.probes,
            )
        speaks = tp.rank == 0 and self._stage == self._largest_stage
        size = self._agreed_cache_size(placement, speaks)
        if speaks:
            on_each = " on each rank" if self.config.layout.num_ranks > 1 else ""
            log.info("keys and values: %s%s", size, on_each)
        if tp.rank == 0 and weights.certified_heads:
            log.info("certified heads: %s", certified_in_words(weights.certified_heads))
        return Decoder(
            weights,
            num_slots=size.num_slots,
            num_positions=size.num_positions,
            # Stages without the weight of the final head cannot tell.
            vocab_size=placement.smallest(num_ids_with_rows(weights, num_ids)),
            use_graphs=None if self.config.cuda_graphs else False,
            layers_per_stage=self.layers_per_stage,
        )

    @property
    def _largest_stage(self) -> int:
        """The first of those with most bytes of keys and values."""
        per_token = [bytes_per_token(self.description, 1, 1, layers) for layers in layer_ranges(self.layers_per_stage)]
        return per_token.index(max(per_token))

    def _agreed_cache_size(self, placement: Placement, speaks: bool) -> CacheSize:
        """What fits on every rank, now that the weights are there. speaks: whether this rank says what users should
        know."""
        if use_cuda():
            torch.cuda.empty_cache()
        mine = self._check_cache(0)
        size = replace(mine, num_slots=placement.smallest(mine.num_slots))
        wanted = self.config.max_requests
        if wanted is not None and size.num_slots < wanted and speaks:
            log.warning(
                "memory holds the keys and values of %d requests at once, not of max_requests %d; others wait. Raise "
                "kv_cache_gib or lower max_length", size.num_slots, wanted,
            )  # fmt: skip
        return size

    @property
    def identity(self) -> str:
        """Hexadecimal digits that are the same on all ranks, if they find the same checkpoint."""
        weights = fingerprint(self.folder)
        return weights if self.probes is None else hashlib.sha256(f"{weights}{self.probes.digest}".encode()).hexdigest()

    def _check_same_checkpoint(self, placement: Placement) -> None:
        mine = int(self.identity[:15], 16)  # as much as a message's integer holds
        if placement.smallest(mine) != -placement.smallest(-mine):
            raise ValueError(
                f"ranks find different checkpoints in {self.folder}: it was written again meanwhile, or the nodes have "
                "different folders; load it again"
            )


def load_worker(placement: Placement, num_ids: int, **settings: Any) -> tuple[Worker | Stage, str]:
    """(a worker, or a pipeline stage if there are several, `identity` of its checkpoint): what each rank calls.

    settings: fields of `LoadConfig`; the others as of `InferenceCheckpoint.load_decoder`"""
    claim_device()
    config = LoadConfig(**settings)
    checkpoint = InferenceCheckpoint(config, placement.stage)
    flow = FlowControl(fill_min_rows=config.fill_min_rows or 1)
    worker = Worker(checkpoint.load_decoder(num_ids, placement))
    num_stages, digits = config.pipeline_parallel_size, checkpoint.identity
    return worker if num_stages == 1 else Stage(worker, placement.stage, num_stages, flow), digits


def default_fill_min_rows(num_ranks: int) -> int:
    """Where so many ranks run on this machine.

    Where they share cores, a pass of later stages takes time from earlier ones, so rows that have exited go on several
    at a time."""
    return 1 if use_cuda() or num_ranks <= len(os.sched_getaffinity(0)) else 8
