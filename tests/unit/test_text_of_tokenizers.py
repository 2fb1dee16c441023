"""What users bring as tokenizers: ids of prompts and documents, texts of answers and their ends are those of
`transformers` and SentencePiece, for every kind of tokenizer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron.early_exit.config.data import DataConfig
from megatron.early_exit.data.tokenizer import Tokenizer, build_tokenizer, load_tokenizer
from megatron.early_exit.data.tokenizer_files import save_tokenizer
from megatron.early_exit.inference.text import TextStream, pieces

CORPUS = ["a small model reads lines of text, and writes another line: it is not here .\n"] * 30
TEXTS = [
    "", "a small model", "  two  spaces\n", "NASA reads lines", "<user>\n hello <tool> there", "é€ \N{GRINNING FACE}x",
    "it is n't here . or , is it ?", "<end> text <begin> of text",
    "it ' s", "€€€€",
]  # fmt: skip
CHAT = (
    "{% for m in messages %}{% if m['role'] not in ('user', 'assistant') %}{{ raise_exception('unknown role') }}"
    "{% endif %}<user>{{ m['content'] }}<end>{% endfor %}<tool>"
)


def special(text: str, **changes: bool) -> AddedToken:
    return AddedToken(text, **{"special": True, "normalized": False, **changes})


def byte_pairs() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    backend.add_special_tokens([special("<begin>"), special("<end>")])
    return backend


def begin(backend: Backend, template: str = "<begin> $A") -> None:
    ids = [(name, backend.token_to_id(name)) for name in ("<begin>", "<end>")]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)


def save(backend: Backend, folder: Path, **names: object) -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **{"bos_token": "<begin>", "eos_token": "<end>", **names})
    fast.save_pretrained(folder)


def plain(folder: Path) -> None:
    save(byte_pairs(), folder)


def with_begin(folder: Path) -> None:
    backend = byte_pairs()
    begin(backend)
    save(backend, folder)


def with_begin_and_end(folder: Path) -> None:
    backend = byte_pairs()
    begin(backend, "<begin> $A <end>")
    save(backend, folder, clean_up_tokenization_spaces=True)


def added_tokens(folder: Path, **names: object) -> None:
    backend = byte_pairs()
    backend.normalizer = normalizers.Lowercase()
    begin(backend)
    backend.add_special_tokens([special("<user>", rstrip=True), special("<unk>")])
    backend.add_tokens(["NASA", AddedToken("<tool>", lstrip=True, normalized=False)])
    save(backend, folder, **names)


def added_tokens_with_unknown(folder: Path) -> None:
    added_tokens(folder, unk_token="<unk>")


def words(folder: Path) -> None:
    """Of the BERT family: no bytes, and what surrounds a text has other names."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    names = ["[UNK]", "[CLS]", "[SEP]"]
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=names))
    ids = [(name, backend.token_to_id(name)) for name in names]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        clean_up_tokenization_spaces=True,
    )  # fmt: skip
    fast.save_pretrained(folder)


def word_level(folder: Path) -> None:
    """Decoding removes spaces that were there: clean_up_tokenization_spaces."""
    backend = Backend(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["<begin>", "<end>", "<unk>"]
    backend.train_from_iterator([*CORPUS, "or ? it ' s"], trainers.WordLevelTrainer(special_tokens=names))
    backend.add_tokens(["n't"])
    begin(backend)
    save(backend, folder, unk_token="<unk>", clean_up_tokenization_spaces=True)


def sentencepiece_model(folder: Path, **options: object) -> Path:
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(folder / "tokenizer"), vocab_size=320, minloglevel=2,
        **{
            "model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False, "user_defined_symbols": ["<user>"],
            "normalization_rule_name": "identity", "remove_extra_whitespaces": False, **options,
        },
    )  # fmt: skip
    return folder / "tokenizer.model"


def llama(folder: Path, **settings: object) -> None:
    """As Llama-2's folder: a SentencePiece model, and what class reads it."""
    sentencepiece_model(folder)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **names, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def llama_without_begin(folder: Path) -> None:
    llama(folder, add_bos_token=False)


