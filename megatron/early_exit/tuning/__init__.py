"""The recipe that tunes the exits of an existing model in one command (`tools/tune_exits.py`)."""
