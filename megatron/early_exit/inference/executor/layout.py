"""How the ranks of a model stand: pipeline stages, and tensor-parallel ranks in each."""

from __future__ import annotations

import msgspec


class Layout(msgspec.Struct, frozen=True):
    """Rank = stage * tensor_parallel_size + tensor-parallel rank."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def stage_of(self, rank: int) -> int:
        return rank // self.tensor_parallel_size

    def tensor_parallel_rank_of(self, rank: int) -> int:
        return rank % self.tensor_parallel_size

    def is_leader(self, rank: int) -> bool:
        """Whether a rank is the first of its stage."""
        return self.tensor_parallel_rank_of(rank) == 0

    def ranks_of(self, stage: int) -> range:
        """The ranks of a stage, its leader first."""
        return range(stage * self.tensor_parallel_size, (stage + 1) * self.tensor_parallel_size)

    @property
    def leaders(self) -> range:
        """The first rank of each stage, in the order of stages."""
        return range(0, self.num_ranks, self.tensor_parallel_size)

    def following(self, rank: int) -> list[int]:
        """The rank that gets this one's rows: its like in the next stage; none in the last."""
        return [rank + self.tensor_parallel_size] if self.stage_of(rank) + 1 < self.pipeline_parallel_size else []

    def followers(self, rank: int) -> list[int]:
        """The others of its stage, which do what a leader says; none of another rank."""
        return list(self.ranks_of(self.stage_of(rank))[1:]) if self.is_leader(rank) else []

    def leader_before(self, rank: int) -> list[int]:
        """The leader that gets a leader's credit, of the stage before; none in the first, and of another rank."""
        has_one = self.is_leader(rank) and self.stage_of(rank) > 0
        return [rank - self.tensor_parallel_size] if has_one else []

    def targets(self, rank: int) -> list[int]:
        """The ranks that a rank sends to by itself."""
        return [*self.following(rank), *self.followers(rank), *self.leader_before(rank)]

    def sources(self, rank: int) -> list[int]:
        """The ranks that send to a rank."""
        return [other for other in range(self.num_ranks) if rank in self.targets(other)]
