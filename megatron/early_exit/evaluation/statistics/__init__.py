"""Statistics of the evaluation: tests, intervals and metrics over plain arrays. Knows no model, no text and no
PyTorch."""
