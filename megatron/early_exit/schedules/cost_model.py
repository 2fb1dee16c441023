"""Costs of a pipeline's stages by arithmetic: FLOPs and bytes of the model over what a GPU's data sheet promises.

Matrix products and attention take FLOPs / (peak x `matmul_efficiency`), everything else bytes / (memory bandwidth x
`memory_efficiency`), tensor-parallel collectives and pipeline messages bytes / (link x `link_efficiency`); these times
add up, nothing overlaps. Left out: the optimizer step, the reduction of gradients over replicas, latencies, the host.
So absolute times are good to some ten per cent and ratios of plans better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron.early_exit.config.layer_split import layer_numbers
from megatron.early_exit.config.run import ResolvedConfig, RunConfig
from megatron.early_exit.model import sizes
from megatron.early_exit.schedules.stage_costs import StageCosts


@dataclass(frozen=True)
class Gpu:
    """One GPU of a server with `gpus_per_node` of them. Bandwidths are of one direction."""

    name: str
    peak_flops_per_sec: float
    """bf16 matrix products, dense."""
    memory_bytes: int
    memory_bytes_per_sec: float
    nvlink_bytes_per_sec: float
    network_bytes_per_sec: float
    """Bandwidth to GPUs of other servers, of each GPU's own network card."""
    gpus_per_node: int = 8


# Vendor's data sheets: "NVIDIA A100 Tensor Core GPU" (312 TFLOPS BF16, 80 GB, 2,039 GB/s, NVLink 600 GB/s both
# directions together), "NVIDIA H100 Tensor Core GPU" (SXM: 1,979 TFLOPS with sparsity, so 989 dense, 80 GB, 3.35 TB/s,
# NVLink 900 GB/s), "NVIDIA H200 Tensor Core GPU" (the same with 141 GB, 4.8 TB/s), "NVIDIA DGX B200" (8 GPUs: 36 PFLOPS
# FP16 with sparsity, so 2,250 TFLOPS each, dense; 1,440 GB and 64 TB/s together, NVLink 14.4 TB/s). Network: eight
# 200 Gb/s ports of a "NVIDIA DGX A100", eight of 400 Gb/s of a "DGX H100", "DGX H200", "DGX B200".
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-80GB", 312e12, 80 * 10**9, 2.039e12, 300e9, 25e9),
        Gpu("H100-80GB", 989e12, 80 * 10**9, 3.35e12, 450e9, 50e9),
        Gpu("H200", 989e12, 141 * 10**9, 4.8e12, 450e9, 50e9),
        Gpu("B200", 2250e12, 180 * 10**9, 8e12, 900e9, 50e9),
    )
}


