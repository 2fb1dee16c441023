"""Models that users bring with their tokenizers: prompts, answers and their ends are those of `transformers`."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron.early_exit.checkpoint.convert_command import main as convert
from tests.distributed.workers import run_distributed
from tests.unit.test_text_of_tokenizers import CHAT, begin, byte_pairs, save, special

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["a small model", "reads lines", "it is\n"]


def llama(folder: Path, *, with_begin: bool, chat: str | None = None) -> tuple[Any, Any]:
    """(model with random weights, tokenizer) of transformers, saved in `folder`."""
    import transformers

    backend = byte_pairs()
    if with_begin:
        begin(backend)
    backend.add_special_tokens([special("<user>"), special("<tool>"), special("<end of turn>")])
    save(backend, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if chat is not None:
        tokenizer.chat_template = chat
        tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, max_position_embeddings=128, initializer_range=0.3, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model, tokenizer


def their_answer(model: Any, ids: list[int], max_tokens: int) -> list[int]:
    output = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=max_tokens, do_sample=False
    )
    return output[0, len(ids) :].tolist()


def answers(folder: Path, prompts: list[str], **settings: Any) -> list[tuple[list[int], list[int], str, str]]:
    """(ids of the prompt, of the answer, its text, why it ended) of each prompt"""
    from megatron.early_exit.inference.llm import LLM
    from megatron.early_exit.inference.params import GenerationParams

    llm = LLM.load(str(folder))
    return [
        (one.prompt_ids, one.result.token_ids, one.text, one.finish_reason)
        for one in llm.generate(prompts, GenerationParams(**settings))
    ]


def generate_tool(words: list[str], typed: str) -> tuple[int, str]:
    """(exit status, standard output)"""
    from megatron.early_exit.inference import command_line

    with (
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode(errors="surrogateescape")))),
        contextlib.redirect_stdout(io.StringIO()) as output,
    ):
        status = command_line.main(words)
    return status, output.getvalue()


@pytest.mark.parametrize("with_begin", [True, False])
def test_text_prompts_get_the_answers_of_transformers(with_begin: bool, tmp_path: Path) -> None:
    model, tokenizer = llama(tmp_path / "hf", with_begin=with_begin)
    assert convert(["from-hf", "--input", str(tmp_path / "hf"), "--save", str(tmp_path / "ours")]) == 0
    (ours,) = run_distributed(1, answers, folder=tmp_path / "ours", prompts=PROMPTS, max_tokens=8)
    for text, (prompt_ids, token_ids, answer, _) in zip(PROMPTS, ours, strict=True):
        assert prompt_ids == tokenizer(text).input_ids
        assert token_ids == their_answer(model, prompt_ids, 8)
        assert answer == tokenizer.decode(token_ids, skip_special_tokens=True)
    (bare,) = run_distributed(
        1, answers, folder=tmp_path / "ours", prompts=PROMPTS, max_tokens=1, add_special_tokens=False
    )
    for text, (prompt_ids, *_) in zip(PROMPTS, bare, strict=True):
        assert prompt_ids == tokenizer(text, add_special_tokens=False).input_ids


def test_every_end_of_the_generation_config_ends_an_answer_and_leaves_no_text(tmp_path: Path) -> None:
    model, tokenizer = llama(tmp_path / "hf", with_begin=True, chat=CHAT)
    end = tokenizer.convert_tokens_to_ids("<end of turn>")
    chat = [{"role": "user", "content": "a small model"}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    second = their_answer(model, asked, 2)[-1]
    with torch.no_grad():  # the end of the turn comes where another token came second
        model.lm_head.weight[[end, second]] = model.lm_head.weight[[second, end]]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    model.save_pretrained(tmp_path / "hf")
    theirs = their_answer(model, asked, 20)
    assert len(theirs) == 2 and theirs[-1] == end
    text = tokenizer.decode(theirs, skip_special_tokens=True)
    chat += [{"role": "assistant", "content": text}, {"role": "user", "content": "reads lines"}]
    next_asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    next_text = tokenizer.decode(their_answer(model, next_asked, 20), skip_special_tokens=True)

    assert convert(["from-hf", "--input", str(tmp_path / "hf"), "--save", str(tmp_path / "ours")]) == 0
    words = ["--load", str(tmp_path / "ours"), "--chat", "--tokens-to-generate", "20"]
    typed = "a small model\nreads lines\n"
    ((status, output),) = run_distributed(1, generate_tool, words=[*words, "--json"], typed=typed)
    first, following = map(json.loads, output.splitlines())
    assert (status, first["prompt"], following["prompt"]) == (0, "a small model", "reads lines")
    assert [token["token"] for token in first["tokens"]] == theirs
    assert (first["text"], first["finish_reason"], following["text"]) == (text, "eod", next_text)
    ((status, output),) = run_distributed(1, generate_tool, words=words, typed=typed)
    assert status == 0 and output.startswith(text + "\n\n") and "<end of turn>" not in output


def test_prompts_that_cannot_be_read_are_refused_one_by_one(tmp_path: Path) -> None:
    llama(tmp_path / "hf", with_begin=True, chat="{{ raise_exception('no thanks') }}")
    assert convert(["from-hf", "--input", str(tmp_path / "hf"), "--save", str(tmp_path / "ours")]) == 0
    words = ["--load", str(tmp_path / "ours"), "--tokens-to-generate", "2", "--json"]
    typed = "the\udce9\na small\n"
    for source in ([], ["--prompt", "the\udce9", "--prompt", "a small"]):
        ((status, output),) = run_distributed(1, generate_tool, words=[*words, *source], typed=typed)
        documents = [json.loads(line) for line in output.splitlines()]
        assert status == 1
        assert [len(one.get("tokens", [])) for one in documents if one["prompt"] == "a small"] == [2]
    ((status, output),) = run_distributed(1, generate_tool, words=[*words, "--chat"], typed=typed)
    assert (status, output) == (1, "")


def test_generating_that_ends_before_its_time(tmp_path: Path) -> None:
    llama(tmp_path / "hf", with_begin=True)
    assert convert(["from-hf", "--input", str(tmp_path / "hf"), "--save", str(tmp_path / "ours")]) == 0
    command = [sys.executable, "tools/generate.py", "--load", str(tmp_path / "ours"), "--tokens-to-generate", "100"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = functools.partial(
        subprocess.Popen, cwd=ROOT, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process = start(command)
    process.stdin.write("a small model\n")
    process.stdin.flush()
    assert process.stdout.readline().startswith("a small model")
    process.send_signal(signal.SIGINT)  # while it waits for the next prompt, or still answers
    _, errors = process.communicate(timeout=60)
    sizes, _, others = errors.partition("\n")
    assert "keys and values: " in sizes
    assert (process.returncode, others) == (130, "interrupted\n")

    process = start([*command, "--prompt", "a", "--prompt", "reads", "--prompt", "lines"])
    assert process.stdout.readline().startswith("a")
    process.stdout.close()  # as `| head -1` does
    errors = process.stderr.read()
    assert (process.wait(timeout=60), errors.partition("\n")[2]) == (141, "")
