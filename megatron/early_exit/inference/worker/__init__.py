"""The tensors of inference: weights, keys and values, exits, heads, sampling."""
