"""What a run knows of its own progress; saved with every checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class TrainingState:
    """Progress of training. The position in the data is the number of consumed samples."""

    iteration: int = 0
    """Finished iterations."""

    consumed_train_samples: int = 0
    """Sequences that training has used, over all replicas."""

    num_skipped_iterations: int = 0
    """Iterations whose gradients overflowed (fp16)."""

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> TrainingState:
        return cls(**state)
