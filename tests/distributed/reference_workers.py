"""Workers over the reference's parameters, in processes of their own: what the executors' processes call."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.inference.executor.messages import WorkerFactory
from megatron.early_exit.inference.stage_layers import layer_ranges
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.inference.worker.placement import Placement
from megatron.early_exit.inference.worker.stage import FlowControl, Stage
from megatron.early_exit.inference.worker.weight_reading import decoder_weights
from megatron.early_exit.inference.worker.worker import Worker
from tests.configs import VOCAB_SIZE
from tests.reference_checkpoint import (
    HEADS,
    STYLES,
    WITH_USES,
    decoding_config,
    reference_description,
    reference_tensors,
)

NUM_SLOTS = 4


def config_of(head: str, style: str) -> RunConfig:
    return decoding_config(**{**HEADS, **WITH_USES}[head], **STYLES[style])


def factory(
    head: str,
    style: str,
    vocab_size: int = VOCAB_SIZE,
    layers_per_stage: tuple[int, ...] = (),
    fill_credit: int = FlowControl.fill_credit,
) -> WorkerFactory:
    """layers_per_stage: empty: there are no stages."""
    arguments = {"head": head, "style": style, "vocab_size": vocab_size, "layers_per_stage": layers_per_stage}
    return WorkerFactory(f"{__name__}:make_worker", arguments | {"fill_credit": fill_credit})


def make_worker(
    placement: Placement,
    head: str,
    style: str,
    vocab_size: int = VOCAB_SIZE,
    layers_per_stage: Sequence[int] = (),
    fill_credit: int = FlowControl.fill_credit,
) -> tuple[Worker | Stage, str]:
    """(this rank's worker or stage, a fingerprint that is the same on all ranks)"""
    cfg = config_of(head, style)
    layers = layer_ranges(layers_per_stage)[placement.stage] if layers_per_stage else None
    weights = decoder_weights(reference_tensors(cfg), reference_description(cfg), layers=layers, tp=placement.join())
    decoder = Decoder(weights, num_slots=NUM_SLOTS, vocab_size=vocab_size, layers_per_stage=tuple(layers_per_stage))
    worker = Worker(decoder)
    if not layers_per_stage:
        return worker, "reference"
    return Stage(worker, placement.stage, len(layers_per_stage), FlowControl(fill_credit=fill_credit)), "reference"
