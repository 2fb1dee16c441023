"""A pipeline plan: for every pipeline rank the ordered list of its passes and messages in one iteration.

A plan is data. Builders make it, the validator checks it, the simulator times it and the runtime executes it; none of
this is here. Its text form is one line per rank:

    # 1F1B: 2 ranks, 1 chunk, 3 microbatches, 0 + 0 fill
    F0 SF0 F1 SF1 RB0 B0 ...
    RF0 F0 B0 SB0 ...

Microbatches 0 .. num_microbatches - 1 are the batch. Those that fill bubbles follow: first the ones of the pipeline's
warmup, then those of its cooldown; their actions are partial, since they do not pass through all stages both ways, and
are written with a `p`: `F7p`. With several model chunks on a rank the chunk follows a dot: `F3.1`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What a rank does with a microbatch."""

    FORWARD = "F"
    BACKWARD = "B"
    """Includes the losses and gradients of the chunk's exits, unless an EXIT of the microbatch came before."""
    EXIT = "X"
    """Losses and gradients of the chunk's exits, between the chunk's forward and backward of this microbatch; under
    forward-only tuning there is no backward."""
    SEND_FORWARD = "SF"
    """Hidden states to the next stage: what this chunk's forward returned."""
    RECEIVE_FORWARD = "RF"
    """Hidden states from the previous stage: what this chunk's forward takes."""
    SEND_BACKWARD = "SB"
    """Gradient to the previous stage: of what this chunk's forward took."""
    RECEIVE_BACKWARD = "RB"
    """Gradient from the next stage: of what this chunk's forward returned."""
    SEND_TEACHER = "ST"
    """What the final head reads, to the previous stage, whose exits or those of a stage before are to follow it."""
    RECEIVE_TEACHER = "RT"
    """What the final head reads, from the next stage."""

    @property
    def is_message(self) -> bool:
        return len(self) == 2


@dataclass(frozen=True)
class Action:
    """One pass or one message."""

    kind: Kind
    microbatch: int
    chunk: int = 0
    """Model chunk on this rank; the stage is `chunk * num_ranks + rank`."""
    is_partial: bool = False
    """Whether the microbatch fills a bubble."""

    def __str__(self) -> str:
        chunk = f".{self.chunk}" if self.chunk else ""
        return f"{self.kind}{self.microbatch}{chunk}{'p' if self.is_partial else ''}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The inverse of `str`. Raises ValueError."""
        match = re.fullmatch(r"(F|B|X|SF|RF|SB|RB|ST|RT)(\d+)(?:\.(\d+))?(p?)", text)
        if match is None:
            raise ValueError(f"{text!r} is no action; one looks like F3, SB3, or F3.1 (chunk 1), F3p (partial)")
        kind, microbatch, chunk, partial = match.groups()
        return cls(Kind(kind), int(microbatch), int(chunk or 0), bool(partial))


@dataclass(frozen=True)
class Plan:
    """What all pipeline ranks do in one iteration."""

    name: str
    """Name of the schedule, such as 1F1B; for people."""
    ranks: tuple[tuple[Action, ...], ...]
    """Actions of each pipeline rank, in the order in which it runs them."""
    num_microbatches: int
    """Microbatches of the batch, without fill."""
    num_fill_warmup: int = 0
    """Microbatches beyond the batch that run forward and backward through the first stages only."""
    num_fill_cooldown: int = 0
    """Microbatches beyond the batch that run forward through all stages, and backward through the last ones only."""
    num_chunks: int = 1
    """Model chunks on each rank; more than one is the interleaved schedule."""

    @property
    def num_ranks(self) -> int:
        return len(self.ranks)

    @property
    def num_stages(self) -> int:
        """Chunks of all ranks: stage s is chunk s // num_ranks of rank s % num_ranks."""
        return self.num_ranks * self.num_chunks

    @property
    def num_fill(self) -> int:
        return self.num_fill_warmup + self.num_fill_cooldown

    @property
    def fill_warmup(self) -> range:
        """Numbers of the microbatches that fill the warmup's bubbles."""
        return range(self.num_microbatches, self.num_microbatches + self.num_fill_warmup)

    @property
    def fill_cooldown(self) -> range:
        """Numbers of the microbatches that fill the cooldown's bubbles."""
        return range(self.fill_warmup.stop, self.fill_warmup.stop + self.num_fill_cooldown)

    def actions_of(self, stage: int) -> list[Action]:
        """Actions of one stage, in order."""
        chunk, rank = divmod(stage, self.num_ranks)
        return [action for action in self.ranks[rank] if action.chunk == chunk]

    def microbatches(self, stage: int, kind: Kind) -> list[int]:
        """Microbatches with an action of `kind` on a stage, in order."""
        return [action.microbatch for action in self.actions_of(stage) if action.kind == kind]

    def __str__(self) -> str:
        count = lambda number, one, many: f"{number} {one if number == 1 else many}"
        header = (
            f"# {self.name}: {count(self.num_ranks, 'rank', 'ranks')}, {count(self.num_chunks, 'chunk', 'chunks')}, "
            f"{count(self.num_microbatches, 'microbatch', 'microbatches')}, "
            f"{self.num_fill_warmup} + {self.num_fill_cooldown} fill"
        )
        return "\n".join([header, *(" ".join(map(str, actions)) for actions in self.ranks)]) + "\n"

    @classmethod
    def parse(cls, text: str) -> Plan:
        """The inverse of `str`. Raises ValueError with the line that is wrong."""
        lines = text.strip("\n").split("\n")
        pattern = r"# (.+): (\d+) ranks?, (\d+) chunks?, (\d+) microbatch(?:es)?, (\d+) \+ (\d+) fill"
        header = re.fullmatch(pattern, lines[0].strip())
        if header is None:
            example = "# 1F1B: 2 ranks, 1 chunk, 3 microbatches, 0 + 0 fill"
            raise ValueError(f"a plan begins with a line such as '{example}', not with {lines[0]!r}")
        num_ranks, num_chunks, num_microbatches, warmup, cooldown = map(int, header.groups()[1:])
        if len(lines) - 1 != num_ranks:
            raise ValueError(f"the plan is of {num_ranks} ranks and has lines for {len(lines) - 1}")
        ranks = []
        for rank, line in enumerate(lines[1:]):
            try:
                ranks.append(tuple(Action.parse(word) for word in line.split()))
            except ValueError as error:
                raise ValueError(f"rank {rank}: {error}") from None
        return cls(header[1], tuple(ranks), num_microbatches, warmup, cooldown, num_chunks)
