"""One iteration of a plan on one rank: its passes and messages, and what microbatches hold between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron.early_exit.model.exit_losses import ExitLosses
from megatron.early_exit.model.exit_strategies import Deferred, PendingExit, Postponed, Tuning
from megatron.early_exit.platform.device import device
from megatron.early_exit.schedules.links import StageLinks
from megatron.early_exit.schedules.messages import MESSAGE_AFTER
from megatron.early_exit.schedules.plan import Action, Kind, Plan
from megatron.early_exit.schedules.rank_plan import Edge, RankPlan

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Any]]]
"""Sum of losses -> (sum, tokens, nothing)"""

ForwardStep = Callable[[Iterator[Any] | None, torch.nn.Module], tuple[Tensor, LossFunction | None]]
"""(batches, chunk) -> (hidden states or sum of losses, function of the latter)"""

_MOST_UNANSWERED = 4
"""Messages that may be on their way to a stage from which nothing comes back."""


@dataclass(frozen=True)
class RankModel:
    """What the passes of a rank run on."""

    config: TransformerConfig
    chunks: list[torch.nn.Module]
    """In their wrappers, in the order of their layers."""
    exit_losses: ExitLosses
    links: StageLinks
    forward_step: ForwardStep

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states between stages."""
        dtype: torch.dtype = self.config.pipeline_dtype
        return dtype


_Key = tuple[int, int]  # microbatch, chunk


@dataclass(frozen=True)
class _Held:
    """What microbatches hold on their chunks until another pass or message takes it."""

    inputs: dict[_Key, Tensor | None] = field(default_factory=dict)
    """For a forward what was received; for a backward what its forward took (None: the embedding was first)."""
    outputs: dict[_Key, Tensor] = field(default_factory=dict)
    """What a forward returned, for its message and its backward."""
    gradients: dict[_Key, Tensor] = field(default_factory=dict)
    """Received for a backward."""
    leaving: dict[_Key, Tensor] = field(default_factory=dict)
    """What a backward returned, for its message."""
    final_states: dict[_Key, Tensor] = field(default_factory=dict)
    """What the final head reads, for exits that follow it, and for its message."""
    exits: dict[_Key, list[PendingExit]] = field(default_factory=dict)
    """Exits of a forward that run before its backward, or in it."""

    def check_empty(self) -> None:
        """Every microbatch has taken all that it left."""
        left = {one.name: sorted(held) for one in fields(self) if (held := getattr(self, one.name))}
        assert not left, f"the plan is over, and of microbatches (and chunks) there are {left}"


