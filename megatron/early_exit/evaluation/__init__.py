"""What the exits of a model are worth: quality, certified thresholds, speed beside the full model, standard tasks, and
a report of it all."""
