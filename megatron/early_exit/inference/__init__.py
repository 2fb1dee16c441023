"""Generation and scores: `llm` in front, `engine` schedules, `executor` carries, `worker` computes."""
