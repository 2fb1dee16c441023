"""Whether settings fit together and to the number of ranks: all problems at once, before anything is built.

Every problem says what is wrong, the values, and what to do. What needs the data or the tokenizer's contents is checked
where they are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron.early_exit.config.checkpoint_choice import missing_checkpoint
from megatron.early_exit.config.data import TOKENIZERS_WITHOUT_MODEL, DataConfig, parse_blend, split_shares
from megatron.early_exit.config.errors import ConfigError
from megatron.early_exit.config.exits import exit_kind_problems
from megatron.early_exit.config.pipeline import ITERATIONS_UNTIL_MEASURED
from megatron.early_exit.config.settings import RunSettings


def validate(cfg: RunSettings, world_size: int) -> None:
    """Raise ConfigError with all problems of `cfg` on `world_size` ranks."""
    found = problems(cfg, world_size)
    if found:
        raise ConfigError(found)


def check(cfg: RunSettings) -> None:
    """Raise ConfigError with what contradicts itself in `cfg`, whatever the number of ranks, files and data."""
    found = list(_range_problems(cfg))
    if not found:
        found += [*_model_problems(cfg), *_split_layer_problems(cfg)]
    found += [*_exit_problems(cfg), *_choice_problems(cfg)]
    if found:
        raise ConfigError(found)


def problems(cfg: RunSettings, world_size: int) -> list[str]:
    """What cannot work, one line each; empty if everything fits."""
    ranges = list(_range_problems(cfg))
    found = [
        *ranges,
        *_exit_problems(cfg),
        *_checkpoint_problems(cfg),
        *_data_problems(cfg),
        *_choice_problems(cfg),
    ]
    if not ranges:  # what follows divides by sizes
        found += [
            *_model_problems(cfg),
            *_layout_problems(cfg, world_size),
            *_batch_problems(cfg, world_size),
            *_schedule_problems(cfg),
        ]
    return found


def flag(name: str) -> str:
    """Flag of a field."""
    return "--" + name.replace("_", "-")


# Single values

AT_LEAST = {
    1: [
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "ffn_hidden_size",
        "kv_channels",
        "num_query_groups",
        "max_position_embeddings",
        "rotary_base",
        "make_vocab_size_divisible_by",
        "padded_vocab_size",
        "vocab_size",
        "seq_length",
        "micro_batch_size",
        "global_batch_size",
        "train_iters",
        "train_samples",
        "eval_interval",
        "log_interval",
        "exit_interval",
        "save_interval",
        "keep_last",
        "lr_decay_iters",
        "lr_decay_samples",
        "hysteresis",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "num_layers_per_virtual_pipeline_stage",
        "recompute_num_layers",
    ],
    0: [
        "eval_iters",
        "seed",
        "num_workers",
        "min_lr",
        "lr_warmup_iters",
        "lr_warmup_samples",
        "lr_warmup_init",
        "weight_decay",
        "clip_grad",
        "init_method_std",
        "exit_layer_weight_warmup_iters",
        "load_iteration",
    ],
}
"""Smallest allowed value -> fields."""

ABOVE_ZERO = [
    "lr",
    "norm_epsilon",
    "adam_eps",
    "loss_scale",
    "initial_loss_scale",
    "min_loss_scale",
    "loss_scale_window",
    "exit_duration_in_mins",
    "rope_scaling_factor",
    "rotary_seq_len_interpolation_factor",
]

SHARES = ["hidden_dropout", "attention_dropout", "adam_beta1", "adam_beta2", "sgd_momentum", "lr_warmup_fraction"]
"""Fields that lie in [0, 1)."""

LARGEST_INTEGER = 2**63 - 1

AT_MOST = {"num_layers": 10_000, "num_workers": 512}
"""Largest allowed value of what costs time or processes before a model is built. Whether memory holds what is asked for
is said when the vocabulary is known (`training.memory`)."""

TIMEOUT_MINUTES = (1 / 60, 366 * 24 * 60.0)
"""A second, a year."""

MAX_MICROBATCHES = 1_000_000
"""Of one iteration."""

LARGEST_SEED = 2**32 - 1
"""NumPy's."""

SEED_STEP = 100
"""What every pipeline stage adds to --seed, times its number."""


def _values(cfg: RunSettings) -> dict[str, Any]:
    """All settings by field name."""
    return {name: value for section in vars(cfg).values() for name, value in vars(section).items()}


