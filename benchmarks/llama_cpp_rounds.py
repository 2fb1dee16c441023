"""One model in llama.cpp, driven by lines of JSON: run by an interpreter that has `xllamacpp` (with wheels), which need
not be this project's. It imports nothing of the project.

    PYTHON benchmarks/llama_cpp_rounds.py MODEL.gguf THREADS

Each line of standard input is {"prompt": [ids], "tokens": N}; the answer is {"tokens": N, "seconds": of decoding,
"cpu_seconds": of that}, without the prompt, as llama.cpp counts.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, threads = sys.argv[1], int(sys.argv[2])
    params.n_ctx, params.n_parallel, params.warmup = 1024, 1, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    print(json.dumps({"version": xllamacpp.BUILD_INFO, "system": xllamacpp.get_system_info()}, default=str), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.process_time()
        answer = server.handle_completions({
            "prompt": asked["prompt"], "max_tokens": asked["tokens"], "n_predict": asked["tokens"], "temperature": 0,
            "ignore_eos": True, "cache_prompt": False,
        })  # fmt: skip
        answer = json.loads(answer) if isinstance(answer, str) else answer
        timings, cpu_seconds = answer["timings"], time.process_time() - started
        share = timings["predicted_ms"] / (timings["predicted_ms"] + timings["prompt_ms"])
        print(
            json.dumps(
                {
                    "tokens": timings["predicted_n"],
                    "seconds": timings["predicted_ms"] / 1e3,
                    "cpu_seconds": share * cpu_seconds,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
