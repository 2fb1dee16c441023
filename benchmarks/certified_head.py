"""The full model with a certified int8 head against the same model with its exact head, token for token.

    python -m benchmarks.certified_head --load runs/demo/checkpoints --name demo --prompts prompts.jsonl

One engine answers the same prompts in turn: with log-probabilities, which takes the exact head, and without, which
takes the certified one. All tokens must be equal. `--llama-cpp PYTHON`, an interpreter that has `xllamacpp`, and
`--gguf`, a file with the same weights at four or more bits, compare decoding with all weights in int8 with llama.cpp at
8 bits (Q8_0, made from the file) in the same run, with as many threads; left out, that part is skipped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import common
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.results import RequestResult
from megatron.early_exit.inference.worker.certified_head import CertifiedHead, _measured

GOAL, GOAL_WHERE_INT8_IS_FAST, FAST = 1.05, 1.1, 2.5
"""Speed of `full` at batch 1; the latter where the plain head takes so many times what the certified one takes."""


def prompts_of(llm: LLM, path: Path | None, count: int) -> list[list[int]]:
    """Of a file of chats or texts, one JSON document a line; None: some beginnings of code."""
    if path is None:
        return [
            llm.tokenizer.tokenize(text) for text in ("import os\n", "def main(", "class Node:", "for i in range(")
        ][:count]
    documents = [json.loads(line) for line in path.read_text().splitlines()[:count]]
    return [
        llm.tokenizer.chat(one["messages"]) if "messages" in one else llm.tokenizer.tokenize(one["text"])
        for one in documents
    ]


class Decoded(NamedTuple):
    """From the moment on when all requests have a first token."""

    per_second: float
    """Tokens, by the clock."""
    per_cpu_second: float
    """By CPU time: with one thread the same on a machine that does nothing else, and of use on others."""
    results: list[RequestResult]


def decode(llm: LLM, prompts: Sequence[list[int]], params: GenerationParams) -> Decoded:
    """All prompts together."""
    began: set[int] = set()
    started, count, results = None, 0, {}
    for delta in llm.stream(list(prompts), params):
        if started is not None:
            count += len(delta.tokens)
        began |= {delta.output.prompt_index} if delta.tokens else set()
        if started is None and len(began) == len(prompts):
            started = time.perf_counter(), time.process_time()
        if delta.is_finished:
            results[delta.output.prompt_index] = delta.output.result
    seconds, cpu_seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    return Decoded(count / seconds, count / cpu_seconds, [results[index] for index in sorted(results)])


def compare(llm: LLM, prompts: Sequence[list[int]], batch: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Both heads by turns, `rounds` times each, over prompts that differ by round."""
    exact = GenerationParams(max_tokens=tokens, ignore_eod=True)
    certified, head = replace(exact, log_probs=False), certified_head_of(llm)
    decode(llm, prompts[:batch], certified)  # warm up
    before = replace(head.counts)
    speeds = {"exact": Speeds(), "certified": Speeds()}
    num_tokens = num_equal = 0
    for number in range(rounds):
        batch_prompts = [prompts[(number * batch + i) % len(prompts)] for i in range(batch)]
        order = (("exact", exact), ("certified", certified))
        answers = {}
        for name, params in order if number % 2 else reversed(order):
            decoded = decode(llm, batch_prompts, params)
            speeds[name].add(decoded.per_second, decoded.per_cpu_second)
            answers[name] = decoded.results
        for one, other in zip(*answers.values(), strict=True):
            num_tokens += len(one.tokens)
            num_equal += sum(map(int.__eq__, one.token_ids, other.token_ids))
    after = head.counts
    batches, rows = after.batches - before.batches, after.rows - before.rows
    return {
        "batch": batch,
        **compared(speeds, "certified", "exact"),
        "asked": batches,
        "refused": common.ratio(after.refused - before.refused, batches),
        "candidates_per_row": common.ratio(after.candidates - before.candidates, rows),
        "same_tokens": common.ratio(num_equal, num_tokens),
    }


@dataclass
class Speeds:
    """Tokens per second, one of each a round."""

    by_clock: list[float] = field(default_factory=list)
    by_cpu: list[float] = field(default_factory=list)

    def add(self, per_second: float, per_cpu_second: float) -> None:
        self.by_clock.append(per_second)
        self.by_cpu.append(per_cpu_second)


def compared(speeds: dict[str, Speeds], name: str, baseline: str) -> dict[str, Any]:
    """Speeds, and the ratio of `name` to `baseline` by the clock and by CPU time."""
    return {
        "tokens_per_second": {of: common.median(one.by_clock) for of, one in speeds.items()},
        "tokens_per_cpu_second": {of: common.median(one.by_cpu) for of, one in speeds.items()},
        "speeds": {of: asdict(one) for of, one in speeds.items()},
        "speed": common.mean_ratio(speeds[name].by_clock, speeds[baseline].by_clock),
        "speed_by_cpu": common.mean_ratio(speeds[name].by_cpu, speeds[baseline].by_cpu),
    }


def certified_head_of(llm: LLM) -> CertifiedHead:
    head = llm.engine.executor.worker.decoder.weights.final.certified
    if head is None:
        raise ValueError("this model's output weight has no certified form on this machine")
    return head


def head_seconds(llm: LLM) -> dict[int, dict[str, float]]:
    """What the plain head and the certified one take alone, by the number of rows, as loading measures it."""
    weights = llm.engine.executor.worker.decoder.weights
    argmax = weights.final.certified._argmax
    counts = argmax.counts
    measured = _measured(argmax, weights.final.output)
    argmax.counts = counts
    return {rows: {"plain": plain, "certified": certified} for rows, (plain, certified) in measured.items()}


