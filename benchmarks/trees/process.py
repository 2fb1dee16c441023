"""One tree's engine in a process of its own: reads a line of JSON for each command, answers with one.

    PYTHONPATH=TREE python benchmarks/trees/process.py ADAPTER

`compare_trees.py` starts it. ADAPTER is the file beside this one that knows the API of the tree's engine. What a run
needs of an engine is the same everywhere: `add`, `step`, `has_work`, and events with tokens and results.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
import time
from typing import Any

import torch


class Commands:
    """Each method is a command; its arguments and what it returns are JSON."""

    def __init__(self, adapter: str) -> None:
        self._adapter_name = adapter

    def about(self) -> dict[str, Any]:
        """Which files this process runs."""
        return {"files": importlib.util.find_spec("megatron.early_exit").origin}

    def load(self, folder: str, num_slots: int, num_positions: int, costs: dict[str, Any] | None) -> dict[str, Any]:
        self._engine = self._tokenizer = None
        self._adapter = importlib.import_module(self._adapter_name)
        gc.unfreeze()
        gc.collect()
        if costs is not None:
            costs = {name: tuple(value) if isinstance(value, list) else value for name, value in costs.items()}
        self._engine, self._tokenizer, costs = self._adapter.load(folder, num_slots, num_positions, costs)
        gc.collect()
        gc.freeze()  # what is there now stays: later collections need not look at it
        return {"costs": costs}

    def encode(self, text: str) -> dict[str, Any]:
        return {"ids": self._tokenizer.encode_prompt(text, True)}

    def decode(self, prompts: list[list[int]], params: dict[str, Any]) -> dict[str, Any]:
        """Seconds of the clock and of the processor, steps and tokens from when every request has a first token; all
        tokens; the exits that could be evaluated."""
        settings = self._params(params)
        gc.collect()
        without = {self._engine.add(prompt, settings): prompt for prompt in prompts}
        order, results, started, steps, counted = list(without), {}, None, 0, 0
        while self._engine.has_work:
            events = self._engine.step()
            steps += 1
            for event in events:
                if event.tokens:
                    without.pop(event.request_id, None)
                counted += len(event.tokens)
                if event.result is not None:
                    results[event.request_id] = event.result
            if started is None and not without:
                started, steps, counted = (time.perf_counter(), time.process_time()), 0, 0
        wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
        ended = [results[request_id] for request_id in order]
        errors = {result.error for result in ended if result.error}
        if errors:
            raise RuntimeError(f"a request failed: {errors.pop()}")
        return {
            "wall": wall, "cpu": cpu, "steps": steps, "tokens": counted,
            "ids": [[token.token for token in result.tokens] for result in ended],
            "layer_runs": sum(result.statistics.layer_runs for result in ended),
            "exit_layers": list(ended[0].exit_layers),
        }  # fmt: skip

    def prefill_steps(self, length: int, arriving: int | None, limit: int) -> dict[str, Any]:
        """Steps until a prompt of `length` tokens has its first token, while one of `arriving` tokens comes with every
        step (None: none comes); `limit` if it has none by then."""
        engine, settings = self._engine, self._params({"max_tokens": 4, "ignore_eod": True})
        draw = torch.Generator().manual_seed(1)
        prompt = lambda size: torch.randint(8, 256, (size,), generator=draw).tolist()
        if arriving is not None:
            for _ in range(4):
                engine.add(prompt(arriving), settings)
        watched, steps, is_first = engine.add(prompt(length), settings), 0, False
        while not is_first and steps < limit:
            if arriving is not None:
                engine.add(prompt(arriving), settings)
            is_first = any(event.request_id == watched and event.tokens for event in engine.step())
            steps += 1
        engine.fail_all("measured")
        return {"steps": steps}

    def _params(self, params: dict[str, Any]) -> Any:
        sampling = self._adapter.SamplingSettings(**params.get("sampling", {}))
        return self._adapter.GenerationParams(**{**params, "sampling": sampling})


def main() -> None:
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever prints, prints there
    commands = Commands(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(commands, request.pop("command"))(**request)), file=answers, flush=True)


if __name__ == "__main__":
    main()
