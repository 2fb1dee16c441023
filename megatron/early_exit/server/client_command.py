"""The program behind `tools/request_client.py`: prompts to a server, its answers to the terminal, coloured by exit."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron.early_exit.inference import report
from megatron.early_exit.inference.params import EXIT_SCORES
from megatron.early_exit.inference.prompt_file import prompts_of_file
from megatron.early_exit.inference.results import GeneratedToken
from megatron.early_exit.platform.command_line import add_verbose_flag
from megatron.early_exit.platform.failures import in_words
from megatron.early_exit.server.client import Client, RequestFailed, ServerUnavailable

PROGRAM = "request_client.py"


def build_parser() -> argparse.ArgumentParser:
    """Flags; those of sampling and exits are as in `generate.py`."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Send prompts to a text-generation server and show the answers as they come. Without prompts it "
        "reads one a line from standard input.",
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    parser.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="one prompt a line; of .jsonl the field `text` of each line"
    )
    parser.add_argument("--chat", action="store_true", help="talk: each answer sees the conversation before it")
    server = parser.add_argument_group("server")
    server.add_argument("--url", default="http://127.0.0.1:5000", help="where it listens; default %(default)s")
    server.add_argument("--api", choices=("openai", "megatron"), default="openai", help="megatron: PUT /api, no stream")
    server.add_argument("--api-key", default=os.environ.get("EARLY_EXIT_API_KEY"), help="default: EARLY_EXIT_API_KEY")
    server.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="until a server is there and ready")
    server.add_argument(
        "--busy", type=float, default=60.0, metavar="SECONDS", help="to try again where it is too busy; default 60"
    )
    server.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="of silence; default 600")
    sampling = parser.add_argument_group("sampling (the default is greedy)")
    sampling.add_argument(
        "--tokens-to-generate", type=int, metavar="N", help="at most; default 64, or as was certified (--certified)"
    )
    sampling.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="choose among the K most probable; 0: all")
    sampling.add_argument("--top-p", type=float, default=0.0, metavar="P", help="choose among probability P; 0: all")
    sampling.add_argument("--seed", type=int, default=1234)
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop before this; repeatable")
    exits = parser.add_argument_group("early exit (the default is the server's)")
    exits.add_argument("--mode", choices=("full", "early_exit", "self_speculative"))
    exits.add_argument("--early-exit-thres", type=float, nargs="+", metavar="F", help="one, or one for each exit")
    exits.add_argument(
        "--certified", type=float, metavar="LEVEL", help="thresholds that are certified for this level, as in 0.99"
    )
    exits.add_argument("--exit-layers", type=int, nargs="+", metavar="N", help="exits to evaluate; default: all")
    exits.add_argument("--exit-score", choices=EXIT_SCORES, help="early_exit: what thresholds are compared with")
    exits.add_argument("--draft-source", choices=("exit", "ngram", "both"), help="self_speculative: what drafts")
    exits.add_argument("--draft-exit", type=int, metavar="N", help="self_speculative: exit that drafts")
    exits.add_argument("--draft-length", type=int, metavar="N", help="self_speculative: tokens to draft at once")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON document a line for each answer")
    output.add_argument("--print-max-prob", action="store_true", help="what evaluated exits predict (--api megatron)")
    output.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="colour text by exit")
    add_verbose_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the client. Returns the exit status: 1 if a request was refused, 2 if there is no server to ask."""
    args = build_parser().parse_args(argv)
    try:
        _check(args)
        prompts = [*args.prompts, *_prompts_of_file(args.prompt_file)]
        client = Client(args.url, args.api_key, args.wait, args.busy, args.timeout)
        session = (_MegatronSession if args.api == "megatron" else _OpenAISession)(args, client)
        all_answered = True
        for prompt in prompts or _typed_lines():
            try:
                session.ask(prompt)
            except RequestFailed as error:
                print(f"{PROGRAM}: {error}", file=sys.stderr, flush=True)
                all_answered = False
        return 0 if all_answered else 1
    except (ServerUnavailable, ValueError) as error:
        print(f"{PROGRAM}: {in_words(error)}", file=sys.stderr, flush=True)
        return 2


def _check(args: argparse.Namespace) -> None:
    if args.certified is not None and args.early_exit_thres is not None:
        raise ValueError("--certified and --early-exit-thres both say from when on exits are taken; give one")
    if args.certified is not None and args.mode not in (None, "early_exit"):
        raise ValueError(f"--certified has no effect with --mode {args.mode}; leave one out")
    of_openai = {
        "--chat": args.chat or None, "--exit-score": args.exit_score, "--draft-source": args.draft_source,
        "--draft-exit": args.draft_exit, "--draft-length": args.draft_length,
    }  # fmt: skip
    if args.api == "megatron":
        useless = [flag for flag, value in of_openai.items() if value is not None]
        if args.mode == "self_speculative":
            useless.append("--mode self_speculative")
        if useless:
            raise ValueError(f"{', '.join(useless)}: /api has no such thing; leave out --api megatron")
        if args.early_exit_thres is not None and len(args.early_exit_thres) > 1:
            raise ValueError("--early-exit-thres: /api takes one for all exits; leave out --api megatron")
    elif args.print_max_prob:
        raise ValueError("--print-max-prob needs --api megatron")


def _prompts_of_file(path: Path | None) -> list[str]:
    """Lines, or the fields `text` of JSON lines. Raises ValueError."""
    lines = prompts_of_file(path)
    return [_text_field(line, path) for line in lines] if path is not None and path.suffix == ".jsonl" else lines


def _text_field(line: str, path: Path) -> str:
    try:
        return json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--prompt-file {path}: {line[:40]!r} is no JSON object with the field text") from error


def _typed_lines() -> Iterator[str]:
    try:
        while True:
            line = input("prompt> ") if sys.stdin.isatty() else input()
            if line.strip():
                yield line
    except EOFError:
        return


class _OpenAISession:
    """Answers as they come, from the OpenAI API."""

    def __init__(self, args: argparse.Namespace, client: Client) -> None:
        self._args, self._client = args, client
        self._in_colour = report.in_colour(args.color)
        self._num_layers: int | None = None
        self._messages: list[dict[str, str]] = []

    def ask(self, prompt: str) -> None:
        """Show the answer. Raises as `Client`."""
        turn = [*self._messages, {"role": "user", "content": prompt}]
        path = "/v1/chat/completions" if self._args.chat else "/v1/completions"
        body = {**self._settings(), **({"messages": turn} if self._args.chat else {"prompt": prompt})}
        text = self._as_json(path, body, prompt) if self._args.json else self._live(path, body, prompt)
        if self._args.chat:
            self._messages = [*turn, {"role": "assistant", "content": text}]

    def _settings(self) -> dict[str, Any]:
        args = self._args
        exits = {
            "mode": args.mode or _implied_mode(args), "exit_thresholds": _thresholds(args),
            "exit_layers": args.exit_layers, "exit_score": args.exit_score, "draft_source": args.draft_source,
            "draft_exit": args.draft_exit, "draft_length": args.draft_length,
        }  # fmt: skip
        return {
            **_length(args, "max_tokens"), "temperature": args.temperature, "top_k": args.top_k,
            "top_p": args.top_p or 1.0, "seed": args.seed, "stop": args.stop or None, "return_exit_details": True,
            **{name: value for name, value in exits.items() if value is not None},
        }  # fmt: skip

    def _as_json(self, path: str, body: dict[str, Any], prompt: str) -> str:
        document = self._client.send("POST", path, body)
        choice = document["choices"][0]
        print(json.dumps({"prompt": prompt, **choice, "usage": document["usage"]}, ensure_ascii=False), flush=True)
        return _text_of(choice)

    def _live(self, path: str, body: dict[str, Any], prompt: str) -> str:
        if self._num_layers is None:
            self._num_layers = self._client.get("/v1/models")["data"][0]["num_layers"]
        before = "" if self._args.chat else prompt
        pieces, tokens, usage, finish_reason = [], [], None, None
        for chunk in self._client.stream(path, {**body, "stream_options": {"include_usage": True}}):
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                finish_reason = choice["finish_reason"] or finish_reason
                details = choice.get("exit_details") or []
                new = [_token(one) for one in details], [one["text"] for one in details]
                tokens += new[0]
                pieces += new[1]
                shown = report.coloured_text(new[1], new[0], self._num_layers) if self._in_colour else "".join(new[1])
                print(before + shown, end="", flush=True)
                before = ""
        print("\n")
        if not self._in_colour:
            print(report.marked(pieces, tokens) + "\n")
        print(_usage_table(usage, finish_reason) + "\n", flush=True)
        return "".join(pieces)


class _MegatronSession:
    """Whole answers, from PUT /api."""

    def __init__(self, args: argparse.Namespace, client: Client) -> None:
        self._args, self._client = args, client

    def ask(self, prompt: str) -> None:
        """Show the answer. Raises as `Client`."""
        answer = self._client.send("PUT", "/api", self._body(prompt))
        if self._args.json:
            print(json.dumps({"prompt": prompt, **answer}, ensure_ascii=False), flush=True)
            return
        print(answer["text"][0] + "\n")
        rows = [("token", "exit", "log-prob")]
        exits, log_probs = answer["exit_layers"][0], answer["logprobs"][0]
        for segment, exit_layer, log_prob in zip(answer["segments"][0], exits, log_probs, strict=True):
            rows.append((repr(segment), str(exit_layer), f"{log_prob:.3f}"))
        if self._args.print_max_prob:
            heads = [_predictions(one) for one in answer["predictions"][0]]
            rows = [(*row, more) for row, more in zip(rows, ["predictions of the heads", *heads], strict=True)]
        print(report.aligned(rows) + f"\n\n{answer['request_time']:.2f} s; stopped by {answer['finish_reasons'][0]}\n")

    def _body(self, prompt: str) -> dict[str, Any]:
        args = self._args
        mode = args.mode or _implied_mode(args)
        body = {
            "prompts": [prompt], **_length(args, "tokens_to_generate"), "temperature": args.temperature,
            "top_k": args.top_k, "top_p": args.top_p, "random_seed": args.seed, "logprobs": True,
            "print_max_prob": args.print_max_prob, "exit_layers": args.exit_layers or [], "stop_sequences": args.stop,
        }  # fmt: skip
        if mode is not None:
            body["use_early_exit"] = mode == "early_exit"
        if args.certified is not None:
            body["early_exit_thres"] = _thresholds(args)
        elif args.early_exit_thres is not None:
            body["early_exit_thres"] = args.early_exit_thres[0]
        return body


def _thresholds(args: argparse.Namespace) -> list[float] | str | None:
    return args.early_exit_thres if args.certified is None else f"certified:{args.certified:g}"


def _length(args: argparse.Namespace, field: str) -> dict[str, int]:
    """Without it the server takes what was certified."""
    if args.tokens_to_generate is None and args.certified is not None:
        return {}
    return {field: 64 if args.tokens_to_generate is None else args.tokens_to_generate}


def _implied_mode(args: argparse.Namespace) -> str | None:
    leaving = (args.early_exit_thres, args.certified, args.exit_layers, args.exit_score)
    if any(one is not None for one in leaving):
        return "early_exit"
    drafts = (args.draft_source, args.draft_exit, args.draft_length)
    return "self_speculative" if any(one is not None for one in drafts) else None


def _text_of(choice: dict[str, Any]) -> str:
    return choice["message"]["content"] if "message" in choice else choice["text"]


def _token(detail: dict[str, Any]) -> GeneratedToken:
    return GeneratedToken(
        detail["token_id"], detail["exit_layer"], detail["is_final"], detail["confidence"], log_prob=float("nan"),
        is_draft=detail["is_draft"],
    )  # fmt: skip


def _predictions(heads: list[dict[str, Any]]) -> str:
    name = lambda layer: "final" if layer is None else layer
    return "  ".join(f"{name(head['exit_layer'])}: {head['token']!r} {head['prob']:.3f}" for head in heads)


def _usage_table(usage: dict[str, Any], finish_reason: str | None) -> str:
    exits = usage["early_exit"]
    total = max(usage["completion_tokens"], 1)
    rows = [("exit", "tokens", "share")]
    rows += [(name, str(count), f"{count / total:.1%}") for name, count in exits["tokens_by_exit"].items()]
    drafted = f"; drafted {exits['drafted']}, accepted {exits['accepted']}" if exits["drafted"] else ""
    promise = f", certified {exits['certified']:g}" if exits["certified"] else ""
    saved = f"{exits['mode']}{promise}: {exits['runs_saved']:.1%} of the layer runs saved{drafted}"
    return f"{report.aligned(rows)}\n{saved}; {usage['completion_tokens']} tokens; stopped by {finish_reason}"
