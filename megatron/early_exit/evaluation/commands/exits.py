"""The command `exits`: every exit of one or several checkpoints on a text, side by side with the final head."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron.early_exit.evaluation.commands.common import add_parser, finish, load
from megatron.early_exit.evaluation.prompt_flags import add_prompt_flags, load_prompts
from megatron.early_exit.platform.command_line import show_progress

if TYPE_CHECKING:
    from megatron.early_exit.evaluation.commands.common import Commands
    from megatron.early_exit.evaluation.prompts import EvalPrompt, PromptSet
    from megatron.early_exit.inference.engine_loading import LoadedEngine
    from megatron.early_exit.inference.exit_probes import ExitProbes
    from megatron.early_exit.inference.llm import LLM

DEFAULT_LENGTH = 256


def add_command(commands: Commands) -> None:
    parser = add_parser(
        commands, "exits", "loss, agreement and calibration of every exit on a text",
        "Run a text through a model, all exits and the final head at every position: losses, how often an exit says "
        "what the final head says, how well its score tells where it does, and what evaluating it costs.",
    )  # fmt: skip
    add_prompt_flags(parser, default_prompts=16, default_length=DEFAULT_LENGTH, what="text, as sequences of tokens")
    parser.add_argument_group("comparison").add_argument(
        "--compare", nargs="+", default=[], metavar="DIR", help="other checkpoints, with the same tokenizer"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from megatron.early_exit.platform.machine import machine_info

    machine = machine_info()
    others = [argparse.Namespace(**vars(args) | {"load": path, "load_iteration": None}) for path in args.compare]
    _fit_length(args, (args, *others))
    llm, loaded = _load(args, args.prompt_length)
    with llm:
        tokenizer = llm.tokenizer.fingerprint
        text = load_prompts(args, llm.tokenizer, llm.engine.description, room=1)
        _check_lengths(text)
        results = _evaluated(args, llm, loaded, text)
    results["compare"] = []
    for other in others:
        theirs, their_loaded = _load(other, args.prompt_length)
        with theirs:
            if theirs.tokenizer.fingerprint != tokenizer:
                raise ValueError(f"{other.load} has another tokenizer than {args.load}; evaluate it by itself")
            results["compare"].append({"checkpoint": other.load, **_evaluated(other, theirs, their_loaded, text)})
    settings = {"sequences": len(text.prompts), "sequence_length": args.prompt_length, "seed": args.seed}
    finish(args, loaded, settings, results, data=text.data, machine=machine)


def _fit_length(args: argparse.Namespace, models: Sequence[argparse.Namespace]) -> None:
    """Choose the length of sequences, by what all checkpoints take, before the first is loaded. Raises ValueError or
    OSError for one that is not there."""
    from megatron.early_exit.config.checkpoint_choice import checkpoint_folder
    from megatron.early_exit.config.saved_description import read_description

    longest = min(
        read_description(checkpoint_folder(one.load, one.load_iteration)).max_position_embeddings for one in models
    )
    if not args.data_path:
        return
    if args.prompt_length is None:
        args.prompt_length = min(DEFAULT_LENGTH, longest)
    if not 2 <= args.prompt_length <= longest:
        raise ValueError(
            f"--prompt-length is {args.prompt_length}; it must lie between 2 and the longest that all models take, "
            f"{longest}"
        )


def _load(args: argparse.Namespace, length: int | None) -> tuple[LLM, LoadedEngine]:
    return load(args, **({} if length is None or args.max_length is not None else {"max_length": length}))


def _check_lengths(text: PromptSet) -> None:
    short = next((one for one in text.prompts if len(one.ids) < 2), None)
    if short is not None:
        raise ValueError(f"{short.name} is a single token, which none follows: there is nothing to predict")


def _evaluated(args: argparse.Namespace, llm: LLM, loaded: LoadedEngine, text: PromptSet) -> dict[str, Any]:
    """Print and return what the heads of one model do."""
    return evaluated_heads(
        llm, str(loaded.checkpoint.folder), text.prompts, args.seed, probes=loaded.checkpoint.probes
    )  # fmt: skip


def evaluated_heads(
    llm: LLM,
    name: str,
    sequences: Sequence[EvalPrompt],
    seed: int,
    counted: Sequence[Sequence[bool]] | None = None,
    probes: ExitProbes | None = None,
) -> dict[str, Any]:
    """Print and return what the heads of the model `name` do. counted: of each sequence, which of its tokens from the
    second on are counted; None: all. probes: the model's, if their output is wanted."""
    from megatron.early_exit.evaluation.exit_quality import head_row, head_scores, reliability_rows, used_heads_row
    from megatron.early_exit.evaluation.rows import names_of

    heads = head_scores(llm, [one.ids for one in sequences], show_progress("sequences"), probes)
    if counted is not None:
        heads = [head.at(counted) for head in heads]
    costs = llm.engine.measure_costs()
    rows = [head_row(head, costs, seed) for head in heads]
    num_tokens = sum(one.size for one in heads[0].agrees)
    print(f"\n{name}: {num_tokens:,} tokens\n{_table(rows)}")
    by_domain = {}
    for domain in sorted({one.domain for one in sequences if one.domain is not None}):
        chosen = [index for index, one in enumerate(sequences) if one.domain == domain]
        by_domain[domain] = [head_row(head.of(chosen), costs, seed) for head in heads]
        if counted is None:  # of few answers there is little to say
            print(f"\n{domain}, {len(chosen)} of {len(sequences)} sequences:\n{_table(by_domain[domain])}")
    used_heads = [
        {"level": one.level, "exit_score": one.score, **used_heads_row(heads, one.thresholds, one.score)}
        for one in llm.engine.checks.certificates.certified
        if one.score == "head" or probes is not None
    ]
    if used_heads:
        print(f"\neach token judged by the head that would give it:\n{_table_of_used(used_heads)}")
    return {
        "tokens": num_tokens,
        "heads": rows,
        "used_heads": used_heads,
        "reliability": {str(head.layer): reliability_rows(head) for head in heads if not head.is_final},
        "by_domain": by_domain,
        "per_prompt": [
            {
                "layer": head.layer,
                "is_final": head.is_final,
                "tokens": [one.size for one in head.agrees],
                "agreeing": [int(one.sum()) for one in head.agrees],
                "log_prob": [float(one.sum()) for one in head.log_probs],
            }
            for head in heads
        ],
        "prompts": names_of(sequences),
    }


