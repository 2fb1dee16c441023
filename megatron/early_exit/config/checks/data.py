"""Sources of data and their split, and the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.early_exit.config.data import TOKENIZERS_WITHOUT_MODEL, DataConfig, parse_blend, split_shares
from megatron.early_exit.config.fields import flag_of, words_of
from megatron.early_exit.config.settings import RunSettings


def data_problems(cfg: RunSettings) -> Iterator[str]:
    """What is wrong with the sources, the split and the choice of a tokenizer."""
    data = cfg.data
    names = ("train_data_path", "valid_data_path", "test_data_path")
    split_wise = [flag_of(name) for name in names if getattr(data, name)]
    sources = [flag_of(name) for name in ("data_path", "mock_data") if getattr(data, name)] + split_wise[:1]
    if not sources:
        yield "no data: give --data-path, or --train-data-path with --valid-data-path, or --mock-data"
    if len(sources) > 1:
        yield f"{' and '.join(sources)}: give one source of data"
    if split_wise and not data.train_data_path:
        yield f"{', '.join(split_wise)} without --train-data-path: give it"
    for name in ("data_path", *names):
        try:
            parse_blend(getattr(data, name))
        except ValueError as error:
            yield f"{flag_of(name)} {words_of(getattr(data, name))}: {error}"
    yield from _split_problems(data.split)
    if len(sources) == 1 and cfg.training.eval_iters > 0 and not _has_validation_data(data):
        where = "--valid-data-path is missing" if data.train_data_path else f"--split {data.split} leaves it no data"
        asked = f"--eval-iters {cfg.training.eval_iters} asks for validation"
        yield f"{asked}, but {where}: give it some, or --eval-iters 0"
    yield from _tokenizer_problems(data)


def _split_problems(split: str) -> Iterator[str]:
    try:
        split_shares(split)
    except ValueError as error:
        yield str(error)


def _has_validation_data(data: DataConfig) -> bool:
    """Whether it has; also where the split is none, which is another problem."""
    if data.train_data_path:
        return bool(data.valid_data_path)
    return data.mock_data or bool(list(_split_problems(data.split))) or split_shares(data.split)[1] > 0


def _tokenizer_problems(data: DataConfig) -> Iterator[str]:
    if data.mock_data and data.tokenizer_model is None:
        if data.vocab_size is None:
            yield "--mock-data needs the number of token ids: give --vocab-size, or a tokenizer"
        return
    if data.tokenizer_type == "NullTokenizer" and data.vocab_size is None:
        yield "--tokenizer-type NullTokenizer needs --vocab-size"
    if data.tokenizer_type not in TOKENIZERS_WITHOUT_MODEL and data.tokenizer_model is None:
        yield f"--tokenizer-type {data.tokenizer_type} needs --tokenizer-model: the path of the tokenizer"
