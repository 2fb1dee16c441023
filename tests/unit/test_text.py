"""Ids to text as they come, and stop strings, against what they mean by definition, for any bytes and any strings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.early_exit.config.data import DataConfig
from megatron.early_exit.data.tokenizer import build_tokenizer
from megatron.early_exit.inference.text import MAX_HELD_IDS, StopStrings, TextStream, pieces

BYTES = build_tokenizer(DataConfig(tokenizer_type="ByteLevelTokenizer"))


class Vocabulary:
    """Ids that are any bytes; some may be none, as special tokens are. Counts what is decoded."""

    def __init__(self, tokens: list[bytes], cleans_up_spaces: bool = False) -> None:
        self.tokens, self.cleans_up_spaces = tokens, cleans_up_spaces
        self.num_calls = self.most_ids = 0

    def detokenize(self, ids: list[int]) -> str:
        self.num_calls += 1
        self.most_ids = max(self.most_ids, len(ids))
        text = b"".join(self.tokens[token] for token in ids).decode(errors="replace")
        return text.replace(" .", ".").replace(" n't", "n't") if self.cleans_up_spaces else text


class ByteFallback(Vocabulary):
    """As decoders of Llama's family do: bytes side by side are text together, or none of them is."""

    def detokenize(self, ids: list[int]) -> str:
        super().detokenize(ids)
        text, run = "", b""
        for token in [*(self.tokens[token] for token in ids), b"\n"]:
            if len(token) == 1 and token[0] >= 0x80:
                run += token
                continue
            try:
                text += run.decode()
            except UnicodeDecodeError:
                text += "\ufffd" * len(run)
            text, run = text + token.decode(), b""
        return text[:-1]


ANY_TOKENS = st.lists(st.binary(min_size=1, max_size=4), min_size=1, max_size=12)
UNICODE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"))


def test_a_character_of_several_ids_appears_with_the_last() -> None:
    stream = TextStream(BYTES, BYTES.tokenize("pre"))
    assert [stream.add(byte) for byte in "xé€".encode()] == ["x", "", "é", "", "", "€"]
    assert stream.finish() == ""


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    assert pieces(BYTES, [], [ord("a"), 0xE2]) == ["a", "\ufffd"]


def test_long_texts_lose_nothing() -> None:
    text = "round and round: äöü € " * 20
    stream = TextStream(BYTES)
    assert "".join(stream.add(byte) for byte in text.encode()) == text


@given(ANY_TOKENS, st.data())
def test_any_bytes_give_the_text_of_all_of_them(tokens: list[bytes], data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, len(tokens) - 1), max_size=200))
    vocabulary = Vocabulary(tokens)
    stream, shown = TextStream(vocabulary), ""
    for count, token in enumerate(ids, start=1):
        shown += stream.add(token)
        so_far = vocabulary.detokenize(ids[:count])
        assert so_far.startswith(shown) and stream.num_held <= MAX_HELD_IDS
        assert so_far.rstrip("\ufffd").startswith(shown.rstrip("\ufffd"))
        if not so_far.endswith("\ufffd"):  # nothing is held that need not be
            assert (shown, stream.num_held) == (so_far, 0)
        given_out = vocabulary.detokenize(ids[: count - stream.num_held])
        assert shown.startswith(given_out.rstrip("\ufffd"))  # the ids that are not held have their text
    assert shown + stream.finish() == vocabulary.detokenize(ids)


@given(UNICODE, st.integers(0, 20))
def test_characters_are_never_split(text: str, cut: int) -> None:
    cut = min(cut, len(text))
    stream = TextStream(BYTES, BYTES.tokenize(text[:cut]))
    shown = [stream.add(byte) for byte in text[cut:].encode()]
    for character in text[cut:]:
        size = len(character.encode())
        assert shown[:size] == [""] * (size - 1) + [character]
        del shown[:size]
    assert not shown and stream.finish() == ""


@given(st.lists(st.sampled_from([" ", "a", ".", "n", "'", "t", " n", "n'", " word", "'t."]), max_size=150))
def test_spaces_that_decoding_removes(words: list[str]) -> None:
    vocabulary = Vocabulary([word.encode() for word in words], cleans_up_spaces=True)
    texts = pieces(vocabulary, [], range(len(words)))
    whole = vocabulary.detokenize(range(len(words)))
    # (Where the text is longer than the window that it is decoded in, the same spaces are removed.)
    assert "".join(texts) == whole


NUM_IDS = 4000
FLOODS = {
    "bytes that are no text": [b"\xff"],
    "beginnings of characters": [b"\xe2"],
    "middles of characters": [b"\x82"],
    "unfinished characters": [b"\xf0", b"\x9f"],
    "no text": [b""],
    "no text between spaces": [b" ", b"", b"", b"", b"", b"", b""],
    "one word": [b"a"],
    "spaces": [b" "],
    "characters": [b"\xe2", b"\x82", b"\xac"],
    "characters and bad bytes": [b"\xe2", b"\x82", b"\xac", b"\xff"],
    "text and bad bytes": [b"a", b"\xff"],
}


