"""The commands of `tools/convert_checkpoint.py`."""