@dataclass(frozen=True)
class Assumptions:
    """Shares of the data sheet's figures that are reached."""

    matmul_efficiency: float = 0.6
    """Share of the peak that matrix products and attention reach. With what else runs, model FLOPs utilisation comes
    out at 40 to 55%; Megatron-LM reports 44 to 52% on A100 (arXiv:2104.04473), Llama 3 38 to 43% on H100
    (arXiv:2407.21783)."""

    memory_efficiency: float = 0.8
    """Share of the memory bandwidth that is reached."""

    link_efficiency: float = 0.8
    """Share of the bandwidth of NVLink and of the network that is reached."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value <= 1:
                raise ValueError(f"{name} = {value}: must be greater than 0 and at most 1")


DEFAULT_ASSUMPTIONS = Assumptions()


def gpu_named(name: str) -> Gpu:
    """Raises ValueError with the known names."""
    by_name = {key.lower(): gpu for key, gpu in GPUS.items()}
    if name.lower() not in by_name:
        raise ValueError(f"no data sheet of a GPU named {name!r}; known are {', '.join(GPUS)}")
    return by_name[name.lower()]


def stages_with_early_exits(config: RunConfig) -> list[int]:
    """Stages whose exits can all run before the backward: their hidden states exist after the forward.

    Inside recomputed layers they do not; at either end of a stage they always do."""
    found = []
    for stage, layers in enumerate(layer_numbers(config.layers_per_stage)):
        exits = [layer for layer in layers if layer in config.exits.exit_layer_nums]
        num_recomputed = sizes.num_recomputed_layers(config, len(layers))
        is_kept = [
            layers.index(layer) >= num_recomputed
            or (layer == layers[0] if config.exits.pre_exit else layer == layers[-1] and not head.mlp)
            for layer, head in zip(exits, config.exits.heads_of(exits), strict=True)
        ]
        if exits and all(is_kept):
            found.append(stage)
    return found


def model_costs(
    config: ResolvedConfig, world_size: int, gpu: Gpu, assumptions: Assumptions = DEFAULT_ASSUMPTIONS
) -> list[StageCosts]:
    """Costs of every stage (model chunk) of `config`. world_size: GPUs."""
    model = _CostModel(config, world_size, gpu, assumptions)
    layers = layer_numbers(config.layers_per_stage)
    return [model.stage(own, stage == 0, stage == len(layers) - 1) for stage, own in enumerate(layers)]


@dataclass(frozen=True)
class _CostModel:
    config: ResolvedConfig
    world_size: int
    gpu: Gpu
    assumptions: Assumptions

    def stage(self, layers: Sequence[int], is_first: bool, is_last: bool) -> StageCosts:
        config, count = self.config, len(layers)
        exits = [layer for layer in layers if layer in config.exits.exit_layer_nums]
        indices, heads = config.exits.indices_of(layers), config.exits.heads_of(layers)
        parameters = sizes.stage_parameters(config, layers, is_first, is_last)
        trained = parameters
        if config.training.tune_exit:
            trained = sum(sizes.exit_parameters(config, head) for head in heads)
        has_final_head = is_last and config.build.builds_final_head
        forward = count * self._layer_forward_sec
        backward = count * self._layer_backward_sec
        backward += sizes.num_recomputed_layers(config, count) * self._layer_forward_sec
        if is_first:
            forward += self._memory_sec(2 * self._hidden) + self._all_reduce_sec
            backward += self._accumulation_sec(sizes.output_parameters(config))
        if has_final_head and not config.training.tune_exit:
            # Loss and gradients are computed in one pass over chunks, in the forward.
            forward += self._output_projection_sec(self._tokens) + self._all_reduce_sec
        activations = sizes.activation_bytes(config, count)
        ends_with_exit = not config.exits.pre_exit and not is_last and bool(layers) and layers[-1] in exits
        if ends_with_exit and not heads[-1].mlp:
            # Core would free what a stage sends; an exit there needs it.
            activations += self._sharded_hidden
        is_recomputed = sizes.num_recomputed_layers(config, count) > 0
        return StageCosts(
            forward_sec=forward,
            backward_sec=0.0 if config.training.tune_exit else backward,
            exit_sec=sum(map(self._exit_sec, indices)),
            communication_sec=self._message_sec,
            activation_bytes=activations,
            exit_gradient_bytes=len(exits) * self._sharded_hidden,
            exit_head_bytes=max((self._head_bytes(sizes.exit_tokens(config, index)) for index in indices), default=0),
            final_head_bytes=self._head_bytes(self._tokens) if has_final_head and not config.training.tune_exit else 0,
            recompute_bytes=sizes.layer_activation_bytes(config) if is_recomputed else 0,
            state_bytes=sizes.weight_bytes(config, parameters)
            + sizes.gradient_bytes(config, trained)
            + sizes.optimizer_bytes(config, self.world_size, trained),
        )

    # Times of parts, seconds

    @cached_property
    def _layer_forward_sec(self) -> float:
        flops = sizes.layer_flops_per_token(self.config) / 3
        # What is kept for the backward is written once and read once, about.
        moved = 2 * sizes.layer_activation_bytes(self.config)
        return self._matmul_sec(flops) + self._memory_sec(moved) + 2 * self._all_reduce_sec

    @cached_property
    def _layer_backward_sec(self) -> float:
        config = self.config
        flops = sizes.layer_flops_per_token(config) * 2 / 3
        moved = 4 * sizes.layer_activation_bytes(config)
        # With sequence parallelism inputs of matrix products are gathered again for the gradients of their weights.
        num_gathered = 2 if config.parallel.sequence_parallel else 0
        return (
            self._matmul_sec(flops)
            + self._memory_sec(moved)
            + self._accumulation_sec(sizes.layer_parameters(config))
            + 2 * self._all_reduce_sec
            + num_gathered * self._all_reduce_sec / 2
        )

    def _output_projection_sec(self, num_tokens: int) -> float:
        """Chunked cross-entropy of one head: logits, loss, gradients; without messages. num_tokens: of a microbatch."""
        config = self.config
        rows = config.description.padded_vocab_size // config.parallel.tensor_model_parallel_size
        num_chunks = -(-num_tokens // sizes.chunk_size(rows, is_gpu=True))
        weight = sizes.output_parameters(config)
        # 32 bytes for each logit over all steps from bf16 logits to their bf16 gradients. Every chunk's weight gradient
        # is made (2 bytes), read, and added to the sum (read and written, 4 bytes each).
        moved = 32 * num_tokens * rows + 12 * weight * num_chunks
        flops = sizes.output_flops_per_token(config, config.description.padded_vocab_size) * num_tokens / self._tokens
        return self._matmul_sec(flops) + self._memory_sec(moved) + self._accumulation_sec(weight)

    def _exit_sec(self, exit_index: int) -> float:
        config, head = self.config, self.config.exits.head_of(exit_index)
        num_tokens = sizes.exit_tokens(config, exit_index)
        # Sequences that are shared are gathered whole; otherwise gradients of the tokens that count are summed.
        messages = self._all_reduce_sec * (1.0 if config.parallel.sequence_parallel else num_tokens / self._tokens)
        of_block = self._layer_forward_sec + self._layer_backward_sec if head.block else 0.0
        of_branch = self._matmul_sec(sizes.branch_flops_per_token(config, head)) if head.mlp else 0.0
        # The logits of the final head that it follows are made beside its own, of a third of the FLOPs.
        follows = config.training.tune_exit and config.training.tune_exit_distillation > 0
        projections = 4 / 3 if follows else 1.0
        return projections * self._output_projection_sec(num_tokens) + messages + of_block + of_branch

    @property
    def _message_sec(self) -> float:
        config, gpu = self.config, self.gpu
        if config.parallel.pipeline_model_parallel_size == 1:
            return 0.0
        # Neighbouring stages are world / PP ranks apart, in core's order of ranks.
        is_one_server = self.world_size <= gpu.gpus_per_node
        link = gpu.nvlink_bytes_per_sec if is_one_server else gpu.network_bytes_per_sec
        return self._sharded_hidden / (link * self.assumptions.link_efficiency)

    @property
    def _all_reduce_sec(self) -> float:
        """Time to all-reduce hidden states over the tensor-parallel ranks, as a ring; with sequence parallelism a
        gather and a reduce-scatter, which move as much."""
        size = self.config.parallel.tensor_model_parallel_size
        gpu = self.gpu
        link = gpu.nvlink_bytes_per_sec if size <= gpu.gpus_per_node else gpu.network_bytes_per_sec
        return 2 * (size - 1) / size * self._hidden / (link * self.assumptions.link_efficiency)

    def _matmul_sec(self, flops_per_token: float) -> float:
        """flops_per_token: of all tensor-parallel ranks."""
        flops = flops_per_token * self._tokens / self.config.parallel.tensor_model_parallel_size
        return flops / (self.gpu.peak_flops_per_sec * self.assumptions.matmul_efficiency)

    def _memory_sec(self, moved_bytes: float) -> float:
        return moved_bytes / (self.gpu.memory_bytes_per_sec * self.assumptions.memory_efficiency)

    def _accumulation_sec(self, parameters: int) -> float:
        """A bf16 gradient is written, read, and added to the fp32 one: 12 bytes. In fp32 16, which is not modelled."""
        return self._memory_sec(12 * parameters)

    # Sizes

    @property
    def _tokens(self) -> int:
        return sizes.microbatch_tokens(self.config)

    @property
    def _hidden(self) -> int:
        return sizes.hidden_states_bytes(self.config)

    @property
    def _sharded_hidden(self) -> int:
        return sizes.sharded_hidden_states_bytes(self.config)

    def _head_bytes(self, num_tokens: int) -> int:
        """One chunk's logits (fp32 and bf16) and one weight gradient (fp32, and a chunk's in bf16)."""
        return sizes.logits_chunk_bytes(self.config, num_tokens) * 3 // 2 + 6 * sizes.output_parameters(self.config)
