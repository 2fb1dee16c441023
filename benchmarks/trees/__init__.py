"""Parts of `benchmarks/compare_trees.py`."""
