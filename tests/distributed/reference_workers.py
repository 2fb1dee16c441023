"""Workers over the reference's parameters, in processes of their own: what the executors' processes call."""

from __future__ import annotations

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.inference.executor.messages import WorkerFactory
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.inference.worker.placement import Placement
from megatron.early_exit.inference.worker.weights import decoder_weights
from megatron.early_exit.inference.worker.worker import Worker
from tests.configs import VOCAB_SIZE
from tests.distributed.engines import HEADS, STYLES, decoding_config
from tests.distributed.parallel_model import reference_description, reference_tensors

NUM_SLOTS = 4


def config_of(head: str, style: str) -> RunConfig:
    return decoding_config(**HEADS[head], **STYLES[style])


def factory(head: str, style: str, vocab_size: int = VOCAB_SIZE) -> WorkerFactory:
    arguments = {"head": head, "style": style, "vocab_size": vocab_size}
    return WorkerFactory(f"{__name__}:make_worker", arguments)


def make_worker(placement: Placement, head: str, style: str, vocab_size: int = VOCAB_SIZE) -> tuple[Worker, str]:
    """(this rank's worker, a fingerprint that is the same on all ranks)"""
    cfg = config_of(head, style)
    weights = decoder_weights(reference_tensors(cfg), reference_description(cfg), tp=placement.join())
    return Worker(Decoder(weights, num_slots=NUM_SLOTS, vocab_size=vocab_size)), "reference"
