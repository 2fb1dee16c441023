"""Executes a plan: this rank's passes over its model chunks, and its messages, in the plan's order.

What a plan can have and core's schedules cannot: exits that run while a stage waits (X), and microbatches beyond the
batch that pass through some stages only (partial). Everything else (precision, loss scale, recomputation, gradient
reduction) is core's.

**Weights.** Stage s runs backward for N microbatches of the batch and for C_s of the cooldown's fill. Its estimate of
the gradient is the mean over these, so a gradient that comes from stage s + 1, a mean over N + C_{s+1}, is multiplied
by (N + C_{s+1}) / (N + C_s) on arrival. An exit on stage q also sees the W_q warmup fills that get there: every
microbatch that it sees counts 1 / (N + C_q + W_q). With these weights every parameter's gradient is unbiased, whatever
stages a microbatch passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron.early_exit.model.exit_losses import ExitLosses
from megatron.early_exit.model.exit_strategies import Deferred, PendingExit, Postponed, Tuning
from megatron.early_exit.platform.device import device, use_cuda
from megatron.early_exit.schedules.links import Edge, StageLinks
from megatron.early_exit.schedules.messages import CHANNEL_OF, MESSAGE_AFTER
from megatron.early_exit.schedules.plan import Action, Kind, Plan
from megatron.early_exit.schedules.simulate import TimedAction

ForwardStep = Callable[[Iterator | None, torch.nn.Module], tuple[Tensor, Callable | None]]
"""(batches, chunk) -> (hidden states or sum of losses, function of the latter that gives (sum, tokens, ...))"""

_Key = tuple[int, int]  # microbatch, chunk

_MOST_UNANSWERED = 4
"""Messages that may be on their way to a stage from which nothing comes back."""


class PassCounts(NamedTuple):
    """How many microbatches a stage learns from; see the module's text."""

    backward: int
    """Microbatches of the batch and of the cooldown's fill: N + C_s."""
    exits: int
    """Microbatches that its exits see: N + C_q + W_q."""
    gradient_factor: float
    """Factor for gradients from the next stage, of the batch and of the cooldown's fill."""


def pass_counts(plan: Plan, stage: int) -> PassCounts:
    """Counts of a stage, from the plan alone."""

    def count(stage: int, warmup: bool) -> int:
        backwards = plan.microbatches(stage, Kind.BACKWARD)
        return sum((microbatch in plan.fill_warmup) == warmup for microbatch in backwards)

    backward = count(stage, warmup=False)
    is_last = stage == plan.num_stages - 1
    factor = 1.0 if is_last else count(stage + 1, warmup=False) / max(backward, 1)
    return PassCounts(backward, backward + count(stage, warmup=True), factor)


