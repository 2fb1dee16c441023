"""What a run is, in a few lines, before it starts."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.model.build import Model, params_dtype
from megatron.early_exit.model.sizes import (
    exit_flops_per_token,
    layer_flops_per_token,
    output_flops_per_token,
    tuned_exit_flops_per_token,
)
from megatron.early_exit.platform.device import backend, device, use_cuda
from megatron.early_exit.training.microbatches import Microbatches
from megatron.early_exit.training.plans import plan_text


def start_up_summary(config: RunConfig, model: Model, microbatches: Microbatches) -> str:
    """Layout, batch, parameters and exits of every stage. All ranks must call it together; the text is for one."""
    parallel, training = config.parallel, config.training
    world_size = torch.distributed.get_world_size()
    dtype = str(params_dtype(config)).removeprefix("torch.")
    where = f"{torch.cuda.get_device_name() if use_cuda() else 'CPU'}, {backend()}, {dtype}"
    tokens = microbatches.target_global_batch_size * training.seq_length
    num_built = config.build.num_built_layers
    tuned = f"; tuned alone{_teacher(config)}" if training.tune_exit else ""
    if num_built < config.model.num_layers:
        tuned += f", layers {num_built + 1} and up are not built"
    lines = [
        f"layout      {world_size} ranks = TP {parallel.tensor_model_parallel_size}"
        f"{' with sequence parallelism' if parallel.sequence_parallel else ''}"
        f" x PP {parallel.num_stages}"
        f"{_interleaving(config)} x DP {parallel.data_parallel_size(world_size)}"
        f"{' with the distributed optimizer' if parallel.use_distributed_optimizer else ''}; {where}",
        f"batch       {microbatches.target_global_batch_size} sequences of {training.seq_length} tokens = {tokens:,} "
        f"tokens an iteration, {training.micro_batch_size} a microbatch",
        f"length      {_length(config, tokens)}",
        f"exits       {_exits(config)}{tuned}",
    ]
    if plan := plan_text(config, microbatches.count):
        lines.append(f"plan        {plan}")
    lines += [f"stage {stage:<5} {text}" for stage, text in enumerate(_stages(model))]
    lines += _warnings(config, model)
    width = max(map(len, lines))
    return "\n".join(["-" * width, *lines, "-" * width])


def _teacher(config: RunConfig) -> str:
    share = config.training.tune_exit_distillation
    if not share:
        return ""
    where = ""
    if config.training.cache_hidden_states is not None:
        where = " on kept hidden states"
    elif config.parallel.num_stages > 1:
        where = ", whose input travels back from the last stage"
    return f", {share:.0%} of the loss follows the final head{where}"


def _interleaving(config: RunConfig) -> str:
    chunks = config.parallel.num_model_chunks(config.model.num_layers)
    return f" ({chunks} interleaved chunks a rank)" if chunks > 1 else ""


def _length(config: RunConfig, tokens: int) -> str:
    samples = config.training.train_samples
    if samples is not None:
        return f"{samples:,} samples = {samples * config.training.seq_length:,} tokens"
    iterations = config.training.given_iterations
    return f"{iterations:,} iterations, {iterations * tokens:,} tokens"


def _exits(config: RunConfig) -> str:
    exits = config.exits
    if not exits.num_exits:
        return "none (plain GPT)"
    weights = ", ".join(f"{weight:g}" for weight in exits.weights_at(exits.exit_layer_weight_warmup_iters))
    layers = ", ".join(map(str, exits.exit_layer_nums))
    side = "before" if exits.pre_exit else "after"
    parts = [f"{side} layers {layers}", exits.described_heads(), f"loss weights {weights}"]
    return "; ".join([*parts, *filter(None, [exits.described_token_fractions()])])


def _stages(model: Model) -> list[str]:
    """One line per pipeline rank: its layers, parameters and exits."""
    layers = [layer.layer_number for chunk in model.chunks for layer in chunk.decoder.layers]
    # Numbers of exits are those of the layers that own them.
    exits = [
        layer.layer_number for chunk in model.chunks for layer in chunk.decoder.layers if hasattr(layer, "exit_head")
    ]
    count = sum(parameter.numel() for chunk in model.chunks for parameter in chunk.parameters())
    in_exits = sum(p.numel() for chunk in model.chunks for head in chunk.exit_heads() for p in head.parameters())
    copies = sum(weight.numel() for weight in model.shared_weight.copies if getattr(weight, "shared", False))
    if model.tunes_exits:
        copies = sum(c.exit_output_layer.weight.numel() for c in model.chunks if c.exit_output_layer is not None)
    mine = (layers, count, in_exits, copies, exits)
    group = parallel_state.get_pipeline_model_parallel_group()
    stages: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(stages, mine, group=group)
    return [_stage_text(*stage) for stage in stages]


def _stage_text(layers: list[int], count: int, in_exits: int, copies: int, exits: list[int]) -> str:
    text = f"layers {_ranges(layers)}: {count:,} parameters on each TP rank"
    if copies:
        text += f", {copies:,} of them copies of the output weight"
    if exits:
        text += f"; exits {', '.join(map(str, exits))}" + (f" ({in_exits:,} parameters)" if in_exits else "")
    return text


def _ranges(numbers: list[int]) -> str:
    """[1, 2, 5, 6] -> "1-2, 5-6" """
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][1] + 1:
            groups[-1][1] = number
        else:
            groups.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in groups) or "none"


def _warnings(config: RunConfig, model: Model) -> list[str]:
    exits, layers = config.exits, config.model.num_layers
    stage_size = layers // config.parallel.pipeline_model_parallel_size // len(model.chunks)
    if config.parallel.num_stages == 1 or exits.pre_exit or model.tunes_exits:
        return []
    at_end = [
        layer
        for layer, head in zip(exits.exit_layer_nums, exits.heads, strict=True)
        if layer % stage_size == 0 and layer != layers and not head.mlp
    ]
    if not at_end:
        return []
    named = ", ".join(map(str, at_end))
    return [
        f"note        exit {named} ends its stage: the stage keeps the hidden states of every microbatch in flight for "
        f"it. --pre-exit with layer {', '.join(str(layer + 1) for layer in at_end)} moves it to the next stage."
    ]


def checkpoint_bytes(config: RunConfig, model: Model) -> int:
    """About what one checkpoint takes on disk: weights, and with the optimizer two fp32 moments and fp32 weights."""
    per_parameter = params_dtype(config).itemsize
    if not config.checkpoint.no_save_optim:
        per_parameter += 8 + (4 if per_parameter < 4 else 0)
    # A checkpoint of tuned exits links the file of the rest.
    count = sum(p.numel() for chunk in model.chunks for p in chunk.parameters() if p.requires_grad)
    total = torch.tensor([float(count)], device=device())
    torch.distributed.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return int(total.item()) * per_parameter


def flops_per_token(config: RunConfig, vocab_size: int) -> float:
    """Floating-point operations of forward and backward (of tuning: what it runs) for one token, exits included."""
    layer = layer_flops_per_token(config)
    numbers = range(config.exits.num_exits)
    if config.training.tune_exit:
        # Forward through the frozen layers; an exit's gradients stop at its parameters.
        num_layers = 0 if config.training.cache_hidden_states else config.build.num_built_layers
        share = config.training.tune_exit_distillation
        exits = sum(tuned_exit_flops_per_token(config, index, vocab_size, share) for index in numbers)
        return num_layers * layer / 3 + exits
    exits = sum(exit_flops_per_token(config, index, vocab_size) for index in numbers)
    output = output_flops_per_token(config, vocab_size)
    return config.model.num_layers * layer + output + exits
