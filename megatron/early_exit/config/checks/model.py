"""Sizes of the model, against each other and against the tensor-parallel ranks that share them."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.early_exit.config.settings import RunSettings


def model_problems(cfg: RunSettings) -> Iterator[str]:
    """Sizes that do not fit each other, or cannot be shared."""
    model, tp_size = cfg.model, cfg.parallel.tensor_model_parallel_size
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        yield (
            f"--hidden-size {model.hidden_size} is not divisible by --num-attention-heads {model.num_attention_heads}:"
            " change one, or give --kv-channels"
        )
    elif model.position_embedding_type == "rope":
        rotated = int(model.head_size * model.rotary_percent)
        if rotated == 0 or rotated % 2:
            yield (
                f"rotary positions turn pairs of channels: {rotated} channels (head size {model.head_size} x"
                f" --rotary-percent {model.rotary_percent}) is not an even number above 0"
            )
    if model.num_attention_heads % model.num_kv_heads:
        yield (
            f"--num-attention-heads {model.num_attention_heads} is not divisible by --num-query-groups"
            f" {model.num_kv_heads}: every group serves equally many heads"
        )
    shared = {"--num-attention-heads": model.num_attention_heads, "MLP width (--ffn-hidden-size)": model.ffn_size}
    if model.group_query_attention:
        shared["--num-query-groups"] = model.num_query_groups
    if model.padded_vocab_size is not None:
        shared["--padded-vocab-size"] = model.padded_vocab_size
    for name, size in shared.items():
        if size % tp_size:
            yield f"{name} {size} is not divisible by --tensor-model-parallel-size {tp_size}: ranks hold equal parts"
    vocab_size = cfg.data.vocab_size
    if model.padded_vocab_size is not None and vocab_size is not None and model.padded_vocab_size < vocab_size:
        yield f"--padded-vocab-size {model.padded_vocab_size} is less than --vocab-size {vocab_size}: raise it"
    positions = model.max_position_embeddings
    if positions is not None and positions < cfg.training.seq_length:
        yield (
            f"--max-position-embeddings {positions} is less than --seq-length {cfg.training.seq_length}: raise it, or"
            " train on shorter sequences"
        )


def model_warnings(cfg: RunSettings) -> Iterator[str]:
    """Settings without effect on this model."""
    model, data = cfg.model, cfg.data
    if model.num_query_groups != 1 and not model.group_query_attention:
        yield f"--num-query-groups {model.num_query_groups} has no effect without --group-query-attention"
    if model.position_embedding_type != "rope" and (model.rotary_base != 10000 or model.rotary_percent != 1.0):
        yield "--rotary-base and --rotary-percent have no effect without --position-embedding-type rope"
    if model.position_embedding_type != "rope" and (
        model.use_rope_scaling or model.rotary_seq_len_interpolation_factor
    ):
        yield (
            "--use-rope-scaling and --rotary-seq-len-interpolation-factor have no effect without"
            " --position-embedding-type rope"
        )
    if model.openai_gelu and model.swiglu:
        yield "--openai-gelu has no effect with --swiglu"
    if model.add_qkv_bias and model.add_bias_linear:
        yield "--add-qkv-bias has no effect: all linear layers have biases unless --disable-bias-linear is given"
    if model.apply_query_key_layer_scaling:
        yield "--apply-query-key-layer-scaling has no effect: scores are kept in fp32 and cannot overflow"
    if data.reset_position_ids and model.position_embedding_type == "rope":
        yield "--reset-position-ids has no effect with rope: rotary positions are relative; see --reset-attention-mask"
    if data.vocab_size is not None and data.tokenizer_type != "NullTokenizer" and not data.mock_data:
        yield f"--vocab-size {data.vocab_size} has no effect: the tokenizer knows its own size"