# llama.cpp.


def to_q8(source: Path, target: Path) -> None:
    """Write the matrices of a GGUF file at 8 bits; all else is copied."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants

    reader = GGUFReader(source)
    read = lambda name: reader.fields[name].contents()
    writer = GGUFWriter(target, read("general.architecture"))
    for name, one in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, of_items = one.types[0], one.types[-1] if one.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, one.contents(), kind, of_items)
    writer.add_file_type(7)  # mostly Q8_0
    for tensor in reader.tensors:
        values = quants.dequantize(tensor.data, tensor.tensor_type)
        kind = GGMLQuantizationType.F32 if values.ndim == 1 else GGMLQuantizationType.Q8_0
        writer.add_tensor(tensor.name, quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def llama_cpp(
    python: str, model: Path, threads: int
) -> Iterator[tuple[dict, Callable[[list[int], int], tuple[float, float]]]]:
    """(its build, (prompt, tokens) -> tokens per second and CPU second): llama.cpp in a process of its own."""
    command = [python, str(Path(__file__).with_name("llama_cpp_rounds.py")), str(model), str(threads)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process:

        def answer() -> dict[str, Any]:
            for line in process.stdout:
                if line.startswith("{"):
                    return json.loads(line)
            raise ValueError(f"{python} has ended; it needs the package xllamacpp")

        def run(prompt: list[int], tokens: int) -> tuple[float, float]:
            process.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens}) + "\n")
            process.stdin.flush()
            one = answer()
            return one["tokens"] / one["seconds"], one["tokens"] / one["cpu_seconds"]

        try:
            yield answer(), run
        finally:
            process.stdin.close()


def compare_int8(args: argparse.Namespace) -> dict[str, Any]:
    """Decoding with all weights in int8 against llama.cpp, by turns."""
    if args.llama_cpp is None or args.gguf is None:
        return {"skipped": "--llama-cpp or --gguf was not given"}
    llm = LLM.load(args.load, max_requests=1, max_length=args.max_length, quantize="all")
    prompts = prompts_of(llm, args.prompts, args.rounds)
    params = GenerationParams(max_tokens=args.tokens, ignore_eod=True, log_probs=False)
    speeds = {"ours": Speeds(), "llama.cpp": Speeds()}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "q8_0.gguf"
        to_q8(args.gguf, model)
        with llama_cpp(args.llama_cpp, model, torch.get_num_threads()) as (build, run):
            decode(llm, prompts[:1], params)
            run(prompts[0], args.tokens)
            for number in range(args.rounds):
                prompt = prompts[number % len(prompts)]
                decoded = decode(llm, [prompt], params)
                speeds["ours"].add(decoded.per_second, decoded.per_cpu_second)
                speeds["llama.cpp"].add(*run(prompt, args.tokens))
    llm.close()
    return {
        **compared(speeds, "ours", "llama.cpp"),
        "llama_cpp": build,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, help="folder of checkpoints")
    parser.add_argument("--name", required=True, help="of the model, in the name of the result")
    parser.add_argument("--prompts", type=Path, help="JSON lines of messages or text; default: some code")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--max-length", type=int, help="default: what the model takes")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="an interpreter that has xllamacpp")
    parser.add_argument("--gguf", type=Path, help="the model's weights")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    machine, started = common.machine_info(), time.perf_counter()
    llm = LLM.load(args.load, max_requests=max(args.batches), max_length=args.max_length, certified_head="on")
    heads = head_seconds(llm)
    prompts = prompts_of(llm, args.prompts, args.rounds * 2)
    rows = [compare(llm, prompts, batch, args.tokens, args.rounds) for batch in args.batches]
    llm.close()
    print(common.format_table(
        ["batch", "speed", "low", "high", "by CPU time", "low", "high", "refused", "candidates", "same tokens"],
        [
            [str(row["batch"]), *row["speed"].values(), *row["speed_by_cpu"].values(), row["refused"],
             row["candidates_per_row"], row["same_tokens"]]
            for row in rows
        ],
    ))  # fmt: skip
    alone = {n: common.ratio(one["plain"], one["certified"]) for n, one in heads.items()}
    print("\nthe head alone, times as fast:", ", ".join(f"{one:.2f} for {n} rows" for n, one in alone.items()))
    int8 = compare_int8(args)
    print("\nint8 everywhere against llama.cpp:", int8.get("skipped") or (int8["speed"], int8["speed_by_cpu"]))
    goal = GOAL_WHERE_INT8_IS_FAST if alone[1] >= FAST else GOAL
    first = rows[0]["speed"]["ratio"] if rows[0]["batch"] == 1 else None
    goals = {
        "same_tokens": {"met": all(row["same_tokens"] == 1.0 for row in rows)},
        "batch_1": {"met": None if first is None else first >= goal, "speed": first, "goal": goal},
        "batch_1_by_cpu": {
            "met": None if first is None else rows[0]["speed_by_cpu"]["ratio"] >= goal,
            **rows[0]["speed_by_cpu"],
        },
    }
    settings = {
        "model": args.name, "load": args.load, "batches": args.batches, "tokens": args.tokens, "rounds": args.rounds,
        "prompts": None if args.prompts is None else args.prompts.name, "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    results = {"full": rows, "head_alone": {"seconds": heads, "times_as_fast": alone}, "int8": int8}
    document = common.result_document(f"certified_head_{args.name}", machine, settings, 0, results, goals)
    common.finish(document, args.output)


if __name__ == "__main__":
    main()