class Iteration:
    """Runs the actions of one iteration, in the plan's order; made anew for each."""

    def __init__(
        self, plan: RankPlan, model: RankModel, batches: list[Batches | None], shape: tuple[int, int, int]
    ) -> None:
        """batches: of every chunk. shape: of hidden states between stages, [s, b, h] or this TP rank's part."""
        self._plan, self._model, self._batches, self._shape = plan, model, batches, shape
        self._held = _Held()
        self.num_tokens = torch.zeros((), dtype=torch.int, device=device())
        """Of the final head's losses so far."""
        # Plans without any backward tune exits.
        self._strategy = Deferred(model.exit_losses) if plan.has_backwards else Tuning(model.exit_losses)
        self._pending = {edge: iter(receives) for edge, receives in plan.receives.items()}
        self._no_sync: dict[int, ExitStack] = {}

    @contextmanager
    def started(self) -> Iterator[None]:
        """Between the first action and the last: messages are expected, gradients reduced only when a chunk's backwards
        end."""
        for edge in self._pending:
            self._expect_next(edge)
        with self._model.exit_losses.handled_by(self._strategy), ExitStack() as unsynchronised:
            for index, chunk in enumerate(self._model.chunks):
                if isinstance(chunk, DistributedDataParallel):
                    self._no_sync[index] = unsynchronised.enter_context(ExitStack())
                    self._no_sync[index].enter_context(chunk.no_sync())
            yield

    def run(self, action: Action) -> None:
        _HANDLERS[action.kind](self, action)

    def finish(self) -> None:
        """Wait until all messages have arrived, and draw what this stage has not seen of the iteration's batches."""
        self._model.links.wait_for_all()
        for batches in self._batches:
            if batches is not None:
                batches.draw_all()
        self._held.check_empty()

    # -- Passes

    def _forward(self, action: Action) -> None:
        key, held, exit_losses = (action.microbatch, action.chunk), self._held, self._model.exit_losses
        chunk, batches = self._model.chunks[action.chunk], self._batches[action.chunk]
        has_backward = self._plan.has(action, Kind.BACKWARD)
        is_last_stage = self._plan.is_last_stage(action.chunk)
        received = held.inputs.pop(key, None)
        if received is not None and has_backward:
            received.requires_grad_()
        get_attr_wrapped_model(chunk, "set_input_tensor")([received])
        postponed = Postponed(self._strategy) if self._plan.has(action, Kind.EXIT) else None
        with torch.set_grad_enabled(has_backward), exit_losses.handled_by(postponed or self._strategy):
            batch = None if batches is None else iter([batches.take(action.microbatch)])
            output, loss_function = self._model.forward_step(batch, chunk)
            if is_last_stage and has_backward:
                assert loss_function is not None, "the last stage has no batches, so no loss"
                output = self._mean_loss(output, loss_function)
        if is_last_stage and exit_losses.distils:
            # Core's wrapper returns what the last stage makes in fp32.
            held.final_states[key] = output.to(self._model.dtype)
        if postponed is not None:
            held.exits[key] = postponed.exits
        if has_backward:
            held.inputs[key] = received
        if has_backward or self._plan.has(action, MESSAGE_AFTER[Kind.FORWARD]):
            held.outputs[key] = output

    def _mean_loss(self, loss_sum: Tensor, loss_function: LossFunction) -> Tensor:
        loss_sum, num_tokens, *_ = loss_function(loss_sum)
        self.num_tokens = self.num_tokens + num_tokens
        if self._model.config.calculate_per_token_loss:
            return loss_sum
        return loss_sum / num_tokens.clamp(min=1) / self._plan.counts[-1].backward

    def _backward(self, action: Action) -> None:
        key, held, config = (action.microbatch, action.chunk), self._held, self._model.config
        received, output = held.inputs.pop(key), held.outputs.pop(key)
        if received is not None:
            received.retain_grad()
        if self._plan.is_last_backward(action):
            self._begin_reduction(action.chunk)
        gradient: Tensor | None = None
        if self._plan.is_last_stage(action.chunk):
            if config.grad_scale_func is not None:
                output = config.grad_scale_func(output)
        elif key in held.gradients:
            gradient = held.gradients.pop(key)
            if action.microbatch not in self._plan.plan.fill_warmup:
                gradient *= self._plan.counts[action.chunk].gradient_factor
        else:  # a warmup fill turns back here: there are only the exits' gradients
            gradient = torch.zeros(self._shape, dtype=self._model.dtype, device=output.device)
            deallocate_output_tensor(output, config.deallocate_pipeline_outputs)
        self._model.exit_losses.num_microbatches = self._plan.counts[action.chunk].exits
        if config.deallocate_pipeline_outputs:
            custom_backward(output, gradient)
        else:
            torch.autograd.backward(output, gradient)
        held.exits.pop(key, None)
        if self._plan.has(action, MESSAGE_AFTER[Kind.BACKWARD]):
            assert received is not None and received.grad is not None, f"{action} has no gradient for the stage before"
            held.leaving[key] = received.grad
        if self._plan.is_last_backward(action):
            self._end_reduction(action.chunk)

    def _exit(self, action: Action) -> None:
        if self._plan.is_in_last_backward(action):
            self._begin_reduction(action.chunk)
        num_microbatches = self._plan.counts[action.chunk].exits or self._plan.plan.num_microbatches
        self._model.exit_losses.num_microbatches = num_microbatches
        key = (action.microbatch, action.chunk)
        teacher = None
        if key in self._held.final_states:
            chunk = self._model.chunks[action.chunk]
            teacher = get_attr_wrapped_model(chunk, "teacher")(self._held.final_states.pop(key))
        for pending in self._held.exits.pop(key):
            pending.run(teacher)

    def _begin_reduction(self, chunk: int) -> None:
        """Core reduces beside the backward pass of the first stage, which ends last, and in the others' idle time."""
        if chunk in self._no_sync and (self._model.config.grad_sync_func is None or self._plan.stage(chunk) == 0):
            self._no_sync[chunk].close()

    def _end_reduction(self, chunk: int) -> None:
        if chunk in self._no_sync and self._model.config.grad_sync_func is not None and self._plan.stage(chunk) != 0:
            self._no_sync[chunk].close()
            wrapped = self._model.chunks[chunk]
            assert isinstance(wrapped, DistributedDataParallel), "gradients are reduced by DDP alone"
            wrapped.start_grad_sync()

    # -- Messages

    def _send_forward(self, action: Action) -> None:
        key = (action.microbatch, action.chunk)
        output = self._held.outputs[key]
        # The links hold the data until they have arrived; the graph needs none of them.
        self._send(action, output.detach())
        if self._plan.peer(action) not in self._plan.answering:
            # Nothing comes back that shows what has arrived.
            self._model.links.wait_for_all_but(_MOST_UNANSWERED)
        if self._plan.has(action, Kind.BACKWARD):
            deallocate_output_tensor(output, self._model.config.deallocate_pipeline_outputs)
        else:
            del self._held.outputs[key]

    def _send_backward(self, action: Action) -> None:
        self._send(action, self._held.leaving.pop((action.microbatch, action.chunk)))

    def _send_teacher(self, action: Action) -> None:
        key = (action.microbatch, action.chunk)
        self._send(action, self._held.final_states[key])
        if not self._plan.has(action, Kind.EXIT):
            del self._held.final_states[key]

    def _send(self, action: Action, tensor: Tensor) -> None:
        self._model.links.send(action, self._plan.edge(action), tensor, self._plan.peer(action))

    def _receive_forward(self, action: Action) -> None:
        self._held.inputs[action.microbatch, action.chunk] = self._receive(action)

    def _receive_backward(self, action: Action) -> None:
        self._held.gradients[action.microbatch, action.chunk] = self._receive(action)

    def _receive_teacher(self, action: Action) -> None:
        self._held.final_states[action.microbatch, action.chunk] = self._receive(action)

    def _receive(self, action: Action) -> Tensor:
        received = self._model.links.receive(action)
        self._model.links.arrived(self._plan.shown_by[action])
        self._expect_next(self._plan.edge(action))
        return received

    def _expect_next(self, edge: Edge) -> None:
        """Start to receive before it is waited for, so that the message travels beside the passes."""
        action = next(self._pending[edge], None)
        if action is not None:
            self._model.links.expect(action, edge, self._shape, self._model.dtype, self._plan.peer(action))


