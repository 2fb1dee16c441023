"""Tokenizers: ids and text go there and back, bad paths are clear errors, checkpoints carry their own copy."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from megatron.early_exit.config.data import DataConfig
from megatron.early_exit.data.tokenizer import build_tokenizer, check_ids_fit, load_tokenizer
from megatron.early_exit.data.tokenizer_comparison import check_tokenizer_of_checkpoint, tokenizer_differences
from megatron.early_exit.data.tokenizer_files import read_tokenizer_files, save_tokenizer, write_tokenizer
from megatron.early_exit.data.train_tokenizer import train_tokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog\n", "def f(x):\n    return x + 1\n"] * 20
TEXTS = ["", " the fox\n\n", "def f(y):\n\treturn y\n  ", "Grüße, 世界! \N{GRINNING FACE}", "\0\1 control"]


@pytest.fixture(scope="module")
def hugging_face_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "corpus.txt").write_text("".join(CORPUS), encoding="utf-8")
    train_tokenizer([str(folder / "corpus.txt")], folder / "bpe", 300)
    return str(folder / "bpe")


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _train_sentencepiece(tmp_path_factory.mktemp("sentencepiece") / "sp")


def _train_sentencepiece(prefix: Path, **options: int) -> str:
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(prefix),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return f"{prefix}.model"


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_tokenizer_keeps_every_text(text: str) -> None:
    tokenizer = build_tokenizer(DataConfig(tokenizer_type="ByteLevelTokenizer"))
    assert tokenizer.tokenize(text) == list(text.encode())
    assert tokenizer.detokenize([*tokenizer.tokenize(text), tokenizer.eod]) == text
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.bos) == (257, 256, None)


@pytest.mark.parametrize("text", TEXTS)
def test_hugging_face_tokenizer_keeps_every_text(hugging_face_folder: str, text: str) -> None:
    tokenizer = build_tokenizer(DataConfig(tokenizer_model=hugging_face_folder))
    ids = tokenizer.tokenize(text)
    assert tokenizer.eod not in ids
    assert tokenizer.detokenize([*ids, tokenizer.eod]) == text


def test_trained_folder_loads_in_transformers_with_the_same_ids(hugging_face_folder: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(hugging_face_folder)
    ours = build_tokenizer(DataConfig(tokenizer_model=hugging_face_folder))
    assert theirs.eos_token == "<|endoftext|>"
    assert ours.eod == theirs.eos_token_id == 0
    assert ours.vocab_size == len(theirs)
    assert ours.tokenize(CORPUS[1]) == theirs(CORPUS[1]).input_ids
    assert len(ours.tokenize(CORPUS[0])) < len(CORPUS[0]) / 2  # it learned words


def test_training_a_tokenizer_twice_gives_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in CORPUS))
    for name in "ab":
        train_tokenizer([str(tmp_path / "corpus.jsonl")], tmp_path / name, 290, json_keys=("body",))
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        train_tokenizer([str(tmp_path / "corpus.jsonl")], tmp_path / "a", 290, json_keys=("body",))
    with pytest.raises(ValueError, match=r"100 is below 257"):
        train_tokenizer([str(tmp_path / "corpus.jsonl")], tmp_path / "c", 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "corpus.jsonl"]


@pytest.mark.parametrize("name", ["SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"])
def test_sentencepiece_and_its_aliases(sentencepiece_model: str, name: str) -> None:
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=sentencepiece_model)
    tokenizer = build_tokenizer(DataConfig(tokenizer_type=name, tokenizer_model=sentencepiece_model))
    ids = tokenizer.tokenize("the lazy fox")
    assert ids == theirs.encode("the lazy fox")
    assert tokenizer.detokenize([*ids, tokenizer.eod]) == "the lazy fox"
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.bos) == (len(theirs), theirs.eos_id(), theirs.bos_id())


def test_sentencepiece_without_end_of_document_is_refused(tmp_path: Path) -> None:
    model = _train_sentencepiece(tmp_path / "sp", eos_id=-1)
    with pytest.raises(ValueError, match="no eos piece"):
        build_tokenizer(DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=model))


def test_hugging_face_without_end_of_document_is_refused(hugging_face_folder: str, tmp_path: Path) -> None:
    tokenizer_json = Path(hugging_face_folder, "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(tokenizer_json)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match="has no eos_token"):
        build_tokenizer(DataConfig(tokenizer_model=str(tmp_path)))


def test_null_tokenizer_reads_numbers_and_adds_one_id() -> None:
    tokenizer = build_tokenizer(DataConfig(tokenizer_type="NullTokenizer", vocab_size=100))
    assert tokenizer.tokenize("7 99 0") == [7, 99, 0]
    assert tokenizer.detokenize([7, 99, 0]) == "7 99 0"
    assert (tokenizer.vocab_size, tokenizer.eod) == (101, 100)
    assert build_tokenizer(DataConfig(mock_data=True, vocab_size=100).tokenizer).vocab_size == 101


def test_bad_settings_are_clear_errors(tmp_path: Path, sentencepiece_model: str) -> None:
    (tmp_path / "weights.bin").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text("{")
    cases = [
        (DataConfig(), "needs --tokenizer-model"),
        (DataConfig(tokenizer_model=str(tmp_path / "nowhere")), "nowhere does not exist"),
        (
            DataConfig(tokenizer_model=sentencepiece_model),
            "is a file; HuggingFaceTokenizer needs a Hugging Face folder",
        ),
        (DataConfig(tokenizer_type="Llama2Tokenizer", tokenizer_model=str(tmp_path)), "is a folder; Llama2Tokenizer"),
        (DataConfig(tokenizer_model=str(tmp_path)), "holds no tokenizer"),
        (DataConfig(tokenizer_model=str(tmp_path / "broken")), "cannot be read as a Hugging Face tokenizer"),
        (
            DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tmp_path / "weights.bin")),
            "cannot be read as a SentencePiece model",
        ),
        (DataConfig(tokenizer_type="NullTokenizer"), "--vocab-size"),
        (DataConfig(tokenizer_type="GPT2BPETokenizer"), "GPT2BPETokenizer is not known"),
    ]
    for data, message in cases:
        with pytest.raises(ValueError, match=message):
            build_tokenizer(data)


def test_ids_above_32000_go_through_and_must_fit_the_model() -> None:
    tokenizer = build_tokenizer(DataConfig(tokenizer_type="NullTokenizer", vocab_size=50000))
    assert tokenizer.tokenize("31999 32000 49999") == [31999, 32000, 49999]
    check_ids_fit(tokenizer.vocab_size, 50001)
    with pytest.raises(ValueError, match="50001 ids but the model's embedding has 50000 rows"):
        check_ids_fit(tokenizer.vocab_size, 50000)


def test_saved_tokenizer_works_without_the_original(
    hugging_face_folder: str, sentencepiece_model: str, tmp_path: Path
) -> None:
    cases = {
        "hf": DataConfig(tokenizer_model=hugging_face_folder),
        "sp": DataConfig(tokenizer_type="Llama2Tokenizer", tokenizer_model=sentencepiece_model),
        "bytes": DataConfig(tokenizer_type="ByteLevelTokenizer"),
        "null": DataConfig(tokenizer_type="NullTokenizer", vocab_size=9),
    }
    for name, data in cases.items():
        save_tokenizer(data, tmp_path / name)
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
        original, copy = build_tokenizer(data), load_tokenizer(tmp_path / f"moved-{name}")
        text = "1 2 3" if name == "null" else "the lazy dog"
        assert copy.tokenize(text) == original.tokenize(text)
        assert copy.unique_identifiers == original.unique_identifiers  # cached sample indices stay valid
    with pytest.raises(ValueError, match="no tokenizer was saved"):
        load_tokenizer(tmp_path)


# Comparing


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_tokenizers_that_give_the_same_ids_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text, and some more text. " * 50)
    train_tokenizer([str(tmp_path / "a.txt")], tmp_path / "mine", 270)
    shutil.copytree(tmp_path / "mine", tmp_path / "other")
    edit_json(tmp_path / "other" / "tokenizer_config.json", model_max_length=7, chat_template="{{ messages }}")
    mine, other = (build_tokenizer(DataConfig(tokenizer_model=str(tmp_path / name))) for name in ("mine", "other"))
    assert mine.fingerprint != other.fingerprint
    assert tokenizer_differences(mine, other) == tokenizer_differences(mine, mine) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "other words, quite other words. "}, r"\d+ ids mean something else, such as 257: "),
        ({"vocab_size": 265}, "it has 270 ids, not 265"),
        ({"eos_token": "!"}, "its end of document is 0, not "),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
         "it cuts text in another way, such as 'The quick"),
        ({"added": "<new>"}, "it has 270 ids, not 271"),
    ],
)  # fmt: skip
def test_other_ids_are_told(tmp_path: Path, changes: dict, message: str) -> None:
    texts = {"mine": "some text, and some more text. ", "other": changes.get("text", "some text, and some more text. ")}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text * 50)
        size = 270 if name == "mine" else changes.get("vocab_size", 270)
        train_tokenizer([str(tmp_path / f"{name}.txt")], tmp_path / name, size)
    if "eos_token" in changes:
        edit_json(tmp_path / "other" / "tokenizer_config.json", eos_token="!")
        edit_json(tmp_path / "other" / "special_tokens_map.json", eos_token="!")
    if "pre_tokenizer" in changes:
        edit_json(tmp_path / "other" / "tokenizer.json", pre_tokenizer=changes["pre_tokenizer"])
    if "added" in changes:
        added = json.loads((tmp_path / "other" / "tokenizer.json").read_text())["added_tokens"]
        edit_json(tmp_path / "other" / "tokenizer.json",
                  added_tokens=[*added, {**added[0], "id": 270, "content": changes["added"]}])  # fmt: skip
    mine, other = (build_tokenizer(DataConfig(tokenizer_model=str(tmp_path / name))) for name in texts)
    found = tokenizer_differences(mine, other)
    assert any(re.match(message, difference) for difference in found), found
    save_tokenizer(DataConfig(tokenizer_model=str(tmp_path / "other")), tmp_path / "saved")
    with pytest.raises(ValueError, match=r"is not that of the checkpoint, .*saved: .* say --override-tokenizer"):
        check_tokenizer_of_checkpoint(mine, tmp_path / "saved")
    check_tokenizer_of_checkpoint(mine, tmp_path / "none was saved here")


def test_a_checkpoint_carries_the_tokenizer_that_the_run_began_with(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text, and some more text. " * 50)
    train_tokenizer([str(tmp_path / "a.txt")], tmp_path / "mine", 270)
    data = DataConfig(tokenizer_model=str(tmp_path / "mine"))
    fingerprint, files = build_tokenizer(data).fingerprint, read_tokenizer_files(data)
    shutil.rmtree(tmp_path / "mine")
    write_tokenizer(files, tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == fingerprint


@pytest.mark.parametrize("content", [b"", b'{"tokenizer_type": "Byte', b"[]", b"{}", b"\xff"])
def test_damaged_settings_of_a_saved_tokenizer_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer_settings.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer_settings.json is damaged \(.*copy it from a checkpoint"):
        load_tokenizer(tmp_path)
