"""Lossless drafts on code: from earlier text, from exits, from both, beside `transformers` with its own two ways.

    python -m benchmarks.drafts --load CHECKPOINTS --gguf DIR --prompts-file benchmarks/data/code_prompts.jsonl

The checkpoint is SmolLM2-135M-Instruct with exits; DIR has the GGUF file that its weights come from
(`python -m benchmarks.smollm2`). Every group of prompts is answered in all ways before the next one, greedily, in fp32,
with the same threads. A ratio is that of seconds a token behind the first one, on the same prompts; its interval is a
bootstrap over groups of prompts, paired. Loops make drafts cheap: how many answers end in one stands beside.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks import common, smollm2
from megatron.early_exit.evaluation.decoding import Measurement, Way, decode, measure
from megatron.early_exit.evaluation.prompt_flags import add_prompt_flags, load_prompts
from megatron.early_exit.evaluation.prompts import EvalPrompt
from megatron.early_exit.evaluation.statistics.intervals import bootstrap
from megatron.early_exit.evaluation.statistics.text_metrics import is_loop
from megatron.early_exit.evaluation.transformers_models import TransformersModel
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams

GOAL = 1.2
"""Of the fastest lossless way at batch 1, over all prompts."""


def save_in_fp32(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as one that was never quantised; transformers does not write the other."""
    quantised, _ = smollm2.load(gguf)
    config = copy.deepcopy(quantised.config)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)


def our_ways(llm: LLM, num_tokens: int) -> dict[str, Way]:
    full = GenerationParams(max_tokens=num_tokens)
    drafts = {source: GenerationParams(max_tokens=num_tokens, mode="self_speculative", draft_source=source)
              for source in ("ngram", "exit", "both")}  # fmt: skip
    llm.engine.prepare(drafts["both"])
    return {name: functools.partial(decode, llm.engine, params) for name, params in {"full": full, **drafts}.items()}


def their_ways(model: TransformersModel, settings: argparse.Namespace) -> dict[str, Way]:
    plain = functools.partial(model.decode, num_tokens=settings.tokens)
    return {
        "transformers": plain,
        "transformers, prompt lookup": functools.partial(plain, prompt_lookup_num_tokens=settings.prompt_lookup),
        "transformers, early exit": functools.partial(plain, assistant_early_exit=settings.assistant_exit),
    }


def compared(measured: Measurement, base: Measurement, groups: Sequence[int]) -> dict[str, Any]:
    """Speed on some groups of prompts, and its ratio to another way's."""
    ours, theirs = (one.seconds_per_token[:, list(groups)] for one in (measured, base))
    logs = np.log(theirs / ours)  # [rounds, groups]
    known = ~np.isnan(logs).any(0)  # of answers of one token there is nothing to say
    logs = logs[:, known].mean(0)
    low, high = bootstrap(logs) if len(logs) > 1 else (np.nan, np.nan)
    tokens = sum(run.decode_tokens for of_round in measured.rounds for run in (of_round[group] for group in groups))
    seconds = sum(run.decode_seconds for of_round in measured.rounds for run in (of_round[group] for group in groups))
    return {
        "tokens_per_second": common.ratio(tokens, seconds),
        "speedup": float(np.exp(logs.mean())),
        "low": None if np.isnan(low) else float(np.exp(low)), "high": None if np.isnan(high) else float(np.exp(high)),
    }  # fmt: skip


