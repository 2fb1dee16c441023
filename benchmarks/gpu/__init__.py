"""Measurements on one CUDA GPU, in parts that end in time and can be resumed (`benchmarks/gpu.sh`)."""