def _table(rows: Sequence[dict[str, Any]]) -> str:
    from megatron.early_exit.platform.columns import aligned

    lines = [("head", "loss", "perplexity", "accuracy", "agreement", "confidence", "ECE", "AUROC", "cost in layers")]
    for row in rows:
        number = lambda name, form, row=row: "-" if row[name] is None else f"{row[name]:{form}}"
        interval = row["agreement_interval"]
        ends = "" if interval is None else f" [{interval[0]:.1%}, {interval[1]:.1%}]"
        lines.append((
            "final" if row["is_final"] else f"exit {row['layer']}", number("loss", ".3f"), number("perplexity", ".1f"),
            number("accuracy", ".1%"), number("agreement", ".1%") + ends, number("confidence", ".1%"),
            number("ece", ".3f"), number("auroc", ".3f"), number("cost_in_layers", ".1f"),
        ))  # fmt: skip
    return aligned(lines)


def _table_of_used(rows: Sequence[dict[str, Any]]) -> str:
    from megatron.early_exit.platform.columns import aligned

    lines = [("certified", "decided by", "perplexity", "/ final head's", "given by exits")]
    for row in rows:
        number = lambda name, row=row: "-" if row[name] is None else f"{row[name]:.4f}"
        given = 1.0 - row["shares"]["final"]
        score = row["exit_score"]
        lines.append((f"{row['level']:g}", score, number("perplexity"), number("perplexity_ratio"), f"{given:.1%}"))
    return aligned(lines)