def llama_saved(folder: Path) -> None:
    """As `save_pretrained` writes it: tokenizer.json."""
    llama(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for path in folder.iterdir():
        path.unlink()
    tokenizer.save_pretrained(folder)


MAKERS = (
    plain, with_begin, with_begin_and_end, added_tokens, added_tokens_with_unknown, words, word_level, llama,
    llama_without_begin, llama_saved,
)  # fmt: skip


@pytest.fixture(scope="module", params=MAKERS, ids=lambda maker: maker.__name__)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / request.param.__name__
    request.param(path)
    return path


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    """(ours, that of transformers), from the same files"""
    return build_tokenizer(DataConfig(tokenizer_model=str(folder))), AutoTokenizer.from_pretrained(folder)


def test_ids_are_those_of_transformers(both: tuple[Tokenizer, PreTrainedTokenizerFast]) -> None:
    ours, theirs = both
    for text in TEXTS:
        assert ours.encode_prompt(text) == theirs(text).input_ids, text
        assert ours.encode_prompt(text, add_special_tokens=False) == ours.tokenize(text), text
        assert ours.tokenize(text) == theirs(text, add_special_tokens=False).input_ids, text
        assert all(isinstance(token, int) for token in ours.tokenize(text))


def test_text_is_that_of_transformers_also_as_it_comes(both: tuple[Tokenizer, PreTrainedTokenizerFast]) -> None:
    ours, theirs = both
    decode = lambda ids: theirs.decode(ids, skip_special_tokens=True)
    for first, second in itertools.product(TEXTS, TEXTS):
        prompt, answer = ours.encode_prompt(first), ours.encode_prompt(second)
        assert ours.detokenize(prompt) == decode(prompt)
        texts = pieces(ours, prompt, answer)
        assert len(texts) == len(answer)
        assert decode(prompt) + "".join(texts) == decode(prompt + answer), (first, second)


def test_answers_that_begin_inside_of_a_text(both: tuple[Tokenizer, PreTrainedTokenizerFast]) -> None:
    ours, theirs = both
    for text in ("€é€\N{GRINNING FACE}" * 3, "it ' s a small model here . or"):
        ids = ours.tokenize(text)
        whole = theirs.decode(ids, skip_special_tokens=True)
        for cut in range(len(ids)):
            before = theirs.decode(ids[:cut], skip_special_tokens=True)
            if whole.startswith(before):
                assert before + "".join(pieces(ours, ids[:cut], ids[cut:])) == whole, cut


def test_every_id_by_itself(both: tuple[Tokenizer, PreTrainedTokenizerFast]) -> None:
    ours, theirs = both
    for token in range(ours.vocab_size):
        assert ours.detokenize([token]) == theirs.decode([token], skip_special_tokens=True)
    flagged = [token for token, added in theirs.added_tokens_decoder.items() if added.special]
    assert ours.eod in flagged and ours.detokenize(flagged) == ""


def test_long_texts_as_they_come(both: tuple[Tokenizer, PreTrainedTokenizerFast]) -> None:
    ours, theirs = both
    ids = ours.tokenize("  ".join(TEXTS[1:6]) * 12 + "\N{GRINNING FACE}" * 30 + "é€ " * 20)
    assert "".join(pieces(ours, [], ids)) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(("maker", "spelling"), [(plain, "\u00ff"), (llama, "<0xFF>"), (llama_saved, "<0xFF>")])
def test_bytes_that_are_no_text_do_not_hold_what_follows(
    maker: Callable[[Path], None], spelling: str, tmp_path: Path
) -> None:
    maker(tmp_path)
    ours = build_tokenizer(DataConfig(tokenizer_model=str(tmp_path)))
    byte = AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids(spelling)
    stream = TextStream(ours)
    assert "".join(stream.add(byte) for _ in range(200)) == "\ufffd" * 197
    after = "".join(map(stream.add, ours.tokenize(" a small")))
    assert after.lstrip() == "\ufffd" * 3 + " a small"


@pytest.mark.parametrize("name", ["SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"])
def test_sentencepiece(name: str, tmp_path: Path) -> None:
    import sentencepiece

    path = sentencepiece_model(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    data = DataConfig(tokenizer_type=name, tokenizer_model=str(path))
    save_tokenizer(data, tmp_path / "copy")
    begins = [theirs.bos_id()] if name == "Llama2Tokenizer" else []
    for ours in (build_tokenizer(data), load_tokenizer(tmp_path / "copy")):
        assert ours.ends == {theirs.eos_id()}
        for text in [*TEXTS, "a \N{BALLOT BOX} b"]:
            ids = theirs.encode(text)
            assert ours.tokenize(text) == ours.encode_prompt(text, add_special_tokens=False) == ids
            assert ours.encode_prompt(text) == begins + ids
            assert ours.detokenize([*ids, ours.eod]) == theirs.decode(ids)


def test_llama_with_both_of_its_names(tmp_path: Path) -> None:
    llama(tmp_path)
    file = build_tokenizer(
        DataConfig(tokenizer_type="Llama2Tokenizer", tokenizer_model=str(tmp_path / "tokenizer.model"))
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a small model", "reads\nlines of text", "é€ \N{GRINNING FACE}x"):
        assert file.encode_prompt(text) == theirs(text).input_ids


@pytest.mark.parametrize("maker", [with_begin, plain])
@pytest.mark.parametrize("template", [CHAT, "<begin>" + CHAT, None])
def test_chats_have_one_begin_of_text_at_most(
    maker: Callable[[Path], None], template: str | None, tmp_path: Path
) -> None:
    maker(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.chat_template = template
    theirs.save_pretrained(tmp_path)
    ours = build_tokenizer(DataConfig(tokenizer_model=str(tmp_path)))
    messages = [{"role": "user", "content": "a small"}, {"role": "assistant", "content": "model"}]
    if template is None:
        assert ours.chat(messages) == theirs("a small\nmodel\n").input_ids
        assert ours.chat(messages, add_special_tokens=False) == ours.tokenize("a small\nmodel\n")
    else:
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours.chat(messages) == expected
        assert expected.count(ours.bos) == template.count("<begin>")
        with pytest.raises(ValueError, match="chat template refuses the conversation: unknown role"):
            ours.chat([{"role": "tool", "content": "a"}])
        with pytest.raises(ValueError, match="not valid Unicode"):
            ours.chat([{"role": "user", "content": "cut \ud83d"}])


@pytest.mark.parametrize("name", ["HuggingFaceTokenizer", "Llama2Tokenizer", "ByteLevelTokenizer"])
def test_a_template_in_place_of_the_tokenizers(name: str, tmp_path: Path) -> None:
    llama(tmp_path, chat_template=CHAT)
    file = tmp_path / "tokenizer.model" if name == "Llama2Tokenizer" else tmp_path
    ours = build_tokenizer(DataConfig(tokenizer_type=name, tokenizer_model=str(file)))
    assert ours.chat_template == (CHAT if name == "HuggingFaceTokenizer" else None)
    template = "{% for m in messages %}{{ m['content'] }};{% endfor %}{{ bos_token or '' }}"
    messages = [{"role": "tool", "content": "a small"}, {"role": "user", "content": "model"}]
    written = "a small;model;" + ("<s>" if name == "HuggingFaceTokenizer" else "")
    begins = name == "Llama2Tokenizer"  # its templates cannot write special tokens
    assert ours.chat(messages, template=template) == ours.encode_prompt(written, add_special_tokens=begins)
    with pytest.raises(ValueError, match="chat template refuses the conversation: no"):
        ours.chat(messages, template="{{ raise_exception('no') }}")
    with pytest.raises(ValueError, match="chat template refuses the conversation"):
        ours.chat(messages, template="{% for")


@pytest.mark.parametrize(
    ("generation_config", "config", "expected"),
    [
        ({"eos_token_id": [3, 5]}, {"eos_token_id": 7}, {3, 5}),
        ({"eos_token_id": 3}, None, {3}),
        ({"do_sample": True}, {"eos_token_id": 7}, {7}),
        ({"eos_token_id": None}, {"text_config": {"eos_token_id": [7, 8]}}, {7, 8}),
        (None, {"eos_token_id": [7]}, {7}),
        (None, {"hidden_size": 4}, None),
        (None, None, None),
        ({"eos_token_id": [99999, 3]}, None, {3}),
        ({"eos_token_id": 99999}, None, None),
    ],
)
def test_ends_are_those_of_the_models_folder(
    generation_config: dict | None, config: dict | None, expected: set[int] | None, tmp_path: Path
) -> None:
    plain(tmp_path / "hf")
    for name, settings in (("generation_config.json", generation_config), ("config.json", config)):
        if settings is not None:
            (tmp_path / "hf" / name).write_text(json.dumps(settings))
    data = DataConfig(tokenizer_model=str(tmp_path / "hf"))
    save_tokenizer(data, tmp_path / "copy")
    for ours in (build_tokenizer(data), load_tokenizer(tmp_path / "copy")):
        assert ours.ends == (expected or {ours.eod})
    assert build_tokenizer(DataConfig(tokenizer_type="ByteLevelTokenizer")).ends == {256}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"eos_token_id": [', r"generation_config\.json is not JSON"),
        ("[]", r"generation_config\.json holds no JSON object"),
        ('{"eos_token_id": "3"}', r"eos_token_id in .*generation_config\.json is '3', and no id or list of ids"),
        ('{"eos_token_id": [3, null]}', r"eos_token_id in .*generation_config\.json is \[3, None\], and no id"),
        ('{"text_config": 7}', r"text_config in .*generation_config\.json is 7, and no JSON object"),
    ],
)
def test_a_damaged_generation_config_is_named(content: str, message: str, tmp_path: Path) -> None:
    plain(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        build_tokenizer(DataConfig(tokenizer_model=str(tmp_path)))


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "transformers"])
def test_text_that_is_not_unicode_is_refused_with_its_place(kind: str, tmp_path: Path) -> None:
    if kind == "bytes":
        data = DataConfig(tokenizer_type="ByteLevelTokenizer")
    elif kind == "sentencepiece":
        model = str(sentencepiece_model(tmp_path))
        data = DataConfig(tokenizer_type="Llama2Tokenizer", tokenizer_model=model)
    else:
        plain(tmp_path)
        data = DataConfig(tokenizer_model=str(tmp_path))
    tokenizer = build_tokenizer(data)
    for encode in (tokenizer.tokenize, tokenizer.encode_prompt):
        with pytest.raises(ValueError, match=r"'\\ud83d' at character 5"):
            encode("cut \ud83d")
        with pytest.raises(ValueError, match=r"'\\udce9' at character 4"):
            encode("the\udce9")