class PlanRuntime:
    """This rank's part of one plan."""

    def __init__(
        self,
        plan: Plan,
        rank: int,
        *,
        config: TransformerConfig,
        chunks: list[torch.nn.Module],
        exit_losses: ExitLosses,
        links: StageLinks,
        forward_step: ForwardStep,
    ) -> None:
        """rank: of this process in its pipeline. chunks: in their wrappers, in the order of their layers."""
        self.plan, self.rank = plan, rank
        self._config, self._chunks, self._exit_losses = config, chunks, exit_losses
        self._links, self._forward_step = links, forward_step
        self._actions = plan.ranks[rank]
        self._has = set(self._actions)
        self._counts = [pass_counts(plan, self._stage(chunk)) for chunk in range(plan.num_chunks)]
        self._last_backward = {
            action.chunk: action for action in self._actions if action.kind == Kind.BACKWARD
        }  # the last one of a chunk stays
        # Plans without any backward tune exits.
        self._strategy = Deferred(exit_losses) if self._last_backward else Tuning(exit_losses)
        self._receives = [
            action for action in self._actions
            if action.kind.is_message and action.kind == CHANNEL_OF[action.kind].receive
        ]  # fmt: skip
        self._answering = {self._peer(action) for action in self._receives}
        self._shown_by = self._sends_shown_by_receives()
        self._handlers: Mapping[Kind, Callable[[Action], None]] = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.EXIT: self._exit,
            Kind.SEND_FORWARD: self._send,
            Kind.SEND_BACKWARD: self._send,
            Kind.SEND_TEACHER: self._send_teacher,
            Kind.RECEIVE_FORWARD: self._receive,
            Kind.RECEIVE_BACKWARD: self._receive,
            Kind.RECEIVE_TEACHER: self._receive,
        }

    # -- One iteration

    def run(
        self,
        iterators: list[Iterator | None],
        *,
        micro_batch_size: int,
        seq_length: int,
        trace: list[TimedAction] | None = None,
    ) -> None:
        """All of this rank's actions, ending with the reduction of gradients; losses are in the exit losses.

        iterators: one per chunk, of which each draws one batch for every microbatch of the plan, fill included. trace:
        is given the time of every action (on CUDA the processor waits for each, which costs time)."""
        tp_size = self._config.tensor_model_parallel_size if self._config.sequence_parallel else 1
        self._shape = (seq_length // tp_size, micro_batch_size, self._config.hidden_size)
        self._batches = [None if i is None else _Batches(i, self.plan) for i in iterators]
        self._inputs: dict[_Key, Tensor] = {}
        self._outputs: dict[_Key, Tensor] = {}
        self._gradients: dict[_Key, Tensor] = {}
        self._leaving: dict[_Key, Tensor] = {}
        self._final_states: dict[_Key, Tensor] = {}
        self._exits: dict[_Key, list[PendingExit]] = {}
        self._num_tokens = torch.zeros((), dtype=torch.int, device=device())
        self._pending = {edge: iter(receives) for edge, receives in self._receives_by_edge().items()}
        for edge in self._pending:
            self._expect_next(edge)
        timers = self._config.timers
        if timers is not None:
            timers("forward-backward", log_level=1).start(barrier=self._config.barrier_with_L1_time)
        origin = time.perf_counter()
        with self._exit_losses.handled_by(self._strategy), ExitStack() as unsynchronised:
            self._no_sync = {}
            for index, chunk in enumerate(self._chunks):
                if hasattr(chunk, "no_sync"):
                    self._no_sync[index] = unsynchronised.enter_context(ExitStack())
                    self._no_sync[index].enter_context(chunk.no_sync())
            for action in self._actions:
                start = time.perf_counter()
                with self._timed(action):
                    self._handlers[action.kind](action)
                if trace is not None:
                    if use_cuda():
                        # Not the other streams, on which messages are awaited that come after this action.
                        torch.cuda.current_stream().synchronize()
                    trace.append(TimedAction(self.rank, action, start - origin, time.perf_counter() - origin))
        self._links.wait_for_all()
        for batches in self._batches:
            if batches is not None:
                batches.draw_all()
        # Loaders end with their iterators, so nothing may hold these when training is over.
        self._batches = []
        left = [*self._inputs, *self._outputs, *self._gradients, *self._leaving, *self._final_states]
        assert not left, f"the plan is over, and microbatches (and chunks) {left} are not"
        if self._config.finalize_model_grads_func is not None and self._last_backward:
            total = self._num_tokens if self._config.calculate_per_token_loss else None
            self._config.finalize_model_grads_func(self._chunks, total)
        if timers is not None:
            timers("forward-backward").stop()

    @contextmanager
    def _timed(self, action: Action) -> Iterator[None]:
        """Core's timers of passes, where they are asked for."""
        name = {Kind.FORWARD: "forward-compute", Kind.BACKWARD: "backward-compute"}.get(action.kind)
        if self._config.timers is None or name is None:
            yield
            return
        self._config.timers(name, log_level=2).start()
        yield
        self._config.timers(name).stop()

    # -- Passes

    def _forward(self, action: Action) -> None:
        key = (action.microbatch, action.chunk)
        chunk, batches = self._chunks[action.chunk], self._batches[action.chunk]
        has_backward = self._with_kind(action, Kind.BACKWARD) in self._has
        received = self._inputs.pop(key, None)
        if received is not None and has_backward:
            received.requires_grad_()
        get_attr_wrapped_model(chunk, "set_input_tensor")([received])
        postponed = Postponed(self._strategy) if self._with_kind(action, Kind.EXIT) in self._has else None
        with torch.set_grad_enabled(has_backward), self._exit_losses.handled_by(postponed or self._strategy):
            batch = None if batches is None else iter([batches.take(action.microbatch)])
            output, loss_function = self._forward_step(batch, chunk)
            is_last_stage = self._stage(action.chunk) == self.plan.num_stages - 1
            if is_last_stage and has_backward:
                output = self._mean_loss(output, loss_function)
        if is_last_stage and self._exit_losses.distils:
            # Core's wrapper returns what the last stage makes in fp32.
            self._final_states[key] = output.to(self._dtype)
        if postponed is not None:
            self._exits[key] = postponed.exits
        if has_backward:
            self._inputs[key] = received
        if has_backward or self._with_kind(action, MESSAGE_AFTER[Kind.FORWARD]) in self._has:
            self._outputs[key] = output

    def _mean_loss(self, loss_sum: Tensor, loss_function: Callable) -> Tensor:
        loss_sum, num_tokens, *_ = loss_function(loss_sum)
        self._num_tokens = self._num_tokens + num_tokens
        if self._config.calculate_per_token_loss:
            return loss_sum
        return loss_sum / num_tokens.clamp(min=1) / self._counts[-1].backward

    def _backward(self, action: Action) -> None:
        key = (action.microbatch, action.chunk)
        is_last_stage = self._stage(action.chunk) == self.plan.num_stages - 1
        received, output = self._inputs.pop(key), self._outputs.pop(key)
        if received is not None:
            received.retain_grad()
        if self._last_backward[action.chunk] == action:
            self._begin_reduction(action.chunk)
        if is_last_stage:
            gradient = None
            if self._config.grad_scale_func is not None:
                output = self._config.grad_scale_func(output)
        elif key in self._gradients:
            gradient = self._gradients.pop(key)
            if action.microbatch not in self.plan.fill_warmup:
                gradient *= self._counts[action.chunk].gradient_factor
        else:  # a warmup fill turns back here: there are only the exits' gradients
            gradient = torch.zeros(self._shape, dtype=self._dtype, device=output.device)
            deallocate_output_tensor(output, self._config.deallocate_pipeline_outputs)
        self._exit_losses.num_microbatches = self._counts[action.chunk].exits
        if self._config.deallocate_pipeline_outputs:
            custom_backward(output, gradient)
        else:
            torch.autograd.backward(output, gradient)
        self._exits.pop(key, None)
        if self._with_kind(action, MESSAGE_AFTER[Kind.BACKWARD]) in self._has:
            self._leaving[key] = received.grad
        if self._last_backward[action.chunk] == action:
            self._end_reduction(action.chunk)

    def _exit(self, action: Action) -> None:
        if self._last_backward.get(action.chunk) == self._with_kind(action, Kind.BACKWARD):
            self._begin_reduction(action.chunk)
        self._exit_losses.num_microbatches = self._counts[action.chunk].exits or self.plan.num_microbatches
        key = (action.microbatch, action.chunk)
        teacher = None
        if key in self._final_states:
            teacher = get_attr_wrapped_model(self._chunks[action.chunk], "teacher")(self._final_states.pop(key))
        for pending in self._exits.pop(key):
            pending.run(teacher)

    def _begin_reduction(self, chunk: int) -> None:
        """Core reduces beside the backward pass of the first stage, which ends last, and in the others' idle time."""
        if chunk in self._no_sync and (self._config.grad_sync_func is None or self._stage(chunk) == 0):
            self._no_sync[chunk].close()

    def _end_reduction(self, chunk: int) -> None:
        if chunk in self._no_sync and self._config.grad_sync_func is not None and self._stage(chunk) != 0:
            self._no_sync[chunk].close()
            self._chunks[chunk].start_grad_sync()

    # -- Messages

    def _send(self, action: Action) -> None:
        key, edge, peer = (action.microbatch, action.chunk), self._edge(action), self._peer(action)
        if action.kind == Kind.SEND_BACKWARD:
            self._links.send(action, edge, self._leaving.pop(key), peer)
            return
        output = self._outputs[key]
        # The links hold the data until they have arrived; the graph needs none of them.
        self._links.send(action, edge, output.detach(), peer)
        if peer not in self._answering:
            # Nothing comes back that shows what has arrived.
            self._links.wait_for_all_but(_MOST_UNANSWERED)
        if self._with_kind(action, Kind.BACKWARD) in self._has:
            deallocate_output_tensor(output, self._config.deallocate_pipeline_outputs)
        else:
            del self._outputs[key]

    def _send_teacher(self, action: Action) -> None:
        key = (action.microbatch, action.chunk)
        self._links.send(action, self._edge(action), self._final_states[key], self._peer(action))
        if self._with_kind(action, Kind.EXIT) not in self._has:
            del self._final_states[key]

    def _receive(self, action: Action) -> None:
        received = self._links.receive(action)
        self._links.arrived(self._shown_by[action])
        self._expect_next(self._edge(action))
        kept = {
            Kind.RECEIVE_FORWARD: self._inputs, Kind.RECEIVE_BACKWARD: self._gradients,
            Kind.RECEIVE_TEACHER: self._final_states,
        }[action.kind]  # fmt: skip
        kept[action.microbatch, action.chunk] = received

    def _expect_next(self, edge: Edge) -> None:
        """Start to receive before it is waited for, so that the message travels beside the passes."""
        action = next(self._pending[edge], None)
        if action is not None:
            self._links.expect(action, edge, self._shape, self._dtype, self._peer(action))

    def _receives_by_edge(self) -> dict[Edge, list[Action]]:
        by_edge: dict[Edge, list[Action]] = {}
        for action in self._receives:
            by_edge.setdefault(self._edge(action), []).append(action)
        return by_edge

    def _sends_shown_by_receives(self) -> dict[Action, set[Action]]:
        """Messages of this rank, for each receive, that must have arrived when it does, and that no earlier one shows:
        its sender had received them before it sent."""
        mine = {self._theirs(action): action for action in self._actions if action.kind.is_message}
        shown_by: dict[Action, set[Action]] = {}
        for peer in {(self.rank - 1) % self.plan.num_ranks, (self.rank + 1) % self.plan.num_ranks}:
            received: set[Action] = set()
            for action in self.plan.ranks[peer]:
                ours = mine.get((peer, action))
                if ours is None:
                    continue
                if ours.kind == CHANNEL_OF[ours.kind].send:
                    received.add(ours)
                else:
                    shown_by[ours], received = received, set()
        return shown_by

    def _theirs(self, message: Action) -> tuple[int, Action]:
        """(peer, the peer's half of a message)"""
        channel = CHANNEL_OF[message.kind]
        kind = channel.receive if message.kind == channel.send else channel.send
        return self._peer(message), Action(kind, message.microbatch, self._peer_chunk(message), message.is_partial)

    # -- Where things are

    @property
    def _dtype(self) -> torch.dtype:
        return self._config.pipeline_dtype

    def _stage(self, chunk: int) -> int:
        return chunk * self.plan.num_ranks + self.rank

    def _peer_stage(self, message: Action) -> int:
        channel = CHANNEL_OF[message.kind]
        return self._stage(message.chunk) + (channel.step if message.kind == channel.send else -channel.step)

    def _peer(self, message: Action) -> int:
        return self._peer_stage(message) % self.plan.num_ranks

    def _peer_chunk(self, message: Action) -> int:
        return self._peer_stage(message) // self.plan.num_ranks

    def _edge(self, message: Action) -> Edge:
        return Edge(CHANNEL_OF[message.kind].step > 0, self._peer_chunk(message) != message.chunk)

    @staticmethod
    def _with_kind(action: Action, kind: Kind) -> Action:
        return Action(kind, action.microbatch, action.chunk, action.is_partial)


class _Batches:
    """Batches by the number of their microbatch, whatever the order in which a plan runs them.

    Every stage draws the same: first those that fill the warmup, which runs before most of the batch, then the batch,
    then those that fill the cooldown."""

    def __init__(self, iterator: Iterator, plan: Plan) -> None:
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
