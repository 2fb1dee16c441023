"""What `tools/generate.py` shows, and the flags that it refuses before anything is loaded."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron.early_exit.config.data import DataConfig
from megatron.early_exit.data.tokenizer import build_tokenizer
from megatron.early_exit.evaluation import command_line as evaluation
from megatron.early_exit.inference import report
from megatron.early_exit.inference.answer_display import AnswerDisplay, _print_json
from megatron.early_exit.inference.command_line import main
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.prompt_input import prompts_of_file, typed_prompts
from megatron.early_exit.inference.results import GeneratedToken, HeadPrediction, PromptToken, RequestResult, Statistics
from megatron.early_exit.inference.text import pieces
from megatron.early_exit.inference.text_engine import OutputDelta, RequestOutput
from megatron.early_exit.platform.world import check_num_ranks, check_world_size

BYTES = build_tokenizer(DataConfig(tokenizer_type="ByteLevelTokenizer"))


def token(token_id: int, exit_layer: int | None = None, confidence: float = 0.5) -> GeneratedToken:
    predictions = (HeadPrediction(exit_layer, token_id, confidence),)
    return GeneratedToken(token_id, exit_layer or 4, exit_layer is None, confidence, -0.7, predictions)


TOKENS = (token(ord("a"), 2, 0.9), token(ord("b")), token(ord("c"), 2, 0.7), token(BYTES.eod))
STATISTICS = Statistics(
    layer_passes=14, full_layer_passes=16, layer_runs=12, drafted=8, accepted=2, queue_seconds=0.0,
    first_token_seconds=0.1, decode_seconds=2.0,
)  # fmt: skip
RESULT = RequestResult(0, TOKENS, "eod", STATISTICS, (2,), 4, prompt=(PromptToken(112, None),))
PIECES = pieces(BYTES, [112], [t.token for t in TOKENS])
OUTPUT = RequestOutput(0, [112], pieces=PIECES, tokens=list(TOKENS), result=RESULT)


def test_table_has_the_numbers():
    lines = report.usage_table(OUTPUT).splitlines()
    assert lines[1].split() == ["2", "2", "50.0%", "0.800"]
    assert lines[2].split() == ["final", "2", "50.0%", "0.500"]
    assert lines[3] == "drafted 8 tokens, accepted 25.0%"
    assert lines[4].startswith("layer runs saved: 25.0% of 16,") and lines[4].endswith("saved: 12.5%")
    assert lines[5] == "4 tokens, the first after 0.10 s, the others in 2.00 s (1.5 tokens/s); stopped by eod"


def test_with_stages_the_table_says_what_tokens_waited_for():
    """Every row passes every stage in the end, so nothing is said to be saved."""
    lines = report.usage_table(OUTPUT, num_stages=2).splitlines()
    assert lines[4] == "layers that no token waited for: 25.0% of 16"


def test_nothing_is_said_to_be_saved_where_no_exit_was_enabled():
    full = replace(OUTPUT, result=replace(RESULT, exit_layers=()))
    assert "saved" in report.usage_table(OUTPUT)
    assert "saved" not in report.usage_table(full)


def test_text_by_exit():
    assert report.marked(OUTPUT.pieces, TOKENS) == "'a'@2 'b'@final 'c'@2 ''@final"
    assert report.coloured("b", TOKENS[1], 4) == "b"
    shallow, deep = (report.coloured("x", token(1, layer), 4) for layer in (1, 4))
    assert shallow != deep
    assert shallow.startswith("\033[38;5;") and shallow.endswith("x\033[0m")


def test_coloured_text_is_the_text():
    coloured = report.coloured_text(["a", "", "c"], TOKENS[:3], 4)
    assert coloured != "ac" and re.sub("\033[^m]*m", "", coloured) == "ac"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_json_of_a_prompt_that_is_no_text_is_json(encoding, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", output)
    _print_json("\u4e16 \udce9", RequestOutput(None, [], error="no text"))
    assert json.loads(output.buffer.getvalue())["prompt"] == "\u4e16 \ufffd"


def test_json_survives_a_round_trip():
    document = json.loads(json.dumps(report.as_json("p", OUTPUT)))
    assert document["text"] == "abc"
    assert document["tokens"][0]["exit_layer"] == 2
    assert document["exits"][0] == {
        "exit_layer": 2, "is_final": False, "tokens": 2, "mean_confidence": 0.8, "share": 0.5,
    }  # fmt: skip
    assert (document["layers_saved"], document["acceptance"]) == (0.125, 0.25)
    refused = report.as_json("p", RequestOutput(None, [], error="too long"))
    assert (refused["error"], refused["finish_reason"]) == ("too long", "error")


def test_where_the_full_model_would_run_nothing_nothing_is_saved() -> None:
    nothing = Statistics(0, 0, 0, 0, 0, queue_seconds=0.0, first_token_seconds=0.1, decode_seconds=0.0)
    assert (nothing.layers_saved, nothing.runs_saved) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--early-exit-thres", "0.5"], "--early-exit-thres has no effect without --mode early_exit"),
        (["--exit-layers", "2"], "--exit-layers has no effect without --mode early_exit"),
        (["--max-deferred", "2"], "--max-deferred has no effect without --mode early_exit"),
        (["--draft-exit", "2", "--use-early-exit"], "--draft-exit has no effect without --mode self_speculative"),
        (["--draft-length", "2"], "--draft-length has no effect without --mode self_speculative"),
        (["--draft-source", "ngram"], "--draft-source has no effect without --mode self_speculative"),
        (["--draft-min-confidence", "0.5"], "--draft-min-confidence has no effect without --mode self_speculative"),
        (
            ["--mode", "self_speculative", "--draft-source", "ngram", "--draft-exit", "2"],
            "draft_exit is 2, but with draft_source 'ngram' no exit drafts",
        ),
        (["--speculation", "auto"], "--speculation has no effect without --mode self_speculative"),
        (["--mode", "full", "--use-early-exit"], "--use-early-exit contradicts --mode full"),
        (["--use-early-exit", "--early-exit-thres", "1.5"], "threshold is 1.5"),
        (["--mode", "self_speculative", "--draft-length", "0"], "draft_length is 0"),
        (["--prompt-file", "missing.txt"], "--prompt-file missing.txt cannot be read: No such file or directory"),
        (["--prompt-file", "."], "--prompt-file . cannot be read: Is a directory"),
        (["--chat"], "--chat reads from standard input"),
        (["--samples", "2"], "greedy answers are all equal"),
        (["--stop", ""], "a stop string is empty"),
        (["--stop", "x"] * 17, "stop has 17 strings; give at most 16"),
        (["--stop", "x" * 257], "has 257 characters; it may have 256"),
        (["--temperature", "1", "--samples", "129"], "n is 129; it must lie between 1 and 128"),
        (["--seed", str(2**63)], "seed is 9223372036854775808"),
        (["--seed", str(-(2**63) - 1)], "seed is -9223372036854775809"),
        (["--top-p", "1.5"], "top_p is 1.5"),
        (["--top-p", "0.9", "--top-p-decay", "2"], "top_p_decay is 2"),
        (["--min-p", "2"], "min_p is 2.0; it must lie between 0 (off) and 1"),
        (["--repetition-penalty", "0"], "repetition_penalty is 0"),
        (["--logit-bias", "5:1", "7:200"], "logit_bias of token 7 is 200.0; it must lie between -100 and 100"),
        (["--logit-bias", "5:-1.5", "5:2"], "logit_bias has token 5 twice"),
        (["--min-tokens", "65"], "min_tokens is 65; it must lie between 0 and max_tokens (64)"),
        (["--tokens-to-generate", "0"], "max_tokens is 0"),
        (["--worker-timeout", "0"], "worker_timeout is 0"),
        (["--max-requests", "0"], "max_requests is 0"),
        (["--max-length", "0"], "max_length is 0"),
        (["--tensor-model-parallel-size", "0"], "--tensor-model-parallel-size is 0; it must be at least 1"),
        (["--pipeline-model-parallel-size", "-1"], "--pipeline-model-parallel-size is -1; it must be at least 1"),
        (["--pipeline-model-parallel-size", "2", "--fill-min-rows", "0"], "fill_min_rows is 0; it must be at least 1"),
        (["--fill-min-rows", "2"], "fill_min_rows has no effect on one stage"),
        (["--chat", "--no-special-tokens"], "--no-special-tokens has no effect with --chat"),
    ],
)
def test_flags_are_checked_before_loading(flags, message, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["--load", "nowhere", "--prompt", "x", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_bias_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--load", "nowhere", "--prompt", "x", "--logit-bias", "5=3"])
    assert "'5=3' is no ID:BIAS, as in 5:-100" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--top-k", "5"], ["--top-p", "0.9"], ["--seed", str(-(2**63))]])
def test_temperature_0_is_greedy_with_all_settings(flags, capsys):
    assert main(["--load", "nowhere", "--prompt", "x", "--temperature", "0", *flags]) == 2
    message = capsys.readouterr().err
    assert "nowhere" in message and "temperature" not in message  # only the model is missing


@pytest.mark.parametrize("program", ["generate", "calibrate", "sweep"])
def test_programs_do_not_wait_for_the_ranks_of_another_job(program, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    programs = {
        "generate": (main, ["--prompt", "x"]),
        "calibrate": (evaluation.main, ["calibrate", "--data-path", "x"]),
        "sweep": (evaluation.main, ["sweep", "--data-path", "x"]),
    }
    run, words = programs[program]
    assert run([*words, "--load", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert "but 2 processes were started (WORLD_SIZE)" in error and "env -u RANK -u WORLD_SIZE" in error
    assert ("set --tensor-model-parallel-size to 2" in error) == (program == "generate")


def test_the_number_of_processes(monkeypatch):
    for started in ("1", "4"):
        monkeypatch.setenv("WORLD_SIZE", started)
        check_world_size(4, "tp")
    with pytest.raises(ValueError, match="^one process does all the work .* start one, without torchrun. Where RANK"):
        check_world_size()
    with pytest.raises(ValueError, match="^tp is 2 but 4 .* own workers, or set tp to 4, or start 2 with torchrun"):
        check_world_size(2, "tp")
    check_num_ranks({"tp": 2, "pp": 2})
    for sizes, message in (
        ({"tp": 3, "pp": 2}, "^tp x pp is 6 but 4 .* set tp x pp to 4, or start 6 with torchrun --nproc-per-node 6"),
        ({"tp": 1, "pp": 2}, "^pp is 2 but 4 processes"),
        ({"tp": 1, "pp": 1}, "^tp is 1 but 4 processes"),
        ({"tp": -2, "pp": -2}, "^tp is -2; it must be at least 1$"),
    ):
        with pytest.raises(ValueError, match=message):
            check_num_ranks(sizes)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ValueError, match="WORLD_SIZE is 'many'"):
        check_world_size()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json", "model.safetensors"], "from-hf --input"),
        (["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"], "from-hf --input"),
        (["model.gguf"], "from-hf --input"),
        (["latest_checkpointed_iteration.txt", "iter_0000002/mp_rank_00/model_optim_rng.pt"], "from-megatron --load"),
        (["mp_rank_00_001/model_optim_rng.pt"], "of EE-LLM: from-legacy"),
        (["latest_checkpointed_iteration.txt", "iter_0000002/.metadata"], "from-megatron --load"),
        (["release/.metadata", "release/common.pt"], "from-megatron --load"),
        ([".metadata", "run_config.yaml"], "from-megatron --load"),  # as Megatron-Bridge writes it
        (["model.yaml", ".metadata"], "give the folder above it"),
        (["config.json"], "no finished checkpoint in"),
        (["iter_0000002.partial/.metadata"], "no finished checkpoint in"),
    ],
)
def test_models_of_another_format_are_named(files, message, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name in files:
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text("")
    assert main(["--load", str(tmp_path / "model"), "--prompt", "x"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good\ngr\xfcn\n", "prompts.txt:2: not UTF-8 text"),
        (b"", "holds no prompt: all lines are empty"),
        (b"\xef\xbb\xbf\r\n \n", "holds no prompt: all lines are empty"),
    ],
)
def test_prompt_files_are_read_before_loading(content, message, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (tmp_path / "prompts.txt").write_bytes(content)
    assert main(["--load", "nowhere", "--prompt-file", str(tmp_path / "prompts.txt")]) == 2
    assert message in capsys.readouterr().err


def test_prompts_from_files_pipes_and_standard_input_are_lines_of_text(tmp_path, monkeypatch):
    content = "\ufeffone \u2028 prompt \x0c in all\r\n\n \nlast".encode()
    (tmp_path / "prompts.txt").write_bytes(content)
    assert prompts_of_file(tmp_path / "prompts.txt") == ["one \u2028 prompt \x0c in all", "last"]
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    assert prompts_of_file(f"/dev/fd/{reading}") == ["one \u2028 prompt \x0c in all", "last"]
    os.close(reading)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content + b"\ngr\xfcn\n")))
    # What is not UTF-8 comes as in arguments, and is refused by the tokenizer, alone.
    assert list(typed_prompts()) == ["one \u2028 prompt \x0c in all", "last", "gr\udcfcn"]


class ScriptedLLM:
    """Gives its answers token by token; at the tokens named in `interrupts`, Ctrl-C is pressed."""

    def __init__(self, answers: Sequence[str], interrupts: Sequence[tuple[int, int]]) -> None:
        self.engine = SimpleNamespace(failure=None, description=SimpleNamespace(num_layers=4, num_stages=1))
        self.tokenizer = SimpleNamespace(chat=lambda turn: self.turns.append(turn) or [0])
        self.turns: list[list[dict[str, str]]] = []
        self._answers, self._interrupts = list(answers), interrupts
        self.num_closed = 0

    def stream(self, prompt: list[int], params: GenerationParams) -> Iterator[OutputDelta]:
        number = len(self.turns) - 1
        output = RequestOutput(number, prompt)
        try:
            for index, piece in enumerate(self._answers[number]):
                if (number, index) in self._interrupts:
                    signal.raise_signal(signal.SIGINT)
                output.tokens.append(token(ord(piece)))
                output.pieces.append(piece)
                is_last = index + 1 == len(self._answers[number])
                output.result = replace(RESULT, tokens=tuple(output.tokens)) if is_last else None
                yield OutputDelta(output, (piece,), (output.tokens[-1],), is_last)
        finally:
            self.num_closed += 1


def converse(llm: ScriptedLLM, typed: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    lines = list(typed)

    def read(_: str) -> str:
        if not lines:
            raise EOFError
        return lines.pop(0)

    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", read)
    display = AnswerDisplay(llm, GenerationParams(), "never", chat=True, as_json=False, predictions=False)
    return display.converse()


def test_an_interrupt_stops_the_answer_and_the_chat_goes_on(monkeypatch, capsys):
    llm = ScriptedLLM(["abcd", "xyz"], interrupts=[(0, 1)])
    assert converse(llm, ["one", "", "two"], monkeypatch)
    shown = capsys.readouterr()
    assert shown.out.startswith("ab\nxyz") and shown.err == "generate.py: stopped\n" and llm.num_closed == 2
    assert llm.turns[1] == [
        {"role": "user", "content": "one"}, {"role": "assistant", "content": "ab"}, {"role": "user", "content": "two"},
    ]  # fmt: skip
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_answer_that_does_not_stop_is_interrupted(monkeypatch, capsys):
    class Hanging(ScriptedLLM):
        def stream(self, prompt: list[int], params: GenerationParams) -> Iterator[OutputDelta]:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            yield from super().stream(prompt, params)

    with pytest.raises(KeyboardInterrupt):
        converse(Hanging(["abc"], []), ["one"], monkeypatch)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_at_the_prompt_ends_the_chat(monkeypatch):
    def interrupted(_: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", interrupted)
    with pytest.raises(KeyboardInterrupt):
        AnswerDisplay(
            ScriptedLLM([], []), GenerationParams(), "never", chat=True, as_json=False, predictions=False
        ).converse()
