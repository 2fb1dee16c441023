"""Conversations: the loss is on answers alone, exactly those that transformers calls the assistant's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from megatron.early_exit.config.data import DataConfig
from megatron.early_exit.data.batches import collate
from megatron.early_exit.data.conversations import marked_conversation, prompt_and_answer
from megatron.early_exit.data.datasets import build_datasets
from megatron.early_exit.data.preprocess import preprocess
from megatron.early_exit.data.preprocess_config import PreprocessConfig
from megatron.early_exit.data.tokenizer import Tokenizer, build_tokenizer
from tests.data_files import write_documents
from tests.unit.test_text_of_tokenizers import byte_pairs, save, special

# How families write chats; transformers' own tag says what is the assistant's.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<start>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<end>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<end>' }}{% endif %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
    ),
    "with a system prompt of its own": (
        "{% if messages[0]['role'] != 'system' %}{{ '<start>system\nbe small<end>\n' }}{% endif %}"
        "{% for m in messages %}{{ '<start>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<end>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<end>' }}{% endif %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
    ),
    "llama 2": (
        "{{ '<begin>' }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<end>' }}{% endgeneration %}"
        "{% else %}{{ '<user>' + m['content'] | trim + '<tool>' }}{% endif %}{% endfor %}"
    ),
    "llama 3": (
        "{% for m in messages %}{{ '<start>' + m['role'] + '<tool>\n\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] | trim + '<end>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] | trim + '<end>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start>assistant<tool>\n\n' }}{% endif %}"
    ),
    "no end": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<tool>' }}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ '<user>' + m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<tool>' }}{% endif %}"
    ),
}  # fmt: skip
CHATS = [
    [{"role": "user", "content": "a small model"}, {"role": "assistant", "content": "reads lines of text"}],
    [
        {"role": "user", "content": "reads  lines\n"}, {"role": "assistant", "content": " it is\nnot here ."},
        {"role": "user", "content": "€ and é"}, {"role": "assistant", "content": "€€\n"},
        {"role": "user", "content": "and what is last ?"},
    ],
    [{"role": "user", "content": "and"}, {"role": "assistant", "content": "<tool> of it"}],
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    backend = byte_pairs()
    backend.add_special_tokens([special(name) for name in ("<start>", "<user>", "<tool>")])
    save(backend, path, chat_template=TEMPLATES["chatml"])
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return build_tokenizer(DataConfig(tokenizer_model=str(folder)))


@pytest.mark.parametrize("chat", range(len(CHATS)))
@pytest.mark.parametrize("name", TEMPLATES)
def test_marks_are_those_of_transformers(name: str, chat: int, folder: Path, tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        CHATS[chat], chat_template=TEMPLATES[name], return_assistant_tokens_mask=True, return_dict=True
    )
    marked = marked_conversation(tokenizer, CHATS[chat], TEMPLATES[name])
    assert marked.ids == theirs["input_ids"]
    assert [mark & 1 for mark in marked.marks] == theirs["assistant_masks"]
    assert 0 < sum(theirs["assistant_masks"]) < len(marked.ids)
    assert [mark >> 1 for mark in marked.marks] == [1] + [0] * (len(marked.ids) - 1)


@pytest.mark.parametrize(("template", "chat", "said"), [
    # The answer's first character joins what stands before it.
    ("{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
     "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}", 0, "message 2 cannot be told from its prompt"),
    # Earlier answers are left out when more follows, as thoughts are.
    ("{% for m in messages %}{% if m['role'] == 'user' or loop.last %}{{ '<start>' + m['content'] + '<end>' }}"
     "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<start>' }}{% endif %}", 1,
     "message 2 cannot be told from its prompt"),
    ("{% for m in messages %}{{ m['content'] }}{% endfor %}{{ raise_exception('no') }}", 0, "template refuses"),
], ids=["joined", "left out", "refused"])  # fmt: skip
def test_templates_without_a_clear_answer_are_refused(
    template: str, chat: int, said: str, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ValueError, match=said):
        marked_conversation(tokenizer, CHATS[chat], template)


def test_preprocessing_writes_tokens_and_masks(tmp_path: Path, folder: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS * 200))
    settings = {"input": (str(path),), "data": DataConfig(tokenizer_model=str(folder)), "chat": True}
    results = [
        preprocess(PreprocessConfig(output_prefix=str(tmp_path / f"out{workers}"), workers=workers, append_eod=True,
                                    **settings))[0]
        for workers in (1, 2)
    ]  # fmt: skip
    tokens, masks = IndexedDataset(results[0].prefix), IndexedDataset(f"{results[0].prefix}.mask")
    assert len(tokens) == len(masks) == results[0].num_documents == 600
    for number in (0, 1, 2, 599):
        marked = marked_conversation(tokenizer, CHATS[number % 3], TEMPLATES["chatml"])
        assert tokens[number].tolist() == [*marked.ids, tokenizer.eod]
        assert masks[number].tolist() == [*marked.marks, 0]
    assert results[0].num_answer_tokens == sum(int((masks[number] & 1).sum()) for number in range(600))
    for name in ("bin", "idx", "mask.bin", "mask.idx"):
        files = [tmp_path / f"out{workers}_messages_document.{name}" for workers in (1, 2)]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(("line", "said"), [
    ('{"text": "a"}', "chats.jsonl:1: messages must be a list"),
    ('{"messages": [{"role": "user"}]}', "chats.jsonl:1: messages must be a list"),
    ('{"messages": [{"role": "user", "content": "a"}]}', 'chats.jsonl:1: .* needs a message of the role "assistant"'),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "chats.jsonl:1: .* behind one of another role"),
])  # fmt: skip
def test_bad_conversations_name_their_line_and_leave_nothing(
    line: str, said: str, tmp_path: Path, folder: Path
) -> None:
    (tmp_path / "chats.jsonl").write_text(line + "\n")
    data = DataConfig(tokenizer_model=str(folder))
    with pytest.raises(ValueError, match=said):
        preprocess(PreprocessConfig((str(tmp_path / "chats.jsonl"),), str(tmp_path / "out"), data, chat=True))
    assert [path.name for path in tmp_path.iterdir()] == ["chats.jsonl"]


def test_a_tokenizer_without_a_template_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHATS[0]}))
    data = DataConfig(tokenizer_type="ByteLevelTokenizer")
    with pytest.raises(ValueError, match="give --chat-template FILE"):
        preprocess(PreprocessConfig((str(tmp_path / "chats.jsonl"),), str(tmp_path / "out"), data, chat=True))
    with pytest.raises(ValueError, match="no effect without --chat"):
        PreprocessConfig(("a",), str(tmp_path / "out"), data, chat_template="a")


# What training makes of the masks


BYTES = build_tokenizer(DataConfig(tokenizer_type="ByteLevelTokenizer"))


def write_marked(prefix: Path, texts: list, dtype: type = np.uint8) -> str:
    """Texts that stand by themselves, each a document."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    write_documents(prefix, [text.ids for text in texts])
    builder = IndexedDatasetBuilder(f"{prefix}.mask.bin", dtype=dtype)
    for text in texts:
        builder.add_document(text.marks, [len(text.marks)])
    builder.finalize(f"{prefix}.mask.idx")
    return str(prefix)