def row_of(name: str, batch: int, found: dict[str, Measurement], prompts: Sequence[EvalPrompt]) -> dict[str, Any]:
    measured = found[name]
    base = found["transformers" if name.startswith("transformers") else "full"]
    groups = range(measured.seconds_per_token.shape[1])
    statistics = [result.statistics for result in measured.results]
    drafted, accepted = (sum(getattr(one, key) for one in statistics) for key in ("drafted", "accepted"))
    domains = sorted({one.domain for one in prompts}) if batch == 1 else []
    pairs = list(zip(measured.answers, found["full"].answers, strict=True))
    tokens = sum(max(map(len, pair)) for pair in pairs)
    return {
        "variant": name, "batch": batch, **compared(measured, base, groups),
        "speedup_over_transformers": compared(measured, found["transformers"], groups)["speedup"]
        if "transformers" in found else None,
        "identical_answers": sum(a == b for a, b in pairs) / len(pairs),
        "equal_tokens": sum(x == y for a, b in pairs for x, y in zip(a, b)) / tokens,
        "loop_rate": sum(map(is_loop, measured.answers)) / len(pairs),
        "acceptance": common.ratio(accepted, drafted),
        "ngram_share": common.ratio(sum(one.ngram_accepted for one in statistics), accepted),
        "by_domain": {
            domain: compared(measured, base, [number for number in groups if prompts[number].domain == domain])
            for domain in domains
        },
        "seconds_per_token": measured.seconds_per_token.tolist(),
    }  # fmt: skip


def progress(what: str) -> Callable[[int, int], None]:
    return lambda done, total: print(f"  {what}: {done} of {total}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, metavar="DIR")
    parser.add_argument("--gguf", type=Path, metavar="DIR", help="without it transformers is left out")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=96, help="of an answer at batch 1")
    parser.add_argument("--tokens-of-batches", type=int, default=48, help="of an answer at other batch sizes")
    parser.add_argument("--prompt-lookup", type=int, default=10, help="tokens that transformers copies at once")
    parser.add_argument("--assistant-exit", type=int, default=22, help="layers of transformers' early exit")
    parser.add_argument("--output", type=Path)
    add_prompt_flags(parser, default_prompts=50)
    settings = parser.parse_args()
    machine = common.machine_info()
    llm = LLM.load(settings.load, max_requests=max(settings.batch))
    longest = max(settings.tokens, settings.tokens_of_batches)
    prompts = load_prompts(settings, llm.tokenizer, llm.engine.description, longest).prompts
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        theirs: dict[str, Way] = {}
        if settings.gguf is not None:
            save_in_fp32(settings.gguf, Path(folder))
            wrapped = TransformersModel(Path(folder), torch.float32, llm.engine.ends, llm.engine.description.vocab_size)
            theirs = their_ways(wrapped, settings)
        for batch in settings.batch:
            ways = our_ways(llm, settings.tokens if batch == 1 else settings.tokens_of_batches)
            ways |= theirs if batch == 1 else {}
            ids = [prompt.ids for prompt in prompts]
            found = measure(ways, ids, batch, settings.rounds, progress(f"batch {batch}"))
            rows += [row_of(name, batch, found, prompts) for name in ways]
    columns = ("batch", "tokens_per_second", "speedup", "low", "high", "speedup_over_transformers",
               "identical_answers", "loop_rate", "acceptance", "ngram_share")  # fmt: skip
    print(common.format_table(
        ("variant", *columns), [[row["variant"], *(row[column] for column in columns)] for row in rows]
    ))  # fmt: skip
    ours = [row for row in rows if row["batch"] == 1 and row["variant"] in ("ngram", "exit", "both")]
    best = max(ours, key=lambda row: row["speedup"], default=None)
    goals = {"lossless on code": {
        "met": None if best is None else best["speedup"] >= GOAL, "goal": GOAL, "best": best and best["variant"],
        "speedup": best and best["speedup"],
    }}  # fmt: skip
    of_run = {name: getattr(settings, name) for name in
              ("batch", "rounds", "tokens", "tokens_of_batches", "prompt_lookup", "assistant_exit")}  # fmt: skip
    of_run |= {"num_prompts": len(prompts), "threads": torch.get_num_threads(), "dtype": "fp32"}
    costs = llm.engine.measure_costs()
    results = {"rows": rows, "costs": {name: getattr(costs, name) for name in costs.__dataclass_fields__}}
    common.finish(common.result_document("drafts", machine, of_run, settings.seed, results, goals), settings.output)


if __name__ == "__main__":
    main()
