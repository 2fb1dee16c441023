"""Pre-training and EE-Tuning: the loop, one step, plans that are executed, checkpoints, what is logged."""
