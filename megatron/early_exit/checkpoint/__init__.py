"""Checkpoints: tensors that are read when they are needed, core's format and those of others in and out, exits added
and removed."""
