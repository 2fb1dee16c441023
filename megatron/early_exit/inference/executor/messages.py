"""What the engine's process and its worker ranks send each other: typed structs, without tensors."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from megatron.early_exit.inference.costs import StepCosts
from megatron.early_exit.inference.executor.hidden_states import HiddenStates
from megatron.early_exit.inference.executor.layout import Layout
from megatron.early_exit.inference.protocol import Pass, RowsOutput, StageInput, StageLoad, Step, WorkerDescription


class WorkerFactory(msgspec.Struct, frozen=True):
    """How every rank makes its worker, as plain data."""

    function: str
    """"package.module:name" of a function `(placement, **arguments) -> (worker, fingerprint)`. placement: a
    `Placement`. fingerprint: text that is the same on all ranks that have read the same checkpoint."""
    arguments: dict[str, Any] = {}
    """Of types that MessagePack has; tuples arrive as lists."""


class StoreOpened(msgspec.Struct, frozen=True, tag=True):
    """The first rank of a stage has opened the store through which the stage's ranks find each other; the engine passes
    this on to the others."""

    host: str
    port: int


# From the engine.


class OpenInbox(msgspec.Struct, frozen=True, tag=True):
    """Open the inbox for messages of other ranks. The answer is `InboxOpened`."""


class OpenLinks(msgspec.Struct, frozen=True, tag=True):
    """Connect to the ranks that this one sends to. The answer is `LinksOpened` or `Failed`."""

    layout: Layout
    addresses: list[str]
    """Of the inboxes of all ranks."""
    seconds: float
    """How long that may take."""


class Load(msgspec.Struct, frozen=True, tag=True):
    """Make the worker. The answer is `Ready` or `Failed`."""

    factory: WorkerFactory
    layout: Layout


class Agreed(msgspec.Struct, frozen=True, tag=True):
    """The answer to the `Proposal`s of all ranks."""

    smallest: int


class RunStep(msgspec.Struct, frozen=True, tag=True):
    """Run a step. Rank 0 answers with `StepDone`; stages answer with `RowsAnswered`, the first of which gets this."""

    step: Step


class MeasureCosts(msgspec.Struct, frozen=True, tag=True):
    """Time layers and heads. The first rank of each stage answers with `CostsMeasured`."""


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Answer with `Pong` when all that came before is done: the answer proves progress."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Answer with `Goodbye` and end."""


ToWorker = StoreOpened | OpenInbox | OpenLinks | Load | Agreed | RunStep | MeasureCosts | Ping | Shutdown


# From a rank.


class Hello(msgspec.Struct, frozen=True, tag=True):
    """The first message of a rank."""

    rank: int
    version: str
    """Of this package."""


class InboxOpened(msgspec.Struct, frozen=True, tag=True):
    """The answer to `OpenInbox`."""

    address: str


class LinksOpened(msgspec.Struct, frozen=True, tag=True):
    """All links to this rank and from it work."""


class Proposal(msgspec.Struct, frozen=True, tag=True):
    """What this rank gives to `Placement.smallest`."""

    value: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The worker is loaded."""

    description: WorkerDescription
    fingerprint: str


class StepDone(msgspec.Struct, frozen=True, tag=True):
    """What became of the rows of a step."""

    number: int
    outputs: list[RowsOutput]


class RowsAnswered(msgspec.Struct, frozen=True, tag=True):
    """What became of some rows, from the stage that found it out."""

    outputs: list[RowsOutput]


class CostsMeasured(msgspec.Struct, frozen=True, tag=True):
    """The answer to `MeasureCosts`."""

    costs: StepCosts


class Pong(msgspec.Struct, frozen=True, tag=True):
    """The answer to `Ping`."""

    load: StageLoad = StageLoad()
    """Of the rank's stage."""


ErrorKind = Literal["ValueError", "OSError", "other"]
"""ValueError, OSError: the user can mend it, and the text is one sentence."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The last message of a rank that cannot go on."""

    error: str
    kind: ErrorKind = "other"


class Goodbye(msgspec.Struct, frozen=True, tag=True):
    """The last message of a rank that ends as it was told."""


FromWorker = (
    Hello | StoreOpened | InboxOpened | LinksOpened | Proposal | Ready | StepDone | RowsAnswered | CostsMeasured | Pong
    | Failed | Goodbye
)  # fmt: skip


# From one rank of a pipeline to another.


class LinkOpened(msgspec.Struct, frozen=True, tag=True):
    """The first message of a link."""

    rank: int


class NextInput(msgspec.Struct, frozen=True, tag=True):
    """To the next stage. The bytes of the hidden states follow in a frame of their own."""

    input: StageInput
    hidden: HiddenStates | None = None


class RunPass(msgspec.Struct, frozen=True, tag=True):
    """From the leader of a stage to the others: run this pass. It hands on `MeasureCosts` and `Shutdown` in the same
    order, since all must do the same."""

    chosen: Pass


class GiveCredit(msgspec.Struct, frozen=True, tag=True):
    """To the leader of the stage before."""

    rows: int


PeerMessage = LinkOpened | NextInput | RunPass | GiveCredit | MeasureCosts | Shutdown
