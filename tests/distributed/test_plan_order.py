"""Plain 1F1B and interleaved plans have core's order of passes and messages on every rank.

Core's schedules run with a model of one number over gloo. Their passes are recorded by wrapping `forward_step` and
`backward_step`, their messages by wrapping what all methods of `P2PCommunicator` call. Tensors carry the number of
their microbatch and the stage that made them, so a receive is recorded by what came, not by what should have come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megatron.early_exit.schedules.builders import interleaved, one_f_one_b
from megatron.early_exit.schedules.plan import Action, Kind
from tests.distributed.workers import run_distributed

_SHAPE = (2, 1, 1)  # [s, b, h]: the microbatch's number and the stage


class _Pass(torch.autograd.Function):
    """A stage whose output and input gradient say where they come from."""

    @staticmethod
    def forward(ctx, hidden_states: Tensor, microbatch: int, stage: int) -> Tensor:
        ctx.origin = microbatch, stage
        return _labelled(microbatch, stage)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _labelled(*ctx.origin), None, None


def _labelled(microbatch: int, stage: int) -> Tensor:
    return torch.tensor([microbatch, stage], dtype=torch.float32).view(_SHAPE)


def _origin(tensor: Tensor) -> tuple[int, int]:
    microbatch, stage = tensor.flatten().tolist()
    return int(microbatch), int(stage)


class _Chunk(torch.nn.Module):
    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: ModelParallelConfig, stage: int) -> None:
        super().__init__()
        self.config, self.stage = config, stage
        self.input_tensor = None

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        self.input_tensor = tensors[0]

    def forward(self, microbatch: int) -> Tensor:
        if self.input_tensor is None:
            return _Pass.apply(torch.zeros(_SHAPE, requires_grad=True), microbatch, self.stage)
        assert _origin(self.input_tensor) == (microbatch, self.stage - 1)
        return _Pass.apply(self.input_tensor, microbatch, self.stage)


@contextmanager
def _recording(num_ranks: int, actions: list[str]) -> Iterator[None]:
    """Append the text form of this rank's actions, in core's order.

    Where core starts several messages in one call and waits for all, sends come first, then receives, and in each the
    forward direction before the backward one.
    """
    forward_step, backward_step, communicate = (
        schedules.forward_step, schedules.backward_step, P2PCommunicator._communicate,
    )  # fmt: skip

    def record(kind: Kind, microbatch: int, stage: int) -> None:
        actions.append(str(Action(kind, microbatch, stage // num_ranks)))

    def recorded_forward_step(*args, **kwargs):
        output, num_tokens = forward_step(*args, **kwargs)
        stage = args[2].stage
        record(Kind.FORWARD, kwargs["current_microbatch"], stage)
        return output, num_tokens

    def recorded_backward_step(input_tensor, output_tensor, *args):
        # Before it runs, since the last stage's loss is no tensor with a label; its node in the graph is.
        tensor = output_tensor[0] if isinstance(output_tensor, list) else output_tensor
        record(Kind.BACKWARD, *_origin_of_output(tensor))
        return backward_step(input_tensor, output_tensor, *args)

    def recorded_communicate(self, *, tensor_send_next, tensor_send_prev, recv_prev, recv_next, **kwargs):
        # A gradient that is sent was labelled by the backward that made it, as hidden states by their forward.
        if tensor_send_next is not None:
            record(Kind.SEND_FORWARD, *_origin(tensor_send_next))
        if tensor_send_prev is not None:
            record(Kind.SEND_BACKWARD, *_origin(tensor_send_prev))
        from_previous, from_next, requests = communicate(
            self, tensor_send_next=tensor_send_next, tensor_send_prev=tensor_send_prev, recv_prev=recv_prev,
            recv_next=recv_next, **kwargs,
        )  # fmt: skip
        assert not requests  # nothing is on its way: what came can be read
        if recv_prev:
            microbatch, stage = _origin(from_previous)
            record(Kind.RECEIVE_FORWARD, microbatch, stage + 1)
        if recv_next:
            microbatch, stage = _origin(from_next)
            record(Kind.RECEIVE_BACKWARD, microbatch, stage - 1)
        return from_previous, from_next, requests

    with (
        mock.patch.object(schedules, "forward_step", recorded_forward_step),
        mock.patch.object(schedules, "backward_step", recorded_backward_step),
        mock.patch.object(P2PCommunicator, "_communicate", recorded_communicate),
    ):
        yield


def _origin_of_output(tensor: Tensor) -> tuple[int, int]:
    node = tensor.grad_fn
    while not hasattr(node, "origin"):
        node = node.next_functions[0][0]
    return node.origin


def record_core(num_chunks: int, cases: list[tuple[int, int | None]]) -> list[list[str]]:
    """Runs on each worker: the actions of this rank for each (number of microbatches, group size)."""
    num_ranks = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=num_ranks,
        virtual_pipeline_model_parallel_size=num_chunks if num_chunks > 1 else None,
    )
    return [_record_case(num_ranks, num_chunks, *case) for case in cases]


def _record_case(num_ranks: int, num_chunks: int, num_microbatches: int, group_size: int | None) -> list[str]:
    rank = parallel_state.get_pipeline_model_parallel_rank()
    config = ModelParallelConfig(
        pipeline_model_parallel_size=num_ranks,
        virtual_pipeline_model_parallel_size=num_chunks if num_chunks > 1 else None,
        microbatch_group_size_per_vp_stage=group_size,
        pipeline_dtype=torch.float32,
        batch_p2p_comm=False,
    )
    config.hidden_size = _SHAPE[2]  # read by the schedules, which are made for transformers
    for name in ("fine_grained_activation_offloading", "cuda_graph_impl"):
        setattr(config, name, None)
    chunks = [_Chunk(config, chunk * num_ranks + rank) for chunk in range(num_chunks)]

    def forward_step_func(data_iterator: Iterator[int], chunk: _Chunk) -> tuple[Tensor, Callable]:
        loss = lambda output: (output.sum(), {})
        return chunk(next(data_iterator)), loss

    actions: list[str] = []
    with _recording(num_ranks, actions):
        schedules.get_forward_backward_func()(
            forward_step_func=forward_step_func,
            data_iterator=[iter(range(num_microbatches)) for _ in chunks],
            model=chunks,
            num_microbatches=num_microbatches,
            seq_length=_SHAPE[0],
            micro_batch_size=_SHAPE[1],
        )
    return actions


def refused_by_core(num_chunks: int, cases: list[tuple[int, int]]) -> list[bool]:
    """Runs on each worker. Core refuses before it sends anything."""
    num_ranks = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=num_ranks, virtual_pipeline_model_parallel_size=num_chunks
    )
    refused = []
    for case in cases:
        try:
            _record_case(num_ranks, num_chunks, *case)
            refused.append(False)
        except (ValueError, RuntimeError):
            refused.append(True)
    return refused


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_one_f_one_b_is_cores(num_ranks: int) -> None:
    numbers = list(range(1, 2 * num_ranks + 3))  # fewer than stages, odd ones, more than two rounds
    recorded = run_distributed(num_ranks, record_core, num_chunks=1, cases=[(number, None) for number in numbers])
    for case, num_microbatches in enumerate(numbers):
        plan = one_f_one_b(num_ranks, num_microbatches)
        assert [" ".join(map(str, actions)) for actions in plan.ranks] == [
            " ".join(of_rank[case]) for of_rank in recorded
        ]


@pytest.mark.parametrize("num_ranks, num_chunks", [(2, 2), (3, 2), (4, 2), (2, 3)])
def test_interleaved_is_cores(num_ranks: int, num_chunks: int) -> None:
    numbers = range(num_ranks, 3 * num_ranks + 2)
    cases = [
        (number, group_size)
        for group_size in range(num_ranks, num_ranks + 3)
        for number in numbers
        if number >= group_size and not 0 < number % group_size < num_ranks
    ]
    recorded = run_distributed(num_ranks, record_core, num_chunks=num_chunks, cases=cases)
    for case, (num_microbatches, group_size) in enumerate(cases):
        plan = interleaved(num_ranks, num_chunks, num_microbatches, group_size)
        assert [" ".join(map(str, actions)) for actions in plan.ranks] == [
            " ".join(of_rank[case]) for of_rank in recorded
        ]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_interleaved_refuses_what_core_refuses(num_ranks: int) -> None:
    cases = [(number, size) for number in range(1, 2 * num_ranks + 3) for size in range(1, num_ranks + 4)]
    refused = run_distributed(num_ranks, refused_by_core, num_chunks=2, cases=cases)[0]
    for (num_microbatches, group_size), is_refused in zip(cases, refused):
        with pytest.raises(ValueError) if is_refused else nullcontext():
            interleaved(num_ranks, 2, num_microbatches, group_size)
