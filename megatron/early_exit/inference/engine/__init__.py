"""The scheduler: which rows of which requests run next. Knows no tensors and no text."""
