"""Our parameters with a row for each token id."""

from __future__ import annotations

from megatron.early_exit.checkpoint.tensors import LazyTensor, Tensors, with_rows

WORD_EMBEDDING, OUTPUT_WEIGHT = "embedding.word_embeddings.weight", "output_layer.weight"
"""Names of our weights with a row for each id; an exit's own output weight ends like the second."""


def pad_vocabulary(tensors: Tensors, rows: int) -> Tensors:
    """Give every weight with a row for each token id `rows` of them: zeros are added, or padding is removed."""
    is_over_ids = lambda name: name in (WORD_EMBEDDING, OUTPUT_WEIGHT) or name.endswith("exit_head.output_layer.weight")
    return {name: with_rows(tensor, rows) if is_over_ids(name) else tensor for name, tensor in tensors.items()}


def vocabulary_rows(tensors: Tensors) -> int:
    """Rows of the embedding."""
    return tensors[WORD_EMBEDDING].shape[0]


def model_output_weight(tensors: Tensors) -> LazyTensor:
    """The weight of the final head."""
    return tensors.get(OUTPUT_WEIGHT, tensors[WORD_EMBEDDING])
