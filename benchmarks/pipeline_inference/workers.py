"""Workers of `pipeline_inference`: the package's own, over a model of which only time is real.

Hidden states carry the token and the position of their row. Layers leave them alone and sleep; heads read them, and
answer from a hash of (seed, position, token): what the final head says, whether an exit says the same, and the first
exit that is confident. So every mode gives the same tokens, with the shares and the acceptance that are asked for, and
ranks that sleep do not compete for the cores of this machine. Everything else is as always: passes, messages, deferred
rows, heads' outputs, decisions.
"""

from __future__ import annotations

import math
import random
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.parameters import expected_shapes
from megatron.early_exit.checkpoint.tensors import LazyTensor
from megatron.early_exit.config.data import TokenizerConfig
from megatron.early_exit.config.description import ModelDescription
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.inference.executor.messages import WorkerFactory
from megatron.early_exit.inference.worker.attention import AttentionMetadata
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.inference.worker.head_output import HeadOutput
from megatron.early_exit.inference.worker.placement import Placement
from megatron.early_exit.inference.worker.stage import Stage
from megatron.early_exit.inference.worker.weight_reading import decoder_weights
from megatron.early_exit.inference.worker.worker import Worker

VOCAB_SIZE, NUM_POSITIONS = 4096, 1024
THRESHOLD = 0.8
"""Confident exits lie above it, others below."""

_CONFIDENT, _UNSURE = 0.95, 0.4


class PassTimes:
    """Seconds that passes take, in a file, so that they can change while workers run."""

    _FORMAT = struct.Struct("3d")

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def write(self, alpha: float, beta: float, head: float) -> None:
        """A layer takes `alpha + beta * rows`, a head `head`."""
        self._path.write_bytes(self._FORMAT.pack(alpha, beta, head))

    def layers(self, num_layers: int, rows: int) -> float:
        alpha, beta, _ = self._read()
        return num_layers * (alpha + beta * rows)

    def head(self) -> float:
        return self._read()[2]

    def _read(self) -> tuple[float, float, float]:
        return self._FORMAT.unpack(self._path.read_bytes())


class Script:
    """What heads say. Each stage but the last ends with an exit."""

    def __init__(self, seed: int, shares: Sequence[float], acceptance: float) -> None:
        """shares: of tokens at which each exit, and then the final head, is the first that is confident. acceptance:
        share of tokens at which an exit says what the final head says."""
        self._seed, self._shares, self._acceptance = seed, shares, acceptance

    def final_token(self, position: int, token: int) -> int:
        return int(self._draw("token", position, token) * VOCAB_SIZE)

    def exit_token(self, position: int, token: int) -> int:
        agrees = self._draw("agrees", position, token) < self._acceptance
        return (self.final_token(position, token) + (not agrees)) % VOCAB_SIZE

    def is_confident(self, exit_index: int, position: int, token: int) -> bool:
        return self._draw("exit", position, token) < sum(self._shares[: exit_index + 1])

    def _draw(self, what: str, position: int, token: int) -> float:
        return random.Random(f"{self._seed} {what} {position} {token}").random()


class SleepingDecoder(Decoder):
    """A decoder whose layers and heads take the time that they are told to, and say what a script says."""

    def __init__(self, *args: Any, times: PassTimes, script: Script, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._times, self._script = times, script

    def embed(self, tokens: Sequence[int], attention: AttentionMetadata) -> Tensor:
        hidden = torch.zeros(len(tokens), self.weights.description.model.hidden_size)
        hidden[:, 0], hidden[:, 1] = torch.tensor(tokens), attention.positions
        return hidden

    def run_layers(self, hidden: Tensor, attention: AttentionMetadata, first: int, last: int) -> tuple[Tensor, Tensor]:
        time.sleep(self._times.layers(last - first, attention.num_rows))
        return hidden, hidden

    def exit_output(self, exit_index: int, hidden: Tensor, *, tokens_only: bool = False) -> HeadOutput:
        says = self._script
        return self._head(
            [
                (says.exit_token(*row), _CONFIDENT if says.is_confident(exit_index, *row) else _UNSURE)
                for row in _rows(hidden)
            ]
        )

    def final_output(self, hidden: Tensor, *, tokens_only: bool = False) -> HeadOutput:
        return self._head([(self._script.final_token(*row), _CONFIDENT) for row in _rows(hidden)])

    def _head(self, says: list[tuple[int, float]]) -> HeadOutput:
        """says: (token, its probability) of each row"""
        time.sleep(self._times.head())
        logits = torch.zeros(len(says), VOCAB_SIZE)
        for row, (token, confidence) in enumerate(says):
            logits[row, token] = math.log(confidence / (1 - confidence) * (VOCAB_SIZE - 1))
        return HeadOutput(logits, vocab_size=VOCAB_SIZE, tp=self.weights.tp)


def _rows(hidden: Tensor) -> list[tuple[int, int]]:
    """(position, token) of each"""
    return [(int(position), int(token)) for token, position in hidden[:, :2].tolist()]


def exit_config(num_layers: int) -> ExitConfig:
    """An exit behind every layer but the last."""
    return ExitConfig(exit_layer_nums=tuple(range(1, num_layers)))


def _description(num_layers: int) -> ModelDescription:
    model = ModelConfig(
        num_layers=num_layers, hidden_size=16, num_attention_heads=2, position_embedding_type="rope",
        max_position_embeddings=NUM_POSITIONS, padded_vocab_size=VOCAB_SIZE,
    )  # fmt: skip
    tokenizer = TokenizerConfig("NullTokenizer", vocab_size=VOCAB_SIZE - 1)
    return ModelDescription(model=model, exits=exit_config(num_layers), tokenizer=tokenizer, dtype="fp32")


def factory(**arguments: Any) -> WorkerFactory:
    """arguments: of `make_worker`"""
    return WorkerFactory(f"{__name__}:make_worker", arguments)


def make_worker(
    placement: Placement,
    times: str,
    num_layers: int,
    num_stages: int,
    num_slots: int,
    seed: int,
    shares: list[float],
    acceptance: float,
) -> tuple[Worker | Stage, str]:
    """(worker of a rank, a fingerprint): one layer for each stage, or all layers in one. times: path of `PassTimes`"""
    description, per_stage = _description(num_layers), num_layers // num_stages
    first = placement.stage * per_stage
    shapes = expected_shapes(description.model, description.exits)
    weights = decoder_weights(
        {name: LazyTensor.of(torch.zeros(shape)) for name, shape in shapes.items()},
        description,
        layers=range(first, first + per_stage),
        tp=placement.join(),
    )
    decoder = SleepingDecoder(
        weights, num_slots=num_slots, vocab_size=VOCAB_SIZE, layers_per_stage=(per_stage,) * num_stages,
        times=PassTimes(times), script=Script(seed, shares, acceptance),
    )  # fmt: skip
    worker = Worker(decoder)
    return (worker if num_stages == 1 else Stage(worker, placement.stage, num_stages)), "scripted"