# Functions, not methods of an iteration: these would keep it, and the loaders that its batches come from, alive.
_HANDLERS: dict[Kind, Callable[[Iteration, Action], None]] = {
    Kind.FORWARD: Iteration._forward,
    Kind.BACKWARD: Iteration._backward,
    Kind.EXIT: Iteration._exit,
    Kind.SEND_FORWARD: Iteration._send_forward,
    Kind.SEND_BACKWARD: Iteration._send_backward,
    Kind.SEND_TEACHER: Iteration._send_teacher,
    Kind.RECEIVE_FORWARD: Iteration._receive_forward,
    Kind.RECEIVE_BACKWARD: Iteration._receive_backward,
    Kind.RECEIVE_TEACHER: Iteration._receive_teacher,
}


class Batches:
    """Batches by the number of their microbatch, whatever the order in which a plan runs them.

    Every stage draws the same: first those that fill the warmup, which runs before most of the batch, then the batch,
    then those that fill the cooldown."""

    def __init__(self, iterator: Iterator[Any], plan: Plan) -> None:
        self._iterator = iterator
        self._order = iter([*plan.fill_warmup, *range(plan.num_microbatches), *plan.fill_cooldown])
        self._drawn: dict[int, Any] = {}

    def take(self, microbatch: int) -> Any:
        while microbatch not in self._drawn:
            self._draw(next(self._order))
        return self._drawn.pop(microbatch)

    def draw_all(self) -> None:
        """Go on to the next iteration's, also on a stage that does not see all of them."""
        for microbatch in self._order:
            self._draw(microbatch)

    def _draw(self, microbatch: int) -> None:
        self._drawn[microbatch] = next(self._iterator)
