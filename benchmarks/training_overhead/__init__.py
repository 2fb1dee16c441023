"""What exits cost in training: time and memory of an early-exit GPT against plain GPT and against naive exits.

    python -m benchmarks.training_overhead --quick      (from the root of the repository)

Variants, all built from the same settings and seed:
- plain: the model with no exits; core: the same with core's own final head (full logits);
- early exit (ee): exits as this package trains them; naive: the same exits in plain autograd, with full logits kept
  from forward to backward (`naive_exits.py`). Exits sit after 1/4, 2/4 and 3/4 of the layers.

Time: an iteration is forward, backward and optimizer step over all microbatches. Every round runs each variant once, so
that a slow moment of the machine hits all; the order rotates. Added time is the median over rounds of
variant / plain - 1, wall time being that of the slowest rank and CPU time the sum over ranks. It is compared with the
added FLOPs of `flops.py`.

Memory: bytes of tensors alive at the peak of one untimed forward-backward, per pipeline stage, beyond parameters,
gradient buffers and optimizer state (CPU: `memory_tracker.py`; CUDA: PyTorch's allocator). `extra` is the difference
to plain. Its bound on a stage with exits is one chunk of fp32 logits and one fp32 weight gradient (and `TOKEN_BYTES` a
token, below a thousandth of its logits); training in 16 bits adds the 16-bit copies of both.

The last line of the output is one JSON document, also written to benchmarks/results/. It knows pipeline parallelism
only; TP and DP size are 1. On CUDA every rank needs a GPU of its own: layouts that do not fit are skipped.
"""
