"""What `client_command` does with one prompt after the other: ask by either API, and show the answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from megatron.early_exit.inference import report
from megatron.early_exit.inference.results import GeneratedToken
from megatron.early_exit.platform.columns import aligned
from megatron.early_exit.server.client import Client, RequestFailed
from megatron.early_exit.server.client_flags import ClientFlags


class OpenAISession:
    """Answers as they come, from the OpenAI API."""

    def __init__(self, flags: ClientFlags, client: Client) -> None:
        self._flags, self._client = flags, client
        self._in_colour = report.in_colour(flags.color)
        self._messages: list[dict[str, str]] = []

    def ask(self, prompt: str) -> None:
        """Show the answer. Raises as `Client`."""
        turn = [*self._messages, {"role": "user", "content": prompt}]
        path = "/v1/chat/completions" if self._flags.chat else "/v1/completions"
        body = {**self._settings(), **({"messages": turn} if self._flags.chat else {"prompt": prompt})}
        text = self._as_json(path, body, prompt) if self._flags.json else self._live(path, body, prompt)
        if self._flags.chat:
            self._messages = [*turn, {"role": "assistant", "content": text}]

    @cached_property
    def _num_layers(self) -> int:
        """Of the server's model."""
        num_layers: int = self._client.get("/v1/models")["data"][0]["num_layers"]
        return num_layers

    def _settings(self) -> dict[str, Any]:
        flags = self._flags
        exits = {
            "mode": flags.mode or _implied_mode(flags), "exit_thresholds": _thresholds(flags),
            "exit_layers": flags.exit_layers, "exit_score": flags.exit_score, "draft_source": flags.draft_source,
            "draft_exit": flags.draft_exit, "draft_length": flags.draft_length,
        }  # fmt: skip
        return {
            **_length(flags, "max_tokens"), "temperature": flags.temperature, "top_k": flags.top_k,
            "top_p": flags.top_p or 1.0, "seed": flags.seed, "stop": flags.stop or None, "return_exit_details": True,
            **{name: value for name, value in exits.items() if value is not None},
        }  # fmt: skip

    def _as_json(self, path: str, body: dict[str, Any], prompt: str) -> str:
        document = self._client.send("POST", path, body)
        choice = document["choices"][0]
        print(json.dumps({"prompt": prompt, **choice, "usage": document["usage"]}, ensure_ascii=False), flush=True)
        return _text_of(choice)

    def _live(self, path: str, body: dict[str, Any], prompt: str) -> str:
        num_layers, before = self._num_layers, "" if self._flags.chat else prompt
        pieces: list[str] = []
        tokens: list[GeneratedToken] = []
        usage: dict[str, Any] | None = None
        finish_reason: str | None = None
        for chunk in self._client.stream(path, {**body, "stream_options": {"include_usage": True}}):
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                finish_reason = choice["finish_reason"] or finish_reason
                details = choice.get("exit_details") or []
                new_tokens, new_pieces = [_token(one) for one in details], [one["text"] for one in details]
                tokens += new_tokens
                pieces += new_pieces
                shown = "".join(new_pieces)
                if self._in_colour:
                    shown = report.coloured_text(new_pieces, new_tokens, num_layers)
                print(before + shown, end="", flush=True)
                before = ""
        print("\n")
        if not self._in_colour:
            print(report.marked(pieces, tokens) + "\n")
        if usage is None:
            raise RequestFailed("the server has not said what the answer took, as it was asked to")
        print(_usage_table(usage, finish_reason) + "\n", flush=True)
        return "".join(pieces)


class MegatronSession:
    """Whole answers, from PUT /api."""

    def __init__(self, flags: ClientFlags, client: Client) -> None:
        self._flags, self._client = flags, client

    def ask(self, prompt: str) -> None:
        """Show the answer. Raises as `Client`."""
        answer = self._client.send("PUT", "/api", self._body(prompt))
        if self._flags.json:
            print(json.dumps({"prompt": prompt, **answer}, ensure_ascii=False), flush=True)
            return
        print(answer["text"][0] + "\n")
        rows: list[tuple[str, ...]] = [("token", "exit", "log-prob")]
        exits, log_probs = answer["exit_layers"][0], answer["logprobs"][0]
        for segment, exit_layer, log_prob in zip(answer["segments"][0], exits, log_probs, strict=True):
            rows.append((repr(segment), str(exit_layer), f"{log_prob:.3f}"))
        if self._flags.print_max_prob:
            heads = [_predictions(one) for one in answer["predictions"][0]]
            rows = [(*row, more) for row, more in zip(rows, ["predictions of the heads", *heads], strict=True)]
        print(aligned(rows) + f"\n\n{answer['request_time']:.2f} s; stopped by {answer['finish_reasons'][0]}\n")

    def _body(self, prompt: str) -> dict[str, Any]:
        flags = self._flags
        mode = flags.mode or _implied_mode(flags)
        body: dict[str, Any] = {
            "prompts": [prompt], **_length(flags, "tokens_to_generate"), "temperature": flags.temperature,
            "top_k": flags.top_k, "top_p": flags.top_p, "random_seed": flags.seed, "logprobs": True,
            "print_max_prob": flags.print_max_prob, "exit_layers": flags.exit_layers or [],
            "stop_sequences": flags.stop,
        }  # fmt: skip
        if mode is not None:
            body["use_early_exit"] = mode == "early_exit"
        if flags.certified is not None:
            body["early_exit_thres"] = _thresholds(flags)
        elif flags.early_exit_thres is not None:
            body["early_exit_thres"] = flags.early_exit_thres[0]
        return body


def _thresholds(flags: ClientFlags) -> Sequence[float] | str | None:
    return flags.early_exit_thres if flags.certified is None else f"certified:{flags.certified:g}"


def _length(flags: ClientFlags, field: str) -> dict[str, int]:
    """Without it the server takes what was certified."""
    if flags.tokens_to_generate is None and flags.certified is not None:
        return {}
    return {field: 64 if flags.tokens_to_generate is None else flags.tokens_to_generate}


def _implied_mode(flags: ClientFlags) -> str | None:
    leaving = (flags.early_exit_thres, flags.certified, flags.exit_layers, flags.exit_score)
    if any(one is not None for one in leaving):
        return "early_exit"
    drafts = (flags.draft_source, flags.draft_exit, flags.draft_length)
    return "self_speculative" if any(one is not None for one in drafts) else None


def _text_of(choice: dict[str, Any]) -> str:
    text: str = choice["message"]["content"] if "message" in choice else choice["text"]
    return text


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
    return f"{aligned(rows)}\n{saved}; {usage['completion_tokens']} tokens; stopped by {finish_reason}"
