"""Our checkpoints looked into, and padded for other layouts: inspect, reshard."""

from __future__ import annotations

import argparse
from dataclasses import replace

from megatron.early_exit.checkpoint.commands.common import (
    add_source,
    add_target,
    add_vocabulary,
    listed,
    padded_rows,
    read,
    save,
)


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    one = commands.add_parser(
        "reshard", help="pad the vocabulary for a tensor-parallel size (nothing else depends on it)"
    )
    add_source(one)
    add_target(one, "--save", with_dtype=False)
    add_vocabulary(one)
    one.set_defaults(run=reshard)

    one = commands.add_parser("inspect", help="architecture, exits and sizes")
    add_source(one)
    one.add_argument("--tensors", action="store_true", help="every tensor with shape and type")
    one.add_argument(
        "--verify", action="store_true", help="read everything and compare it with the checksums; status 2 if damaged"
    )
    one.set_defaults(run=inspect)


def reshard(args: argparse.Namespace) -> None:
    description, tensors, _ = read(args)
    model = replace(description.model, padded_vocab_size=padded_rows(args, tensors))
    save(args, replace(description, model=model), tensors)


def inspect(args: argparse.Namespace) -> None:
    from megatron.early_exit.checkpoint.families import standard_model_type
    from megatron.early_exit.checkpoint.store import has_training_state, verify_checkpoint
    from megatron.early_exit.checkpoint.tensors import EXIT_HEAD
    from megatron.early_exit.checkpoint.vocabulary import vocabulary_rows

    description, tensors, folder = read(args)
    verified = verify_checkpoint(folder) if args.verify else None
    model, exits = description.model, description.exits
    try:
        like = f"as {standard_model_type(model)} of transformers"
    except ValueError:
        like = "no architecture of transformers"
    count = lambda names: sum(_numel(tensors[name].shape) for name in names)
    size = sum(tensor.num_bytes for tensor in tensors.values())
    of_exits = [name for name in tensors if EXIT_HEAD in name]
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    rows = [
        ("checkpoint", f"{folder}, {'with' if has_training_state(folder) else 'without'} training state"),
        ("architecture", f"{model.num_layers} layers of width {model.hidden_size}, {like}"),
        (
            "attention",
            f"{model.num_attention_heads} heads of {model.head_size}, {model.num_kv_heads} of keys and values, "
            f"{model.position_embedding_type}, up to {description.max_position_embeddings} positions",
        ),
        ("vocabulary", f"{vocabulary_rows(tensors)} rows, {_divisors(vocabulary_rows(tensors))}"),
        ("parameters", f"{count(tensors):,}, {size / 2**20:,.0f} MiB in {', '.join(dtypes)}"),
        ("exits", f"after layers {listed(exits.exit_layer_nums)}" if exits.num_exits else "none"),
    ]
    if exits.num_exits:
        before = "before" if exits.pre_exit else "after"
        rows[-1] = ("exits", f"{before} layers {listed(exits.exit_layer_nums)}; {exits.described_heads()}")
        rows.append(("of exits", f"{count(of_exits):,} parameters of their own"))
    if verified is not None:
        rows.append(("verified", verified))
    for name, text in rows:
        print(f"{name:<14}{text}")
    if args.tensors:
        width = max(map(len, tensors))
        for name, tensor in tensors.items():
            print(f"{name:<{width}}  {list(tensor.shape)!s:<16} {str(tensor.dtype).removeprefix('torch.')}")


def _divisors(rows: int) -> str:
    sizes = [size for size in (1, 2, 4, 8, 16, 32) if rows % size == 0]
    return f"for tensor parallel sizes up to {max(sizes)}"


def _numel(shape: tuple[int, ...]) -> int:
    import math

    return math.prod(shape)