def _range_problems(cfg: RunSettings) -> Iterator[str]:
    values = _values(cfg)
    for smallest, names in AT_LEAST.items():
        for name in names:
            if values[name] is not None and values[name] < smallest:
                yield f"{flag(name)} {values[name]}: must be at least {smallest}"
    for name, value in values.items():
        largest = max(value, default=0) if isinstance(value, tuple) and name.endswith("_nums") else value
        limit = AT_MOST.get(name, LARGEST_INTEGER)
        if isinstance(largest, int) and largest > limit:
            yield f"{flag(name)} {largest}: must be at most {limit}"
    for name in ABOVE_ZERO:
        if values[name] is not None and not values[name] > 0:
            yield f"{flag(name)} {values[name]}: must be greater than 0"
    for name in SHARES:
        if values[name] is not None and not 0 <= values[name] < 1:
            yield f"{flag(name)} {values[name]}: must be at least 0 and less than 1"
    if not 0 < cfg.model.rotary_percent <= 1:
        yield f"--rotary-percent {cfg.model.rotary_percent}: must be greater than 0 and at most 1"
    shortest, longest = TIMEOUT_MINUTES
    if not shortest <= cfg.parallel.distributed_timeout_minutes <= longest:
        yield (
            f"--distributed-timeout-minutes {cfg.parallel.distributed_timeout_minutes:g}: must be at least 1/60 (a"
            f" second) and at most {longest:g} (a year)"
        )


# Exits


def _exit_problems(cfg: RunSettings) -> Iterator[str]:
    exits = cfg.exits
    if not exits.exit_layer_nums:
        yield from _exit_options_without_exits(cfg)
        return
    yield from _exit_layer_problems(exits.exit_layer_nums, cfg.model.num_layers)
    count = exits.num_exits
    for name in ("exit_layer_weight", "exit_layer_weight_init"):
        weights = getattr(exits, name)
        if weights and len(weights) != count:
            yield f"{flag(name)} has {len(weights)} values for {count} exits: give {count}"
        if any(weight < 0 for weight in weights):
            yield f"{flag(name)} {_words(weights)}: a loss weight cannot be negative; 0 turns an exit's loss off"
    if exits.exit_layer_weight_init and exits.exit_layer_weight_warmup_iters == 0:
        yield (
            f"--exit-layer-weight-init {_words(exits.exit_layer_weight_init)} is never used without"
            " --exit-layer-weight-warmup-iters: give the number of iterations, or leave it out"
        )
    for name in ("exit_layer_temperature", "exit_loss_token_fraction"):
        values = getattr(exits, name)
        if len(values) not in (0, 1, count):
            yield f"{flag(name)} has {len(values)} values for {count} exits: give 1 or {count}"
    temperatures, fractions = exits.exit_layer_temperature, exits.exit_loss_token_fraction
    if any(temperature <= 0 for temperature in temperatures):
        yield f"--exit-layer-temperature {_words(temperatures)}: logits are divided by it, it must be greater than 0"
    if not all(0 < fraction <= 1 for fraction in fractions):
        yield (
            f"--exit-loss-token-fraction {_words(fractions)}: a fraction of the tokens is greater than 0 and at most 1;"
            " --exit-layer-weight 0 turns an exit's loss off"
        )
    yield from exit_kind_problems(exits)


def _exit_options_without_exits(cfg: RunSettings) -> Iterator[str]:
    options = [flag(field.name) for field in fields(cfg.exits) if getattr(cfg.exits, field.name) != field.default]
    if options:
        yield f"{', '.join(options)} without exits: name the layers with --exit-layer-nums, or leave these flags out"


def _exit_layer_problems(layers: Sequence[int], num_layers: int) -> Iterator[str]:
    outside = [layer for layer in layers if not 1 <= layer <= num_layers]
    if outside:
        yield (
            f"--exit-layer-nums {_words(layers)}: no layer {_words(outside)}; layers are counted from 1 to"
            f" --num-layers {num_layers}"
        )
    ascending = sorted(set(layers))
    repeated = sorted({layer for layer in layers if list(layers).count(layer) > 1})
    if repeated:
        yield f"--exit-layer-nums {_words(layers)}: {_words(repeated)} stands twice; give {_words(ascending)}"
    elif list(layers) != ascending:
        yield (
            f"--exit-layer-nums {_words(layers)}: not ascending; give {_words(ascending)}, and weights and temperatures"
            " in the same order"
        )


# Model


