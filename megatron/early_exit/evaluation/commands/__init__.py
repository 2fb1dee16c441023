"""The commands of `tools/evaluate.py`. What takes long to import is imported when a command runs."""
