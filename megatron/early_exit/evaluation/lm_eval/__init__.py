"""The model `early-exit` of lm-eval (lm-evaluation-harness), and tasks that need no network."""