def _model_problems(cfg: RunSettings) -> Iterator[str]:
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


# Layout


def _layout_problems(cfg: RunSettings, world_size: int) -> Iterator[str]:
    parallel, num_layers = cfg.parallel, cfg.model.num_layers
    tp_size, pp_size, num_stages = (
        parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.num_stages
    )  # fmt: skip
    if world_size % (tp_size * num_stages):
        stages = "stages that are tuned" if cfg.training.tune_exit else "--pipeline-model-parallel-size"
        yield (
            f"{world_size} ranks do not fit: needed is a multiple of --tensor-model-parallel-size ({tp_size}) x"
            f" {stages} ({num_stages}) = {tp_size * num_stages}; change torchrun's --nproc-per-node,"
            " --nnodes, or the layout"
        )
    if parallel.sequence_parallel and tp_size == 1:
        yield "--sequence-parallel needs --tensor-model-parallel-size above 1: drop it"
    if parallel.sequence_parallel and cfg.training.seq_length % tp_size:
        yield (
            f"--seq-length {cfg.training.seq_length} is not divisible by --tensor-model-parallel-size {tp_size}, as"
            " --sequence-parallel needs"
        )
    if num_layers % pp_size:
        yield (
            f"--num-layers {num_layers} is not divisible by --pipeline-model-parallel-size {pp_size}: every stage owns"
            " equally many layers"
        )
        return
    largest_seed = LARGEST_SEED - SEED_STEP * (num_stages - 1)
    if cfg.training.seed > largest_seed:
        yield (
            f"--seed {cfg.training.seed}: must be at most {largest_seed} on {num_stages} pipeline stages, each of which"
            f" adds {SEED_STEP} to it"
        )
    yield from _split_layer_problems(cfg)
    yield from _tuning_problems(cfg, world_size)


def _split_layer_problems(cfg: RunSettings) -> Iterator[str]:
    """Problems of chunks, recomputation and plans of layers that are split evenly over the pipeline."""
    if cfg.model.num_layers % cfg.parallel.pipeline_model_parallel_size:
        return
    yield from _interleaving_problems(cfg)
    yield from _recompute_problems(cfg)
    yield from _plan_problems(cfg)


_FILL_SETTINGS = ("num_fill_warmup_microbatches", "num_fill_cooldown_microbatches", "backward_forward_ratio")


def _plan_problems(cfg: RunSettings) -> Iterator[str]:
    """How many microbatches fit is for the plan's builder to say (`training.plans.check_plan`)."""
    pipeline, parallel, training = cfg.pipeline, cfg.parallel, cfg.training
    for name in _FILL_SETTINGS:
        if getattr(pipeline, name) is not None and not pipeline.fill_explicit_bubbles:
            yield f"{flag(name)} {getattr(pipeline, name)} without --fill-explicit-bubbles: add it, or drop this"
    if not pipeline.is_planned:
        return
    on = [flag(name) for name in ("exits_in_bubbles", "fill_explicit_bubbles", "profile_pipeline")
          if getattr(pipeline, name)]  # fmt: skip
    if parallel.num_stages == 1:
        yield f"{on[0]} with one pipeline stage: it never waits; drop the flag, or use more stages"
    if training.tune_exit and on[0] != "--profile-pipeline":
        yield f"{on[0]} with --tune-exit: tuning has no backward passes to wait for; drop the flag"
    if pipeline.exits_in_bubbles and not cfg.exits.num_exits:
        yield "--exits-in-bubbles without exits: give --exit-layer-nums, or drop it"
    if pipeline.exits_in_bubbles and parallel.recompute_granularity == "full":
        yield (
            "--exits-in-bubbles with --recompute-granularity full: what an exit reads is only there again when its"
            " layer is recomputed, in the backward pass; drop one of them, or use --recompute-granularity selective"
        )
    if pipeline.profile_pipeline and not pipeline.profile_pipeline.endswith((".png", ".svg", ".pdf")):
        yield f"--profile-pipeline {pipeline.profile_pipeline}: give the name of a .png, .svg or .pdf file"
    if pipeline.profile_pipeline and training.cache_hidden_states:
        yield "--profile-pipeline with --cache-hidden-states: exits are tuned without a pipeline; drop one of them"
    if pipeline.fill_explicit_bubbles:
        yield from _fill_problems(cfg)


