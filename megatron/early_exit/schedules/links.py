"""Messages between neighbouring pipeline stages: sent without waiting, received in the order in which they are sent.

Core's P2P functions wait for every message that they start, and order those of both directions with each other. A plan
has its own order, so each direction has a process group of its own here: on NCCL a message waits for nothing but the
messages before it in its own direction.
"""

from __future__ import annotations

from collections import deque
from datetime import timedelta

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron.early_exit.platform.device import device
from megatron.early_exit.schedules.plan import Action
from megatron.early_exit.schedules.rank_plan import Edge

_Work = torch.distributed.Work


def _started(work: _Work | None) -> _Work:
    """PyTorch answers with None where a rank is not in the group."""
    assert work is not None, "this rank is not in the process group of its pipeline"
    return work


class StageLinks:
    """This rank's links to the previous and the next pipeline rank. All ranks make them together, once."""

    def __init__(self, *, is_interleaved: bool, timeout_minutes: float) -> None:
        mine = torch.distributed.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
        everywhere: list[list[int] | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, mine)
        self._ranks = mine
        self._groups: dict[Edge, torch.distributed.ProcessGroup] = {}
        wraps = (False, True) if is_interleaved else (False,)
        for ranks in sorted({tuple(ranks) for ranks in everywhere if ranks is not None}):
            for edge in (Edge(is_forward, is_wrap) for is_forward in (True, False) for is_wrap in wraps):
                group = torch.distributed.new_group(list(ranks), timeout=timedelta(minutes=timeout_minutes))
                if list(ranks) == mine:
                    self._groups[edge] = group
        self._sent: deque[tuple[Action, _Work, Tensor]] = deque()
        self._expected: dict[Action, tuple[_Work, Tensor]] = {}
        self._connect()

    def _connect(self) -> None:
        """One message over every edge, pair after pair in the order of all ranks.

        NCCL connects two ranks at their first message and blocks the processor until both are there. A plan's first
        messages come in another order on every rank, and would wait for each other."""
        me, last = torch.distributed.get_rank(), len(self._ranks) - 1
        tensor = torch.zeros(1, device=device())
        for edge, group in self._groups.items():
            step = 1 if edge.is_forward else -1
            wrap = [(last, 0) if edge.is_forward else (0, last)]
            inside = [(rank, rank + step) for rank in range(last + 1) if 0 <= rank + step <= last]
            for sender, receiver in wrap if edge.is_wrap else inside:
                if me == self._ranks[sender]:
                    _started(torch.distributed.isend(tensor, self._ranks[receiver], group=group, tag=edge.tag)).wait()
                elif me == self._ranks[receiver]:
                    _started(torch.distributed.irecv(tensor, self._ranks[sender], group=group, tag=edge.tag)).wait()

    def send(self, name: Action, edge: Edge, tensor: Tensor, peer: int) -> None:
        """Start to send `tensor` to pipeline rank `peer`; it must not change until `arrived(name)`."""
        while self._sent and self._sent[0][1].is_completed():  # NCCL knows; gloo only after a wait
            self._sent.popleft()
        work = _started(torch.distributed.isend(tensor, self._ranks[peer], group=self._groups[edge], tag=edge.tag))
        self._sent.append((name, work, tensor))

    def expect(self, name: Action, edge: Edge, shape: tuple[int, ...], dtype: torch.dtype, peer: int) -> None:
        """Start to receive the next message of this direction from pipeline rank `peer`."""
        tensor = torch.empty(shape, dtype=dtype, device=device())
        work = _started(torch.distributed.irecv(tensor, self._ranks[peer], group=self._groups[edge], tag=edge.tag))
        self._expected[name] = (work, tensor)

    def receive(self, name: Action) -> Tensor:
        """The message that was expected under this name, once it is there."""
        work, tensor = self._expected.pop(name)
        work.wait()
        return tensor

    def arrived(self, names: set[Action]) -> None:
        """Forget messages that are known to have arrived, so that their memory is free."""
        kept: deque[tuple[Action, _Work, Tensor]] = deque()
        for name, work, tensor in self._sent:
            if name in names:
                work.wait()
            else:
                kept.append((name, work, tensor))
        self._sent = kept

    def wait_for_all_but(self, number: int) -> None:
        """Until of everything that was sent all but the last `number` messages have arrived."""
        while len(self._sent) > number:
            _, work, _ = self._sent.popleft()
            work.wait()

    def wait_for_all(self) -> None:
        """Until everything that was sent has arrived."""
        self.wait_for_all_but(0)
