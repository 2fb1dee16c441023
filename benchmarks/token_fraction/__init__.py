"""What exits that learn from a fraction of the tokens save, and what that does to gradients and losses.

    python -m benchmarks.token_fraction --quick                        (from the root of the repository)
    python -m benchmarks.token_fraction --parts time                   (on a machine that does nothing else)
    python -m benchmarks.token_fraction --parts variance losses        (after `make demo`)

time: an iteration of plain GPT and of the same with two exits (after 1/4 and 2/4 of the layers) at
`--exit-loss-token-fraction` 1, 1/2, 1/4; every round runs each once, in rotating order. The time added by exits is that
of an iteration less that of plain GPT in the same round; of exits that are norm and output projection all of it is the
head's. An MLP branch sees all tokens, so its exits save less; the share that is expected then is that of the FLOPs. On
CPU, where all of it is one thread, seconds are those of the processor, which other programs do not use up; on CUDA they
are the wall's.

variance: the model of `make demo` with its exits, gradients of whole batches of its text. Noise of the draw: mean of
|g_f - g|^2 over batches and draws, g over all tokens, g_f over those drawn of the same batch. Noise of the batch:
variance of g over batches. What training feels is the first beside the second.

losses: that model trained from scratch with each fraction, from several seeds; losses of all heads over held-out text,
which are over all tokens. The runs stay in `--work`, and what is there is not run again. A fraction of nearly 1 shows
how far two runs drift apart by themselves.

The last line is one JSON document, also written to benchmarks/results/.
"""