def _fill_problems(cfg: RunSettings) -> Iterator[str]:
    pipeline = cfg.pipeline
    if cfg.parallel.num_layers_per_virtual_pipeline_stage is not None:
        yield (
            "--fill-explicit-bubbles with --num-layers-per-virtual-pipeline-stage: interleaving makes the bubbles small"
            " in another way, and both together are not supported; drop one of them"
        )
    if cfg.parallel.calculate_per_token_loss:
        yield (
            "--fill-explicit-bubbles with --calculate-per-token-loss: stages see different microbatches, so there is no"
            " one number of tokens to divide by; drop one of them"
        )
    if cfg.training.train_samples is not None:
        yield "--fill-explicit-bubbles with --train-samples: give the length as --train-iters"
    for name in ("num_fill_warmup_microbatches", "num_fill_cooldown_microbatches"):
        value = getattr(pipeline, name)
        if value is not None and value < 0:
            yield f"{flag(name)} {value}: must be at least 0"
    ratio = pipeline.backward_forward_ratio
    if ratio is not None and not 0 < ratio < 100:
        yield f"--backward-forward-ratio {ratio}: must be above 0 and below 100; 2 is usual, 3 with full recomputation"


def _cache_problems(cfg: RunSettings, world_size: int) -> Iterator[str]:
    training, samples = cfg.training, cfg.training.cache_samples
    if samples is None:
        return
    if training.cache_hidden_states is None:
        yield f"--cache-samples {samples} without --cache-hidden-states: give a folder, or drop this"
    unit = training.micro_batch_size * max(cfg.parallel.data_parallel_size(world_size), 1)
    if samples < 1 or samples % unit:
        yield (
            f"--cache-samples {samples}: must be a multiple of micro batch size x data-parallel size = {unit}, at least"
            f" {unit}"
        )


def _tuning_problems(cfg: RunSettings, world_size: int) -> Iterator[str]:
    exits, parallel, checkpoint = cfg.exits, cfg.parallel, cfg.checkpoint
    given = parallel.tune_exit_pipeline_parallel_size
    if not cfg.training.tune_exit:
        for name in ("tune_exit_distillation", "cache_hidden_states", "cache_samples"):
            if getattr(cfg.training, name) not in (None, 0):
                yield f"{flag(name)} {getattr(cfg.training, name)} without --tune-exit: add it, or drop this"
        if given is not None:
            yield f"--tune-exit-pipeline-parallel-size {given} without --tune-exit: add it, or drop this"
        return
    yield from _cache_problems(cfg, world_size)
    if not exits.num_exits:
        yield "--tune-exit without exits: add some to the checkpoint (tools/convert_checkpoint.py add-exits)"
        return
    if not list(exit_kind_problems(exits)) and not any(head.has_parameters for head in exits.heads):
        yield (
            "--tune-exit has nothing to tune: the exits use the model's output weight and have no norm, MLP branch or"
            " block; add exits with parameters of their own"
        )
    share = cfg.training.tune_exit_distillation
    if not 0 <= share <= 1:
        yield f"--tune-exit-distillation {share}: a share lies between 0 and 1"
    needed = cfg.num_tuning_stages
    if given is not None and given != needed and share > 0:
        combined = f"--tune-exit-pipeline-parallel-size {given} with --tune-exit-distillation {share}"
        if given != cfg.num_stages_with_exits:
            yield f"{combined}: the final head is on stage {needed}; give {needed}, or leave it out"
        elif cfg.training.cache_hidden_states is None:
            yield (
                f"{combined}: the final head is on stage {needed}, and what it reads is not kept; give {needed}, or"
                " --cache-hidden-states with a folder that holds it"
            )
    elif given is not None and given != needed:
        yield (
            f"--tune-exit-pipeline-parallel-size {given}: of {parallel.pipeline_model_parallel_size} stages with"
            f" {cfg.layers_per_stage} layers each, the last exit (layer {exits.exit_layer_nums[-1]}) is on stage"
            f" {needed}; give {needed}, or leave it out"
        )
    if parallel.num_layers_per_virtual_pipeline_stage is not None:
        yield "--tune-exit with --num-layers-per-virtual-pipeline-stage: forward passes need no interleaving; drop it"
    if parallel.calculate_per_token_loss:
        yield "--tune-exit with --calculate-per-token-loss is not supported; drop it"
    if checkpoint.load is None and checkpoint.pretrained_checkpoint is None:
        yield "--tune-exit needs a model: --pretrained-checkpoint, or --load to go on"