def datasets(data: DataConfig, num_samples: int, seq_length: int = 8):
    return build_datasets(data, BYTES, seq_length=seq_length, seed=3, num_samples=(num_samples, 0, 0), vocab_size=257)


def brute_force(samples: list, texts: list, seq_length: int) -> int:
    """Check each sample against the text that its ids are of, which differ everywhere; returns how many answers' tokens
    were labels."""
    mark = {token: mark for text in texts for token, mark in zip(text.ids, text.marks)}
    number = {token: place for place, text in enumerate(texts) for token in text.ids}
    position = {token: place for text in texts for place, token in enumerate(text.ids)}
    count = 0
    for sample in samples:
        labels, tokens = sample.labels.tolist(), sample.tokens.tolist()
        assert sample.loss_mask.tolist() == [float(mark[label] & 1) for label in labels]
        count += int(sample.loss_mask.sum())
        for row in range(seq_length):
            allowed = [number[tokens[row]] == number[tokens[column]] and column <= row for column in range(seq_length)]
            assert (~sample.attention_mask[0, row]).tolist() == allowed
        cut = position[tokens[0]]
        expected = [position[token] - (cut if number[token] == number[tokens[0]] else 0) for token in tokens]
        assert sample.position_ids.tolist() == expected
    return count


def test_masks_reach_every_sample(tmp_path: Path) -> None:
    lengths, first, texts = [(3, 4), (2, 9), (5, 1), (1, 6), (4, 4), (2, 3), (6, 8), (3, 2)], 0, []
    for prompt, answer in lengths:
        ids = list(range(first, first + prompt + answer))
        texts.append(prompt_and_answer(ids[:prompt], ids[prompt:]))
        first += prompt + answer
    prefix = write_marked(tmp_path / "chats", texts)
    data = DataConfig(data_path=(prefix,), split="1,0,0", reset_attention_mask=True, reset_position_ids=True)
    train, _, _ = datasets(data, 7)
    assert len(train) >= 7
    assert brute_force([train[index] for index in range(7)], texts, 8) > 25
    plain, _, _ = datasets(DataConfig(data_path=(prefix,), split="1,0,0"), 7)
    assert plain[0].attention_mask is None and torch.equal(plain[0].loss_mask, train[0].loss_mask)
    assert collate([train[0], train[1]]).attention_mask.shape == (2, 1, 8, 8)


def test_a_blend_of_answers_and_plain_text(tmp_path: Path) -> None:
    answers = write_marked(tmp_path / "answers", [prompt_and_answer([1] * 4, [2] * 6)] * 20)
    text = write_documents(tmp_path / "text", [[100] * 30] * 10)
    train, _, _ = datasets(DataConfig(data_path=("0.5", answers, "0.5", text), split="1,0,0"), 20)
    kinds = {}
    for index in range(20):
        sample = train[index]
        kinds.setdefault(bool((sample.tokens == 100).all()), []).append(sample)
    assert all(sample.loss_mask.all() for sample in kinds[True])
    assert all(torch.equal(sample.loss_mask, (sample.labels == 2).float()) for sample in kinds[False])
    assert len(kinds[True]) >= 8 and len(kinds[False]) >= 8


def test_masks_of_other_tokens_are_refused(tmp_path: Path) -> None:
    prefix = write_marked(tmp_path / "chats", [prompt_and_answer([1] * 20, [2] * 6)])
    data = DataConfig(data_path=(prefix,), split="1,0,0")
    datasets(data, 2)
    write_documents(tmp_path / "chats", [[1] * 27])
    with pytest.raises(ValueError, match="is not the loss mask of"):
        datasets(data, 2)
    write_marked(tmp_path / "chats", [prompt_and_answer([1] * 20, [2] * 6)], np.int32)
    with pytest.raises(ValueError, match="one byte for each token"):
        datasets(data, 2)
    (tmp_path / "chats.mask.bin").unlink()
    with pytest.raises(ValueError, match=r"chats.mask.bin does not exist"):
        datasets(data, 2)
