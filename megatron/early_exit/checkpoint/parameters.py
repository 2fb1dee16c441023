"""The parameters that a model must have, by its settings: no conversion may give fewer, more, or others."""

from __future__ import annotations

from megatron.early_exit.checkpoint.tensors import EXIT_HEAD, Tensors
from megatron.early_exit.config.exits import ExitConfig, ExitHeadKind
from megatron.early_exit.config.model import ModelConfig

Shapes = dict[str, tuple[int, ...]]


def expected_shapes(model: ModelConfig, exits: ExitConfig) -> Shapes:
    """Shapes of all our parameters by name. model: with `padded_vocab_size`, and `max_position_embeddings` if these are
    learned."""
    h, rows = model.hidden_size, _known(model.padded_vocab_size)
    shapes: Shapes = {"embedding.word_embeddings.weight": (rows, h)} | _below(
        "decoder.final_layernorm.", _norm(model, h)
    )
    if model.position_embedding_type == "learned_absolute":
        shapes["embedding.position_embeddings.weight"] = (_known(model.max_position_embeddings), h)
    if model.untie_embeddings_and_output_weights:
        shapes["output_layer.weight"] = (rows, h)
    for index in range(model.num_layers):
        shapes |= _below(f"decoder.layers.{index}.", _layer(model))
    for layer_number, head in zip(exits.exit_layer_nums, exits.heads, strict=True):
        shapes |= _below(f"decoder.layers.{layer_number - 1}{EXIT_HEAD}", _head(model, head))
    return shapes


def check_parameters(tensors: Tensors, model: ModelConfig, exits: ExitConfig) -> None:
    """Raise ValueError with the first parameters that are missing, not named by the settings, or of another shape."""
    expected = expected_shapes(model, exits)
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} has no place in it" for name in tensors if name not in expected]
    problems += [
        f"{name} has the shape {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more such" if len(problems) > 5 else ""
        raise ValueError(f"the parameters do not fit the settings of the model: {'; '.join(problems[:5])}{more}")


def _known(size: int | None) -> int:
    assert size is not None, "a model that has weights has a number of them"
    return size


def _below(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def _norm(model: ModelConfig, size: int) -> Shapes:
    names = ("weight", "bias") if model.normalization == "LayerNorm" else ("weight",)
    return dict.fromkeys(names, (size,))


def _linear(size_out: int, size_in: int, has_bias: bool) -> Shapes:
    return {"weight": (size_out, size_in)} | ({"bias": (size_out,)} if has_bias else {})


def _layer(model: ModelConfig) -> Shapes:
    h, d, bias = model.hidden_size, model.head_size, model.add_bias_linear
    qkv = (model.num_attention_heads + 2 * model.num_kv_heads) * d
    shapes = (
        _below("input_layernorm.", _norm(model, h))
        | _below("self_attention.linear_qkv.", _linear(qkv, h, bias or model.add_qkv_bias))
        | _below("self_attention.linear_proj.", _linear(h, model.num_attention_heads * d, bias))
        | _below("pre_mlp_layernorm.", _norm(model, h))
        | _below("mlp.", _mlp(model))
    )
    if model.qk_layernorm:
        for part in "qk":
            shapes |= _below(f"self_attention.{part}_layernorm.", _norm(model, d))
    return shapes


def _mlp(model: ModelConfig) -> Shapes:
    h, inner, bias = model.hidden_size, model.ffn_size, model.add_bias_linear
    first = _linear(2 * inner if model.swiglu else inner, h, bias)
    return _below("linear_fc1.", first) | _below("linear_fc2.", _linear(h, inner, bias))


def _head(model: ModelConfig, kind: ExitHeadKind) -> Shapes:
    head: Shapes = {}
    if kind.block:
        head |= _below("block.", _layer(model))
    if kind.mlp:
        head |= _below("mlp.", _mlp(model))
    if kind.norm:
        head |= _below("norm.", _norm(model, model.hidden_size))
    if kind.untied_output:
        head["output_layer.weight"] = (_known(model.padded_vocab_size), model.hidden_size)
    return head
