"""From text to batches: tokenizers, `.bin/.idx` files, datasets and iterators."""
