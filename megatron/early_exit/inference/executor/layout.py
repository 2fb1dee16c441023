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

    def targets(self, rank: int) -> list[int]:
        """The ranks that a rank sends to by itself: its like in the next stage, and from a leader the others of its
        stage and the leader before."""
        stage = self.stage_of(rank)
        targets = [rank + self.tensor_parallel_size] if stage + 1 < self.pipeline_parallel_size else []
        if self.is_leader(rank):
            targets += self.ranks_of(stage)[1:]
            targets += [rank - self.tensor_parallel_size] if stage > 0 else []
        return targets

    def sources(self, rank: int) -> list[int]:
        """The ranks that send to a rank."""
        return [other for other in range(self.num_ranks) if rank in self.targets(other)]