@pytest.mark.parametrize("kind", [Vocabulary, ByteFallback])
@pytest.mark.parametrize("cleans_up_spaces", [False, True])
@pytest.mark.parametrize("flood", FLOODS)
def test_time_is_linear_and_nothing_is_held_for_long(flood: str, cleans_up_spaces: bool, kind: type) -> None:
    vocabulary = kind(FLOODS[flood], cleans_up_spaces)
    stream, held = TextStream(vocabulary), 0
    ids = [index % len(vocabulary.tokens) for index in range(NUM_IDS)]
    text = "".join(stream.add(token) for token in ids)
    held = stream.num_held
    assert vocabulary.num_calls <= 3 * NUM_IDS and vocabulary.most_ids <= 140
    assert held <= MAX_HELD_IDS
    text += stream.finish()
    num_bad = sum(vocabulary.tokens[token] in (b"\xff", b"\x82", b"\xe2", b"\xf0") for token in ids)
    if kind is Vocabulary:
        assert text == vocabulary.detokenize(ids)
    elif "characters" not in flood:  # one for each byte that is no text
        assert text.count("\ufffd") == num_bad


def test_a_bad_byte_does_not_take_back_the_characters_before_it() -> None:
    vocabulary = ByteFallback([bytes([byte]) for byte in range(256)])
    ids = list("a€".encode() + b"\xff" + "b€".encode() + b"\xff\xff\xff\xff\xff" + b" end")
    assert vocabulary.detokenize(ids).count("\ufffd") == 12  # all bytes of a run with one of them
    assert "".join(pieces(vocabulary, [], ids)) == "a€\ufffdb€\ufffd\ufffd\ufffd\ufffd\ufffd end"


def show(stops: StopStrings, typed: list[str]) -> list[str]:
    """What each piece lets out, and what is left at the end."""
    text, shown = "", [""]
    for piece in typed:
        text += piece
        stops.add(piece)
        shown.append(text[len("".join(shown)) : stops.num_settled])
    rest = "" if stops.found is not None else text[len("".join(shown)) :]
    return [*shown[1:], rest]


@pytest.mark.parametrize(
    ("stops", "typed", "shown", "is_found"),
    [
        ((), ["ab", "cd"], ["ab", "cd", ""], False),
        (("xx",), ["ab", "cd"], ["ab", "cd", ""], False),
        (("cd",), ["ab", "cd"], ["ab", "", ""], True),
        (("bc",), ["ab", "cd"], ["a", "", ""], True),
        (("bx",), ["ab", "cd", "b"], ["a", "bcd", "", "b"], False),
        (("aab",), ["a", "a", "a", "b", "c"], ["", "", "a", "", "", ""], True),
        (("cd", "b"), ["a", "bcd"], ["a", "", ""], True),
        (("long stop",), ["a lo", "ng st", "op here"], ["a ", "", "", ""], True),
        (("abcd", "bc"), ["ab", "cd"], ["", "a", ""], True),
        (("bc", "abc"), ["ab", "cd"], ["", "", ""], True),
    ],
)
def test_stop_strings(stops: tuple[str, ...], typed: list[str], shown: list[str], is_found: bool) -> None:
    search = StopStrings(stops)
    assert show(search, typed) == shown
    assert (search.found is not None) is is_found


FEW_LETTERS = st.text("ab", max_size=30)


@given(
    st.lists(st.text("ab", min_size=1, max_size=6), max_size=5), st.lists(FEW_LETTERS, max_size=6), st.integers(0, 3)
)
def test_stop_strings_by_definition(stops: list[str], typed: list[str], num_without_end: int) -> None:
    """Those that are complete within the first pieces do not count."""
    search, text, found_at = StopStrings(stops), "", None
    for number, piece in enumerate(typed):
        search.add(piece, may_end=number >= num_without_end)
        for character in piece if found_at is None else "":
            text += character
            lengths = [len(stop) for stop in stops if number >= num_without_end and text.endswith(stop)]
            if lengths:
                found_at = len(text) - max(lengths)
                break
        assert (None if search.found is None else search.found.at) == found_at
        if found_at is None:
            beginnings = {stop[:size] for stop in stops for size in range(len(stop))}
            num_held = max((len(one) for one in beginnings if text.endswith(one)), default=0)
            assert search.num_settled == len(text) - num_held
        else:
            assert search.num_settled == found_at
            assert num_without_end or not any(stop in text[:found_at] for stop in stops)


class Counted(str):
    """Counts the characters that are looked at."""

    num_looks = 0

    def __getitem__(self, index: int) -> str:
        Counted.num_looks += 1
        return super().__getitem__(index)


def test_stop_strings_take_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "num_looks", 0)
    stops = StopStrings([Counted("a" * (256 - index) + "b") for index in range(16)])
    for _ in range(10_000):
        stops.add("a")
    assert (stops.num_settled, stops.found) == (10_000 - 256, None)
    assert Counted.num_looks <= 16 * 3 * (10_000 + 256)
    stops.add("ba")
    assert stops.found is not None and stops.found.at == 10_000 - 256
