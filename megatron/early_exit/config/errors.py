"""The error for settings that cannot work."""

from __future__ import annotations

from collections.abc import Iterable


class ConfigError(ValueError):
    """Settings that cannot work; `problems` has one line for each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        count = f"{len(self.problems)} problems" if len(self.problems) > 1 else "1 problem"
        super().__init__(f"{count} with the settings:\n" + "\n".join(f"  - {problem}" for problem in self.problems))