def _interleaving_problems(cfg: RunSettings) -> Iterator[str]:
    parallel = cfg.parallel
    per_chunk = parallel.num_layers_per_virtual_pipeline_stage
    if per_chunk is None:
        return
    pp_size = parallel.pipeline_model_parallel_size
    per_stage = cfg.model.num_layers // pp_size
    if pp_size == 1:
        yield (
            f"--num-layers-per-virtual-pipeline-stage {per_chunk} with --pipeline-model-parallel-size 1: there is no"
            " pipeline to interleave; drop it"
        )
    elif per_stage % per_chunk:
        yield (
            f"--num-layers-per-virtual-pipeline-stage {per_chunk} does not divide the {per_stage} layers of a stage"
            f" (--num-layers {cfg.model.num_layers} / --pipeline-model-parallel-size {pp_size})"
        )


def _recompute_problems(cfg: RunSettings) -> Iterator[str]:
    parallel = cfg.parallel
    method, count = parallel.recompute_method, parallel.recompute_num_layers
    if parallel.recompute_granularity == "full":
        if method is None or count is None:
            yield (
                "--recompute-granularity full needs --recompute-method uniform|block and --recompute-num-layers N"
                " (uniform 1 saves most memory)"
            )
            return
        chunk_layers = cfg.model.num_layers // parallel.pipeline_model_parallel_size // _num_chunks(cfg)
        if method == "uniform" and chunk_layers % count:
            yield (
                f"--recompute-num-layers {count} does not divide the {chunk_layers} layers of a model chunk, as"
                " --recompute-method uniform needs"
            )
    elif method is not None or count is not None:
        given = " ".join(
            f"{flag(name)} {value}"
            for name, value in (("recompute_method", method), ("recompute_num_layers", count))
            if value is not None
        )
        yield f"{given}: only used with --recompute-granularity full; add it, or drop them"


def _num_chunks(cfg: RunSettings) -> int:
    return max(cfg.parallel.num_model_chunks(cfg.model.num_layers), 1)


# Batches


