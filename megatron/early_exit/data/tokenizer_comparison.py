"""Whether two tokenizers give the same ids, whatever else their files say (chat templates, lengths, library)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron.early_exit.config.checkpoint_files import TOKENIZER_SETTINGS_FILE
from megatron.early_exit.data.tokenizer import Tokenizer, load_tokenizer
from megatron.early_exit.data.tokenizer_libraries import HuggingFaceLibrary, SentencePieceLibrary

SAMPLE_TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs. It's 12345.67 o'clock!",
    "def f(x):\n\treturn {'a': x != 0}  # two  spaces\r\n\n\n",
    "Größe – “naïve” café, мир, 你好世界, こんにちは, 한국어, \U0001f600\u200d\u2764",
    " camelCase snake_case ALLCAPS https://example.org/a?b=c&d=e <b>&amp;</b>",
)


def tokenizer_differences(mine: Tokenizer, theirs: Tokenizer) -> list[str]:
    """In what ids differ; empty if every text gives the same ones and they mean the same."""
    if mine.fingerprint == theirs.fingerprint and (mine.vocab_size, mine.eod) == (theirs.vocab_size, theirs.eod):
        return []
    found = []
    if mine.vocab_size != theirs.vocab_size:
        found.append(f"it has {mine.vocab_size} ids, not {theirs.vocab_size}")
    if mine.eod != theirs.eod:
        found.append(f"its end of document is {mine.eod}, not {theirs.eod}")
    tokens = zip(_tokens(mine), _tokens(theirs), strict=False)
    others = [(index, *pair) for index, pair in enumerate(tokens) if pair[0] != pair[1]]
    if others:
        index, new, old = others[0]
        found.append(f"{len(others)} ids mean something else, such as {index}: {new!r}, not {old!r}")
    elif other := [text for text in SAMPLE_TEXTS if _encoded(mine, text) != _encoded(theirs, text)]:
        found.append(f"it cuts text in another way, such as {other[0][:30]!r}")
    return found


def check_tokenizer_of_checkpoint(tokenizer: Tokenizer, folder: Path) -> None:
    """Raise ValueError if a model's embedding was trained with other ids. folder: where its checkpoint has the
    tokenizer, if it has one."""
    if not (folder / TOKENIZER_SETTINGS_FILE).is_file():
        return
    differences = tokenizer_differences(tokenizer, load_tokenizer(folder))
    if differences:
        raise ValueError(
            f"the tokenizer of this run is not that of the checkpoint, {folder}: {'; '.join(differences)}. Train with "
            "the checkpoint's and data made with it, or, if the model is to learn other ids, say --override-tokenizer."
        )


def _tokens(tokenizer: Tokenizer) -> Sequence[str | None]:
    """What each id stands for; special ones too where the library says so."""
    ids = range(tokenizer.vocab_size)
    if isinstance(tokenizer.library, HuggingFaceLibrary):
        return tokenizer.library.tokenizer.convert_ids_to_tokens(list(ids))
    if isinstance(tokenizer.library, SentencePieceLibrary):
        return tokenizer.library.model.id_to_piece(list(ids))
    return [tokenizer.detokenize([token]) for token in ids]


def _encoded(tokenizer: Tokenizer, text: str) -> list[int] | None:
    try:
        return tokenizer.tokenize(text)
    except ValueError:  # numbers are the only text of a NullTokenizer
        return None
