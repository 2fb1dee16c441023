"""What pipeline stages, early exits and speculation bring in decoding, measured with real processes beside formulas.

    python -m benchmarks.pipeline_inference            (from the root of the repository)

The package's engine, executor and stages, a process for each rank, over a model of which only time is real
(`workers.py`): a pass of a stage sleeps for `alpha + beta * rows`, a head for `head`. Ranks that
sleep do not compete for cores, so what is measured is how passes, messages and decisions overlap. In each round, in
turn, with 1, 4 and 16 requests:
- full: all stages for every token, the baseline;
- early_exit: tokens leave at the stages with given shares;
- draft_then_verify, across_stages: drafts of the exit on stage 0, accepted with a given probability;
- tp_full, tp_early_exit: the same layers on as many tensor-parallel ranks, by a stated model: one process that sleeps
  as long as they would take.
What carrying a token costs beside its passes is measured with short passes before every round, and used in the formulas
and in the event simulation (`simulation.py`), which also shows pipelines of other lengths. The last
line is one JSON document.
"""
