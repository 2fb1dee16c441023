"""Where the prompts of evaluations come from: drawn at random, none twice, damaged ones named."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import pytest
import transformers

from megatron.early_exit.config.data import TokenizerConfig
from megatron.early_exit.data.tokenizer import Tokenizer, build_tokenizer
from megatron.early_exit.evaluation.prompt_flags import add_prompt_flags, load_prompts
from megatron.early_exit.evaluation.prompts import PromptSet
from megatron.early_exit.inference.protocol import WorkerDescription
from tests.data_files import write_documents
from tests.unit.test_text_of_tokenizers import begin, byte_pairs, save, special

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
BYTES = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer"))


def prompts(
    *words: object,
    tokenizer: Tokenizer = BYTES,
    num_positions: int = 64,
    room: int = 8,
    default_prompts: int = 5,
    least: int = 1,
) -> PromptSet:
    parser = argparse.ArgumentParser()
    add_prompt_flags(parser, default_prompts, default_length=4)
    args = parser.parse_args([str(word) for word in words])
    model = WorkerDescription(4, 8, tokenizer.vocab_size, (), num_slots=2, num_positions=num_positions)
    return load_prompts(args, tokenizer, model, room, least)


def lines(path: Path, *values: object) -> Path:
    path.write_text("\n".join(value if isinstance(value, str) else json.dumps(value) for value in values) + "\n")
    return path


@pytest.fixture
def text(tmp_path: Path) -> str:
    return write_documents(tmp_path / "text", [[i, *range(i, i + i % 8)] for i in range(100)])


def test_beginnings_of_documents(text: str) -> None:
    drawn = prompts("--data-path", text, "--prompts", 50)
    starts = [prompt.ids[0] for prompt in drawn.prompts]
    assert len(set(starts)) == 50 and starts != sorted(starts)
    for prompt in drawn.prompts:
        (first, *others) = prompt.ids
        assert others == [first, first + 1, first + 2] and prompt.name == f"{text}:{first}" and prompt.domain is None
    assert drawn.template_digest is None
    assert drawn.data == {
        f"{text}.{suffix}": hashlib.sha256(Path(f"{text}.{suffix}").read_bytes()).hexdigest()
        for suffix in ("bin", "idx")
    }
    assert prompts("--data-path", text, "--prompts", 50) == drawn
    other = prompts("--data-path", text, "--prompts", 50, "--seed", 2)
    assert other.digest != drawn.digest and [prompt.ids[0] for prompt in other.prompts] != starts


def test_all_documents_are_as_probable(text: str) -> None:
    counts = [0] * 100
    for seed in range(300):
        for prompt in prompts("--data-path", text, "--prompt-length", 1, "--seed", seed, "--prompts", 10).prompts:
            counts[prompt.ids[0]] += 1
    assert min(counts) >= 12 and max(counts) <= 52  # 30 is expected, with a standard deviation of 5.2


def test_several_files_are_domains(text: str, tmp_path: Path) -> None:
    other = write_documents(tmp_path / "other", [[200 + i] * 9 for i in range(40)])
    drawn = prompts("--data-path", text, other, "--prompts", 80)
    assert drawn.domains == ("other", "text")
    assert all((prompt.domain == "other") == (prompt.ids[0] >= 200) for prompt in drawn.prompts)
    assert len(drawn.data) == 4


def test_no_prompt_comes_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    same = write_documents(tmp_path / "same", [[1, 2, 3, 4, 5 + i] for i in range(9)] + [[7, 7, 7, 7]])
    drawn = prompts("--data-path", same)
    assert sorted(prompt.ids for prompt in drawn.prompts) == [(1, 2, 3, 4), (7, 7, 7, 7)]
    assert "8 prompts have the same ids as others and were left out" in caplog.text


def test_lines_of_text_and_of_json(tmp_path: Path) -> None:
    plain = prompts("--prompts-file", lines(tmp_path / "plain.txt", "ab", "", "cd"))
    assert sorted(prompt.ids for prompt in plain.prompts) == [(97, 98), (99, 100)]
    values = [{"prompt": "ab", "domain": "letters"}, {"ids": [99, 100], "domain": None}]
    for name in ("a.jsonl", "b.txt"):  # of JSON by its name, or by how it begins
        parsed = prompts("--prompts-file", lines(tmp_path / name, *values))
        assert parsed.domains == ("letters",)
        assert {prompt.ids: prompt.domain for prompt in parsed.prompts} == {(97, 98): "letters", (99, 100): None}
    assert {prompt.name for prompt in parsed.prompts} == {f"{tmp_path}/b.txt:1", f"{tmp_path}/b.txt:2"}


@pytest.mark.parametrize("start", ["\ufeff", " ", ""], ids=["mark", "space", "plain"])
def test_json_whatever_stands_before_it(tmp_path: Path, start: str) -> None:
    path = lines(tmp_path / "a.txt", start + '{ "prompt": "ab" }', '{"prompt": "cd"}')
    assert sorted(prompt.ids for prompt in prompts("--prompts-file", path).prompts) == [(97, 98), (99, 100)]


def test_chats(tmp_path: Path) -> None:
    backend = byte_pairs()
    begin(backend)
    backend.add_special_tokens([special("<user>"), special("<assistant>")])
    save(backend, tmp_path / "hf", chat_template=TEMPLATE)
    data = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "hf"))
    tokenizer = build_tokenizer(data)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "hf"))
    messages = [{"role": "user", "content": "the cat"}]
    path = lines(tmp_path / "chats.jsonl", {"messages": messages})
    drawn = prompts("--prompts-file", path, tokenizer=tokenizer)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert drawn.prompts[0].ids == tuple(expected)
    assert drawn.template_digest == hashlib.sha256(TEMPLATE.encode()).hexdigest()
    template = lines(tmp_path / "template", "{{ messages[0]['content'] }}")
    other = prompts("--prompts-file", path, "--chat-template", template, tokenizer=tokenizer)
    assert other.prompts[0].ids == tuple(theirs.encode("the cat", add_special_tokens=False))
    assert other.template_digest == hashlib.sha256(template.read_bytes()).hexdigest()


@pytest.mark.parametrize(("words", "message"), [
    ([], "has 61 different beginnings of 4 tokens"),
    (["--prompts", "0"], "--prompts is 0"),
    (["--seed", "-1"], "--seed is -1"),
    (["--prompt-length", "58"], "--prompt-length is 58; with an answer of 8 tokens the model takes 1 to 57"),
    (["--prompt-length", "20", "--prompts", "1"], "has 0 different beginnings of 20 tokens"),
    (["--chat-template", "x"], "--chat-template has no effect without --prompts-file"),
])  # fmt: skip
def test_wrong_flags(text: str, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompts("--data-path", text, "--prompts", "62", *words)


def test_more_prompts_than_asked_for(text: str) -> None:
    assert len(prompts("--data-path", text, "--prompts", 3, least=7).prompts) == 7
    assert len(prompts("--data-path", text, least=7, default_prompts=5).prompts) == 7
    with pytest.raises(ValueError, match="62 prompts are needed"):
        prompts("--data-path", text, least=62)


def test_no_room(text: str) -> None:
    with pytest.raises(ValueError, match="answers of 65 tokens leave no room for a prompt: the model takes 64"):
        prompts("--data-path", text, room=65, num_positions=64)


@pytest.mark.parametrize(("values", "message"), [
    ([{"prompt": "a"}, "{"], "file.jsonl:2: bad JSON"),
    ([{"prompt": "a"}, {"text": "b"}], "file.jsonl:2: give an object with one of prompt, messages, ids"),
    ([{"prompt": "a", "ids": [1]}], "file.jsonl:1: give an object with one of"),
    ([{"prompt": 3}], "file.jsonl:1: prompt must be a text"),
    ([{"ids": [1, 2.5]}], "file.jsonl:1: ids must be a list of integers"),
    ([{"ids": [1, 300]}], "file.jsonl:1 has the id 300, but the ids of this model's tokenizer are 0 to 256"),
    ([{"prompt": ""}], "file.jsonl:1: the prompt is empty"),
    ([{"messages": [{"role": "user"}]}], "file.jsonl:1: messages must be a list of"),
    ([{"prompt": "a", "domain": 3}], "file.jsonl:1: domain must be a text"),
    ([{"prompt": "a"}, {"messages": [{"role": "user", "content": "b"}]}], "file.jsonl:2 is a chat and .*:1 is none"),
    ([{"messages": [{"role": "user", "content": "b"}]}], "has no chat template; give --chat-template"),
    ([{"prompt": "a" * 58}, {"prompt": "b"}], "1 of 2 prompts are too long with an answer of 8 tokens: .* takes 57"),
    ([""], "holds no prompt"),
])  # fmt: skip
def test_damaged_files(values: list[object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        prompts("--prompts-file", lines(tmp_path / "file.jsonl", *values))


def test_flags_that_do_not_go_with_files(tmp_path: Path) -> None:
    path = lines(tmp_path / "file.txt", "a")
    with pytest.raises(ValueError, match="--prompt-length has no effect without --data-path"):
        prompts("--prompts-file", path, "--prompt-length", 3)
    with pytest.raises(ValueError, match="--chat-template has no effect: .* holds no chats"):
        prompts("--prompts-file", path, "--chat-template", path)
    with pytest.raises(ValueError, match="2 prompts are needed, but .* has 1 different prompts"):
        prompts("--prompts-file", path, "--prompts", 2)


def test_text_of_another_tokenizer(tmp_path: Path) -> None:
    foreign = write_documents(tmp_path / "foreign", [[1, 2, 3, 4, 5, 999]])
    with pytest.raises(ValueError, match="has the token id 999, but the ids of this tokenizer are 0 to 256"):
        prompts("--data-path", foreign)