def _batch_problems(cfg: RunSettings, world_size: int) -> Iterator[str]:
    training = cfg.training
    dp_size = max(cfg.parallel.data_parallel_size(world_size), 1)
    unit = training.micro_batch_size * dp_size
    target = training.global_batch_size or unit
    first_sizes = [target]
    if training.rampup_batch_size:
        ramp_issues = list(_rampup_problems(training.rampup_batch_size, target, unit))
        if ramp_issues:
            yield from ramp_issues
            return
        start, increment, _ = training.rampup_batch_size
        first_sizes = [start, start + increment]  # all others are further increments away
    if target % unit:
        yield (
            f"--global-batch-size {target} is not divisible by --micro-batch-size ({training.micro_batch_size}) x"
            f" data-parallel size ({dp_size}) = {unit}"
        )
        return
    pp_size = cfg.parallel.pipeline_model_parallel_size
    if pp_size > 1 and _num_chunks(cfg) > 1:
        unfit = [size for size in first_sizes if size // unit % pp_size]
        if unfit:
            yield (
                f"a global batch of {unfit[0]} gives {unfit[0] // unit} microbatches: the interleaved schedule needs a"
                f" multiple of --pipeline-model-parallel-size {pp_size}; change --global-batch-size, or drop"
                " --num-layers-per-virtual-pipeline-stage"
            )
    if training.train_samples is not None and training.train_samples < first_sizes[0]:
        yield f"--train-samples {training.train_samples} is less than one global batch of {first_sizes[0]}"
    if target // unit > MAX_MICROBATCHES:
        yield (
            f"--global-batch-size {target} makes {target // unit} microbatches of one iteration: at most"
            f" {MAX_MICROBATCHES}; is it meant in samples?"
        )


def _rampup_problems(rampup: Sequence[int], target: int, unit: int) -> Iterator[str]:
    """unit: samples of one microbatch on all data-parallel ranks."""
    text = f"--rampup-batch-size {_words(rampup)}"
    if len(rampup) != 3:
        yield f"{text}: expected START INCREMENT SAMPLES, got {len(rampup)} values"
        return
    start, increment, _ = rampup
    if min(rampup) < 1:
        yield f"{text}: all three must be at least 1"
        return
    if start >= target:
        yield f"{text}: starts at {start}, which must be less than --global-batch-size {target}"
    elif (target - start) % increment:
        yield f"{text}: {increment} does not divide --global-batch-size {target} - {start} = {target - start}"
    if start % unit or increment % unit:
        yield f"{text}: {start} and {increment} must be divisible by micro batch size x data-parallel size = {unit}"


# Length and learning rate


def _schedule_problems(cfg: RunSettings) -> Iterator[str]:
    training, optimizer = cfg.training, cfg.optimizer
    if (training.train_iters is None) == (training.train_samples is None):
        yield (
            "how long to train: give --train-iters or --train-samples"
            if training.train_iters is None
            else f"--train-iters {training.train_iters} and --train-samples {training.train_samples}: give one"
        )
    elif training.train_iters is not None:
        yield from _mixed_unit_problems("iters", "samples", optimizer.lr_decay_samples, optimizer.lr_warmup_samples)
        yield from _warmup_problems(cfg, "iters", training.train_iters)
    else:
        yield from _mixed_unit_problems("samples", "iters", optimizer.lr_decay_iters, optimizer.lr_warmup_iters)
        yield from _warmup_problems(cfg, "samples", training.train_samples)
    for name in ("min_lr", "lr_warmup_init"):
        if getattr(optimizer, name) > optimizer.lr:
            yield f"{flag(name)} {getattr(optimizer, name)} is greater than --lr {optimizer.lr}"
    if optimizer.override_opt_param_scheduler and optimizer.use_checkpoint_opt_param_scheduler:
        yield "--override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler contradict each other: give one"


def _mixed_unit_problems(unit: str, other: str, decay: int | None, warmup: int) -> Iterator[str]:
    for name, value in ((f"--lr-decay-{other}", decay), (f"--lr-warmup-{other}", warmup)):
        if value:
            yield f"{name} {value} with --train-{unit}: count all in {unit} ({name.replace(other, unit)})"


def _warmup_problems(cfg: RunSettings, unit: str, length: int) -> Iterator[str]:
    """unit: 'iters' or 'samples', in which `length`, decay and warmup are counted."""
    optimizer = cfg.optimizer
    decay = getattr(optimizer, f"lr_decay_{unit}") or length
    warmup = getattr(optimizer, f"lr_warmup_{unit}")
    if optimizer.lr_warmup_fraction is not None and warmup:
        yield f"--lr-warmup-fraction {optimizer.lr_warmup_fraction} and --lr-warmup-{unit} {warmup}: give one"
    elif warmup >= decay:
        yield (
            f"--lr-warmup-{unit} {warmup} does not end before the decay of {decay} {unit} (--lr-decay-{unit}, or"
            f" --train-{unit}): shorten it"
        )


def _choice_problems(cfg: RunSettings) -> Iterator[str]:
    """Settings that exclude or need each other."""
    if cfg.training.bf16 and cfg.training.fp16:
        yield "--bf16 and --fp16: one run has one precision; give one"
    if cfg.parallel.use_distributed_optimizer and cfg.optimizer.optimizer != "adam":
        yield f"--use-distributed-optimizer with --optimizer {cfg.optimizer.optimizer}: it shares Adam's state only"
    wandb = [flag(name) for name, value in vars(cfg.logging).items() if name.startswith("wandb_") and value is not None]
    if wandb and cfg.logging.wandb_project is None:
        yield f"{', '.join(wandb)} without --wandb-project: give the project, or drop them"


# Data


def _data_problems(cfg: RunSettings) -> Iterator[str]:
    data = cfg.data
    names = ("train_data_path", "valid_data_path", "test_data_path")
    split_wise = [flag(name) for name in names if getattr(data, name)]
    sources = [flag(name) for name in ("data_path", "mock_data") if getattr(data, name)] + split_wise[:1]
    if not sources:
        yield "no data: give --data-path, or --train-data-path with --valid-data-path, or --mock-data"
    if len(sources) > 1:
        yield f"{' and '.join(sources)}: give one source of data"
    if split_wise and not data.train_data_path:
        yield f"{', '.join(split_wise)} without --train-data-path: give it"
    for name in ("data_path", *names):
        try:
            parse_blend(getattr(data, name))
        except ValueError as error:
            yield f"{flag(name)} {_words(getattr(data, name))}: {error}"
    yield from _split_problems(data.split)
    if len(sources) == 1 and cfg.training.eval_iters > 0 and not _has_validation_data(data):
        where = "--valid-data-path is missing" if data.train_data_path else f"--split {data.split} leaves it no data"
        asked = f"--eval-iters {cfg.training.eval_iters} asks for validation"
        yield f"{asked}, but {where}: give it some, or --eval-iters 0"
    yield from _tokenizer_problems(data)


def _split_problems(split: str) -> Iterator[str]:
    try:
        split_shares(split)
    except ValueError as error:
        yield str(error)


def _has_validation_data(data: DataConfig) -> bool:
    """Whether it has; also where the split is none, which is another problem."""
    if data.train_data_path:
        return bool(data.valid_data_path)
    return data.mock_data or bool(list(_split_problems(data.split))) or split_shares(data.split)[1] > 0


def _tokenizer_problems(data: DataConfig) -> Iterator[str]:
    if data.mock_data and data.tokenizer_model is None:
        if data.vocab_size is None:
            yield "--mock-data needs the number of token ids: give --vocab-size, or a tokenizer"
        return
    if data.tokenizer_type == "NullTokenizer" and data.vocab_size is None:
        yield "--tokenizer-type NullTokenizer needs --vocab-size"
    if data.tokenizer_type in TOKENIZERS_WITHOUT_MODEL:
        return
    if data.tokenizer_model is None:
        yield f"--tokenizer-type {data.tokenizer_type} needs --tokenizer-model: the path of the tokenizer"
        return
    path = data.tokenizer_model
    if not os.path.exists(path):
        yield f"--tokenizer-model {path}: no such file or folder"
    elif data.tokenizer_type == "HuggingFaceTokenizer" and not os.path.isdir(path):
        yield f"--tokenizer-model {path}: HuggingFaceTokenizer needs the folder (with tokenizer.json), this is a file"
    elif data.tokenizer_type != "HuggingFaceTokenizer" and not os.path.isfile(path):
        yield f"--tokenizer-model {path}: {data.tokenizer_type} needs the .model file, this is a folder"


# Checkpoints


def _checkpoint_problems(cfg: RunSettings) -> Iterator[str]:
    checkpoint = cfg.checkpoint
    pretrained = checkpoint.pretrained_checkpoint
    if pretrained is not None:
        missing = missing_checkpoint(pretrained, None)
        if missing:
            yield f"--pretrained-checkpoint {pretrained}: {missing}; correct the path"
    if checkpoint.save_interval is not None and checkpoint.save is None:
        yield f"--save-interval {checkpoint.save_interval} without --save: give the folder, or nothing is saved"
    if checkpoint.load is None:
        needing = [
            flag(name)
            for name in ("load_iteration", "finetune", "use_checkpoint_args", "exit_on_missing_checkpoint")
            if getattr(checkpoint, name) and not (name == "use_checkpoint_args" and pretrained is not None)
        ]
        if needing:
            yield f"{', '.join(needing)} without --load: give the checkpoint's folder"
        return
    may_be_empty = (
        checkpoint.save is not None
        and os.path.realpath(checkpoint.load) == os.path.realpath(checkpoint.save)
        and not checkpoint.exit_on_missing_checkpoint
        and not checkpoint.load_iteration
    )
    missing = missing_checkpoint(checkpoint.load, checkpoint.load_iteration)
    if missing and not may_be_empty:
        yield (
            f"--load {checkpoint.load}: {missing}; correct the path, or drop --load to train from scratch (a folder"
            " that is both --load and --save may be empty at first)"
        )


# What a run writes


def check_outputs(cfg: RunSettings) -> None:
    """Raise ConfigError if files or folders that the run writes cannot be written. For the rank that writes them."""
    found = list(_output_problems(cfg))
    if found:
        raise ConfigError(found)


OUTPUT_FOLDERS = ("save", "cache_hidden_states", "data_cache_path", "tensorboard_dir", "wandb_save_dir")
OUTPUT_FILES = ("metrics_file", "profile_pipeline")


def _output_problems(cfg: RunSettings) -> Iterator[str]:
    values = _values(cfg)
    for name in (*OUTPUT_FOLDERS, *OUTPUT_FILES):
        if values[name] is None:
            continue
        try:
            problem = unwritable(Path(values[name]), is_folder=name in OUTPUT_FOLDERS)
        except OSError as error:  # a name that is too long, a loop of links
            problem = (error.strerror or str(error)).lower()
        if problem:
            yield f"{flag(name)} {values[name]}: {problem}"


def unwritable(path: Path, is_folder: bool) -> str | None:
    """Why `path`, or what is missing of it, cannot be written; None if it can."""
    present = path
    while not present.exists():
        if present.is_symlink():
            return f"{present} is a link to something that is not there; correct it, or choose another place"
        present = present.parent
    if present == path and is_folder != path.is_dir():
        return "this is a file; give a folder" if is_folder else "this is a folder; give the name of a file in it"
    if present != path and not present.is_dir():
        return f"{present} is a file, in which nothing can be created; choose another place"
    if not os.access(present, os.W_OK | (os.X_OK if present.is_dir() else 0)):
        return f"{present} cannot be written; change its permissions, or choose another place"
    return None


# Settings without effect


def warnings(cfg: RunSettings) -> list[str]:
    """Settings that are allowed but do nothing, or do something surprising; one line each."""
    return [
        *_model_warnings(cfg),
        *_tuning_warnings(cfg),
        *_plan_warnings(cfg),
        *_exit_warnings(cfg),
        *_training_warnings(cfg),
        *_saving_warnings(cfg),
    ]


def _model_warnings(cfg: RunSettings) -> Iterator[str]:
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


def _tuning_warnings(cfg: RunSettings) -> Iterator[str]:
    if not cfg.training.tune_exit:
        return
    if cfg.parallel.recompute_granularity is not None:
        yield "--recompute-granularity has no effect with --tune-exit: the frozen layers keep no activations"
    if cfg.parallel.overlap_grad_reduce:
        yield "--overlap-grad-reduce has no effect with --tune-exit"


def _plan_warnings(cfg: RunSettings) -> Iterator[str]:
    pipeline, iterations = cfg.pipeline, cfg.training.train_iters
    if not pipeline.is_planned or iterations is None:
        return
    if pipeline.fills_by_measure and iterations <= ITERATIONS_UNTIL_MEASURED:
        yield (
            f"--fill-explicit-bubbles has no effect in {iterations} iterations: stages are measured in the first"
            f" {ITERATIONS_UNTIL_MEASURED}; give --backward-forward-ratio, or more iterations"
        )
    needed = ITERATIONS_UNTIL_MEASURED * (1 + pipeline.measures_stages)
    if pipeline.profile_pipeline and iterations < needed:
        yield f"--profile-pipeline has no effect in {iterations} iterations: it needs {needed}"


def _exit_warnings(cfg: RunSettings) -> Iterator[str]:
    exits = cfg.exits
    if exits.exit_layer_weight_warmup_style != "linear" and not exits.exit_layer_weight_warmup_iters:
        yield "--exit-layer-weight-warmup-style has no effect without --exit-layer-weight-warmup-iters"
    last = cfg.model.num_layers
    if last in exits.exit_layer_nums and not exits.pre_exit:
        yield f"the exit after layer {last} sits where the model ends anyway: it costs a head and saves no layer"
    if 1 in exits.exit_layer_nums and exits.pre_exit:
        yield "the exit before layer 1 sees the embeddings alone"


def _training_warnings(cfg: RunSettings) -> Iterator[str]:
    training, parallel = cfg.training, cfg.parallel
    if training.loss_scale is not None and not training.fp16:
        yield f"--loss-scale {training.loss_scale} has no effect without --fp16"
    if parallel.num_layers_per_virtual_pipeline_stage is not None and _num_chunks(cfg) == 1:
        yield "--num-layers-per-virtual-pipeline-stage has no effect: a stage's layers make one chunk"
    if training.rampup_batch_size and training.train_iters is not None:
        yield (
            "--rampup-batch-size with --train-iters: the learning rate is scheduled over train-iters full batches, so"
            " smaller batches leave its decay unfinished at the end; use --train-samples to train it out"
        )


def _saving_warnings(cfg: RunSettings) -> Iterator[str]:
    checkpoint, training = cfg.checkpoint, cfg.training
    if checkpoint.save is None:
        names = ("keep_last", "async_save", "no_save_optim", "no_save_rng")
        unused = [flag(name) for name in names if getattr(checkpoint, name)]
        if unused:
            yield f"{', '.join(unused)}: no effect without --save"
        names = ("exit_interval", "exit_duration_in_mins", "exit_signal_handler")
        stops = [name for name in names if getattr(training, name)]
        if stops:
            yield f"{', '.join(map(flag, stops))} will stop the run without saving: --save is not given"
    if checkpoint.load is None:
        unused = [flag(name) for name in ("no_load_optim", "no_load_rng") if getattr(checkpoint, name)]
        if unused:
            yield f"{', '.join(unused)}: no effect without --load"


def _words(values: Iterable[Any]) -> str:
    return " ".join(str(value) for value in values)
