"""Megatron Early Exit: train, tune and serve early-exit language models on Megatron-Core.

`megatron` is a namespace package that `megatron-core` shares with this one: never add `megatron/__init__.py`.
"""

__version__ = "0.1.0"
