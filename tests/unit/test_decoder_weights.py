"""Weights of some layers, of one rank of several, read from parameters: no model is built and no process started."""

from __future__ import annotations

import itertools
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron.early_exit.checkpoint.plain_forward import head_logits
from megatron.early_exit.checkpoint.tensors import LazyTensor, Tensors
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.inference.costs import ROW_COUNTS
from megatron.early_exit.inference.worker.attention import Segment
from megatron.early_exit.inference.worker.cost_measurement import measure_costs
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.inference.worker.linear import DenseLinear
from megatron.early_exit.inference.worker.tensor_parallel import TensorParallel
from megatron.early_exit.inference.worker.weight_reading import check_can_decode, decoder_weights, shapes_of_layers
from megatron.early_exit.inference.worker.weights import DecoderWeights, num_ids_with_rows
from tests.configs import VOCAB_SIZE
from tests.reference_checkpoint import HEADS, STYLES, decoding_config, reference_description, reference_tensors

TOKENS = [5, 17, 80, 3, 41, 8]


class Rank(TensorParallel):
    """One of several ranks, which exchange nothing."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


def read(cfg: RunConfig, **settings: object) -> DecoderWeights:
    return decoder_weights(reference_tensors(cfg), reference_description(cfg), make_linear=DenseLinear, **settings)


def logits_of(output: object, count: int) -> Tensor:
    return torch.stack([output.logits(row) for row in range(count)])


def run_stages(cfg: RunConfig, stages: list[range], **settings: object) -> dict[int | None, Tensor]:
    """[tokens, vocabulary] of every exit by its layer, and of the final head (None), by stages one after the other."""
    logits: dict[int | None, Tensor] = {}
    count, hidden = len(TOKENS), None
    for layers in stages:
        decoder = Decoder(read(cfg, layers=layers), num_slots=1, **settings)
        rows = decoder.attention_metadata([Segment(0, 0, count)])
        hidden = decoder.embed(TOKENS, rows) if hidden is None else hidden
        residual, depth = hidden, decoder.first_layer
        for one in decoder.exits:
            if one.depth > depth:
                hidden, residual = decoder.run_layers(hidden, rows, depth, one.depth)
                depth = one.depth
            read_by_exit = residual if one.mlp is not None else hidden
            if one.block is not None:
                read_by_exit = decoder.run_exit_block(one.index, hidden, rows)
            logits[one.layer_number] = logits_of(decoder.exit_output(one.index, read_by_exit), count)
        hidden, _ = decoder.run_layers(hidden, rows, depth, decoder.last_layer)
    logits[None] = logits_of(decoder.final_output(hidden), count)
    return logits


@torch.inference_mode()
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("head", HEADS)
def test_stages_one_after_the_other_give_the_logits_of_the_whole(head: str, style: str) -> None:
    changes = {**HEADS[head], **STYLES[style]}
    cfg = decoding_config(**changes)
    ids, positions = torch.tensor([TOKENS]), torch.arange(len(TOKENS))[None]
    tensors, model = reference_tensors(cfg), reference_description(cfg).model
    whole = run_stages(cfg, [range(4)])
    assert set(whole) == {1, 2, 3, None}
    for layer, logits in whole.items():
        expected = head_logits(tensors, model, ids, positions, cfg.exits, layer)[0]
        assert (logits - expected).abs().max() < 1e-5 * expected.abs().max(), layer
    uneven = ([range(1), range(1, 4)], [range(3), range(3, 4)])
    for stages in ([range(2), range(2, 4)], [range(1), range(1, 2), range(2, 3), range(3, 4)], *uneven):
        chained = run_stages(cfg, stages)
        assert set(chained) == set(whole)
        for layer, logits in chained.items():
            assert torch.equal(logits, whole[layer]), layer
    as_graphs = run_stages(cfg, [range(3), range(3, 4)], use_graphs=True)
    for layer, logits in as_graphs.items():
        assert (logits - whole[layer]).abs().max() < 1e-5 * whole[layer].abs().max(), layer


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("head", HEADS)
def test_the_parameters_of_some_layers_are_those_that_are_read(head: str, style: str) -> None:
    cfg = decoding_config(**{**HEADS[head], **STYLES[style]})
    description, whole = reference_description(cfg), set(reference_tensors(cfg))
    opened: list[str] = []
    tensors = recording(reference_tensors(cfg), opened)
    for start, stop in itertools.combinations(range(5), 2):
        opened.clear()
        decoder_weights(tensors, description, layers=range(start, stop))
        shapes = shapes_of_layers(description, range(start, stop))
        assert set(shapes) == set(opened) and all(shapes[name] == tensors[name].shape for name in shapes)
        assert (set(shapes) == whole) == ((start, stop) == (0, 4))


@pytest.mark.parametrize("stage", range(4))
def test_costs_of_a_stage_are_those_of_what_it_has(stage: int) -> None:
    cfg = decoding_config(exit_layer_nums=(1, 4), use_exit_norm=True)
    decoder = Decoder(read(cfg, layers=range(stage, stage + 1)), num_slots=3)
    costs = measure_costs(decoder, repetitions=1)
    assert min(costs.layer_seconds) > 0 and costs.batch_seconds > 0
    assert min(costs.row_seconds, costs.slot_seconds, costs.call_seconds) >= 0
    for seconds, is_here in (
        (costs.approximate_seconds, stage in (0, 3)),
        (costs.exit_head_seconds, stage in (0, 3)),
        (costs.final_head_seconds, stage == 3),
    ):
        assert all((one > 0) == is_here for one in seconds) and len(seconds) == len(ROW_COUNTS)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("has_own_outputs", [True, False])
def test_a_stage_has_what_it_needs_and_nothing_else(is_tied: bool, has_own_outputs: bool) -> None:
    cfg = decoding_config(
        untie_embeddings_and_output_weights=not is_tied, untie_exit_output_weights=has_own_outputs,
        exit_layer_nums=(1, 2, 4),
    )  # fmt: skip
    opened: list[str] = []
    tensors = recording(reference_tensors(cfg), opened)
    first, middle, last = (
        decoder_weights(tensors, reference_description(cfg), layers=layers)
        for layers in (range(2), range(2, 3), range(3, 4))
    )
    # The first stage and the last may both need the weight of the final head.
    assert len(opened) == len(set(opened)) + (is_tied or not has_own_outputs)
    assert [len(one.layers) for one in (first, middle, last)] == [2, 1, 1]
    assert [(one.first_layer, one.last_layer) for one in (first, middle, last)] == [(0, 2), (2, 3), (3, 4)]
    exits = [[(one.index, one.layer_number, one.depth) for one in stage.exits] for stage in (first, middle, last)]
    assert exits == [[(0, 1, 1), (1, 2, 2)], [], [(2, 4, 4)]]
    assert [one.embedding is not None for one in (first, middle, last)] == [True, False, False]
    assert [one.final is not None for one in (first, middle, last)] == [False, False, True]
    assert (first.exits[0].output is first.exits[1].output) != has_own_outputs
    assert (last.exits[0].output is last.final.output) != has_own_outputs
    # What no head reads is not read.
    opened.clear()
    decoder_weights(tensors, reference_description(cfg), layers=range(2, 3))
    assert opened and all(name.startswith("decoder.layers.2.") for name in opened)


def recording(tensors: Tensors, opened: list[str]) -> Tensors:
    """The same, with the names of all that is read added to `opened`."""

    def read_one(name: str) -> Tensor:
        opened.append(name)
        return tensors[name].read()

    return {name: LazyTensor(one.shape, one.dtype, lambda name=name: read_one(name)) for name, one in tensors.items()}


@pytest.mark.parametrize("head", ["tied", "mlp", "block"])
@pytest.mark.parametrize("style", ["llama", "gpt2", "qkv_bias"])
def test_everything_is_read_once(style: str, head: str) -> None:
    cfg = decoding_config(**{**HEADS[head], **STYLES[style]})
    opened: list[str] = []
    tensors = reference_tensors(cfg)
    decoder_weights(recording(tensors, opened), reference_description(cfg), shortlist=(1, 2))
    shared = [name for name in tensors if head == "mlp" and ".pre_mlp_layernorm." in name and ".layers.3." not in name]
    assert sorted(opened) == sorted([*tensors, *shared])


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("style", STYLES)
def test_one_matrix_is_in_memory_beside_the_result(style: str, size: int) -> None:
    """Those that were read before are gone when the next one is read."""
    cfg = decoding_config(**STYLES[style], use_exit_norm=True)
    tensors, alive, too_many = reference_tensors(cfg), weakref.WeakSet(), []

    def read_one(name: str) -> Tensor:
        if sum(tensor.dim() == 2 for tensor in alive) > 1:
            too_many.append(name)
        tensor = tensors[name].read()
        alive.add(tensor)
        return tensor

    lazy = {name: replace(one, read=lambda name=name: read_one(name)) for name, one in tensors.items()}
    tp = Rank(size - 1, size)
    # In another type, so that the result shares nothing with what is read.
    weights = decoder_weights(lazy, reference_description(cfg), tp=tp, dtype=torch.bfloat16, make_linear=DenseLinear)
    assert too_many == [] and weights.layers and not alive


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("style", STYLES)
def test_ranks_have_the_parts_of_the_whole(style: str, size: int) -> None:
    """Each head with its queries, keys and values; each MLP channel with its gate, up and down; each row once."""
    changes = {**STYLES[style], "num_attention_heads": 8, "vocab_size": VOCAB_SIZE - 1}
    if "group_query_attention" not in changes:
        changes["num_query_groups"] = 4
    cfg = decoding_config(**changes, use_exit_norm=True)
    whole, ranks = read(cfg), [read(cfg, tp=Rank(rank, size)) for rank in range(size)]
    m = cfg.model
    d, heads, kv_heads = m.head_size, m.num_attention_heads, m.num_kv_heads
    for index, layer in enumerate(whole.layers):
        of_ranks = [rank.layers[index] for rank in ranks]
        x = torch.randn(3, m.hidden_size)
        kinds = layer.qkv(x).split((heads * d, kv_heads * d, kv_heads * d), 1)
        parts = [
            one.qkv(x).split((heads * d // size, kv_heads * d // size, kv_heads * d // size), 1) for one in of_ranks
        ]
        for kind, part in zip(kinds, zip(*parts, strict=True), strict=True):
            assert torch.allclose(torch.cat(part, 1), kind, atol=1e-6)
        blocks = 2 if m.swiglu else 1
        wide = layer.mlp.fc1(x).chunk(blocks, 1)
        halves = zip(*(one.mlp.fc1(x).chunk(blocks, 1) for one in of_ranks), strict=True)
        for block, part in zip(wide, halves, strict=True):
            assert torch.allclose(torch.cat(part, 1), block, atol=1e-6)
        y = torch.randn(3, heads * d)
        summed = sum(one.projection(part) for one, part in zip(of_ranks, y.chunk(size, 1), strict=True))
        assert torch.allclose(summed, layer.projection(y), atol=1e-5)
        y = torch.randn(3, m.ffn_size)
        summed = sum(one.mlp.fc2(part) for one, part in zip(of_ranks, y.chunk(size, 1), strict=True))
        assert torch.allclose(summed, layer.mlp.fc2(y), atol=1e-5)
        for name in ("projection_bias", "fc2_bias"):
            of_one = lambda one, name=name: getattr(one if name == "projection_bias" else one.mlp, name)
            biases = [of_one(one) for one in (layer, *of_ranks)]
            assert all(bias is None for bias in biases) or all(torch.equal(bias, biases[0]) for bias in biases)
    assert torch.equal(torch.cat([rank.embedding.words for rank in ranks]), whole.embedding.words)
    x = torch.randn(3, m.hidden_size)
    assert torch.allclose(torch.cat([rank.final.output(x) for rank in ranks], 1), whole.final.output(x), atol=1e-6)
    assert {rank.num_output_rows for rank in ranks} == {VOCAB_SIZE}


def test_parts_do_not_keep_the_whole_in_memory() -> None:
    cfg = decoding_config(num_query_groups=4)
    weights = read(cfg, tp=Rank(1, 2))
    tensors = [weights.embedding.words, weights.final.output._transposed]
    for layer in weights.layers:
        linears = (layer.qkv, layer.projection, layer.mlp.fc1, layer.mlp.fc2)
        tensors += [linear._transposed for linear in linears]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)


def test_a_vocabulary_that_ranks_do_not_divide_is_padded_with_zeros() -> None:
    cfg = decoding_config(num_query_groups=3, num_attention_heads=6, hidden_size=48, ffn_hidden_size=48)
    description = reference_description(cfg)
    description = replace(description, model=replace(description.model, padded_vocab_size=95))
    tensors = reference_tensors(cfg)
    word = "embedding.word_embeddings.weight"
    tensors[word] = tensors[word].then((95, 48), lambda tensor: tensor[:95])
    ranks = [decoder_weights(tensors, description, tp=Rank(rank, 3), make_linear=DenseLinear) for rank in range(3)]
    assert [rank.vocab_rows for rank in ranks] == [32, 32, 32]
    table = torch.cat([rank.embedding.words for rank in ranks])
    assert torch.equal(table[:95], tensors[word].read()) and not table[95:].any()


def test_ids_of_which_the_model_knows_nothing() -> None:
    cfg = decoding_config()
    tensors = reference_tensors(cfg)
    word = "embedding.word_embeddings.weight"

    def count(zeros_from: int, num_ids: int, tp: TensorParallel | None = None) -> int:
        zeroed = lambda tensor: torch.cat([tensor[:zeros_from], torch.zeros_like(tensor[zeros_from:])])
        changed = {**tensors, word: tensors[word].then(tensors[word].shape, zeroed)}
        return num_ids_with_rows(decoder_weights(changed, reference_description(cfg), tp=tp), num_ids)

    assert count(96, 93) == 93
    assert count(90, 93) == 90
    assert [count(30, 93, Rank(rank, 2)) for rank in range(2)] == [30, 30]
    assert count(0, 93) == 93


def test_heads_that_share_a_weight_share_its_rows_of_the_shortlist() -> None:
    weights = read(decoding_config(use_exit_norm=True), shortlist=(90, 1, 2, 40))
    first, *others = (one.approximate for one in weights.exits)
    assert all(one is first for one in others) and first.columns.ids.tolist() == [1, 2, 40, 90]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_are_converted(dtype: torch.dtype) -> None:
    cfg = decoding_config()
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in reference_tensors(cfg).items()}
    default = decoder_weights(tensors, reference_description(cfg), make_linear=DenseLinear)
    assert default.dtype == torch.bfloat16
    weights = decoder_weights(tensors, reference_description(cfg), make_linear=DenseLinear, dtype=dtype)
    assert weights.dtype == weights.embedding.words.dtype == weights.final.output._transposed.dtype == dtype
    assert weights.layers[0].attention_norm.weight.dtype == dtype


@pytest.mark.parametrize(
    ("changes", "tp_size", "message"),
    [
        ({}, 4, "4 tensor-parallel ranks cannot share.*: it has 2 key/value heads .query groups.; choose 1 or 2"),
        ({"num_query_groups": 4}, 3, "it has 4 attention heads and 4 key/value heads.*; choose 1 or 2"),
        ({"ffn_hidden_size": 45}, 2, "it has 45 MLP channels; choose 1$"),
        ({"num_query_groups": 3}, 1, "3 key/value heads do not divide the 4 attention heads"),
        ({"kv_channels": 7}, 1, "7 of the 7 channels of a head rotate"),
        ({"kv_channels": 8, "rotary_percent": 0.4}, 1, "3 of the 8 channels of a head rotate"),
    ],
)
def test_what_cannot_be_decoded_is_refused(changes: dict, tp_size: int, message: str) -> None:
    model = replace(decoding_config().model, **changes)
    with pytest.raises(ValueError, match=message):
        check_can_decode(model, tp_size)


def test_ranges_that_the_model_does_not_have() -> None:
    for layers in (range(0), range(3, 5), range(0, 4, 2), range(-1, 2)):
        with pytest.raises(ValueError, match="layers is range.*; the model has the layers 0 to 3"):
            read(decoding_config(), layers=layers)


def test_nothing_of_core_is_imported() -> None:
    import subprocess

    program = (
        "import sys, megatron.early_exit.inference.loading\n"
        "print(*[name for name in sys.modules if name.startswith('megatron.core')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == ""
