"""What a conversion made, compared with what it was made from, before it is called done.

`transformers` reads the folder of its format and says what the model there is; our parameters are evaluated by
`plain_forward.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.plain_forward import NO_EXITS, head_logits
from megatron.early_exit.checkpoint.tensors import Tensors
from megatron.early_exit.config.checkpoint_files import SENTENCEPIECE_FILE
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.data.tokenizer import load_tokenizer
from megatron.early_exit.platform.device import free_main_memory_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_TOKENS = 24
_FARTHEST = 4096
"""Beyond it, fp32 angles of rotary positions differ by their own rounding."""
_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  Two  spaces,\ta tab,\n\na blank line and 12345.678 + 9 = ?",
    "def f(x):\n    return x ** 2  # comment\n",
    "Größe, naïve, Ελληνικά, русский, 日本語, العربية, 🙂👩‍👩‍👧",
    "",
)
_CHAT = [
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "?"},
]


@dataclass(frozen=True)
class Head:
    """One head of our model: the final one by default, or an exit."""

    tensors: Tensors
    model: ModelConfig
    exits: ExitConfig = NO_EXITS
    exit_layer: int | None = None

    def logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """[b, s, rows]"""
        return head_logits(self.tensors, self.model, tokens, positions, self.exits, self.exit_layer)


def compare_weights(made: Tensors, source: Tensors) -> None:
    """Raise ValueError unless `made` has the parameters of `source`, bit for bit, and all are finite. Reads one
    tensor of each at a time.

    Rows that one has more than the other are padding of the vocabulary and must be zeros."""
    names = sorted(made.keys() ^ source.keys())
    if names:
        raise ValueError(f"the conversion went wrong: {names[0]} is on one side only. Please report this")
    for name, tensor in source.items():
        one, other = made[name].read(), tensor.read().to(made[name].dtype)
        if not other.isfinite().all():
            raise ValueError(
                f"{name} holds values that are not finite in {str(other.dtype).removeprefix('torch.')} (NaN, infinity):"
                " the source is damaged, or goes beyond the range of --dtype. --skip-comparison takes it as it is"
            )
        rows = min(len(one), len(other))
        if not torch.equal(one[:rows], other[:rows]) or one[rows:].any() or other[rows:].any():
            raise ValueError(f"the conversion went wrong: {name} differs from its source. Please report this")


def compare_logits(
    head: Head,
    folder: Path,
    *,
    vocab_size: int,
    gguf: tuple[str, PretrainedConfig] | None = None,
    tolerance: float = 1e-3,
    choices_only: bool = False,
) -> str:
    """A line on how far logits of sample tokens are from those of `transformers`, or on why they were not compared.

    gguf: name of the file in `folder` and its completed settings. tolerance: of the largest logit. choices_only:
    compare the most probable tokens alone. Raises ValueError if they differ."""
    needed = _bytes_of(head)
    free = free_main_memory_bytes()
    if needed > free:
        return f"logits not compared: that takes {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are free"
    max_positions = head.model.max_position_embeddings
    assert max_positions is not None, "a model that has weights has a length"
    tokens, positions = _sample(vocab_size, max_positions)
    ours = head.logits(tokens, positions)[..., :vocab_size]
    theirs = _their_logits(folder, gguf, tokens, positions)[..., :vocab_size]
    if choices_only:
        # Their maximum may be ours up to rounding.
        chosen = ours.gather(-1, theirs.argmax(-1, keepdim=True))[..., 0]
        difference = float((ours.amax(-1) - chosen).max() / ours.abs().max())
    else:
        difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if not difference <= tolerance:  # also of NaN
        raise ValueError(
            f"the conversion went wrong: logits differ from those of transformers by {difference:.1e} of the largest. "
            "Please report this"
        )
    what = "choices" if choices_only else "logits"
    return f"{what} of {tokens.numel()} sample tokens are those of transformers (to {max(difference, 1e-8):.0e})"


def _bytes_of(head: Head) -> int:
    """Of the model of transformers in fp32, and of a layer and the output of ours."""
    largest = max(tensor.num_bytes // tensor.dtype.itemsize for tensor in head.tensors.values())
    return 4 * (sum(t.num_bytes // t.dtype.itemsize for t in head.tensors.values()) + 2 * largest) + 2**28


def _sample(vocab_size: int, max_positions: int) -> tuple[Tensor, Tensor]:
    """Ids and positions, [2, s]: one sequence of neighbours, and one over the whole range of positions."""
    count = min(_TOKENS, max_positions)
    tokens = torch.randint(vocab_size, (2, count), generator=torch.Generator().manual_seed(0))
    far = torch.linspace(0, min(max_positions, _FARTHEST) - 1, count).long()
    return tokens, torch.stack([torch.arange(count), far])


def _their_logits(folder: Path, gguf: tuple[str, PretrainedConfig] | None, tokens: Tensor, positions: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    with _quiet_transformers(), torch.inference_mode():
        extra = {} if gguf is None else {"gguf_file": gguf[0], "config": gguf[1]}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, **extra)
        mask = torch.ones_like(tokens)  # without it, jumps in positions are taken for borders of documents
        output = model.eval()(tokens, attention_mask=mask, position_ids=positions, use_cache=False)
        logits: Tensor = output.logits.float()
        return logits


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    verbosity, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()


def compare_exported_tokenizer(made: Path, folder: Path, kind: str) -> str:
    """A line on the tokenizer that `transformers` finds beside an exported model, against that of our checkpoint in
    `folder`, of the type `kind`. Raises ValueError if both are of `transformers` and differ."""
    if kind == "HuggingFaceTokenizer":
        compare_tokenizers(made, folder)
        return "tokenizer"
    if not (made / SENTENCEPIECE_FILE).is_file():
        return f"no tokenizer (transformers has none like {kind})"
    try:
        found = their_tokenizer(made)
    except ValueError as error:
        return f"no tokenizer ({error})"
    own = load_tokenizer(folder)
    different = [text for text in _TEXTS if list(found(text).input_ids) != own.encode_prompt(text)]
    if different:
        return f"weights alone (CAUTION: the tokenizer of transformers gives other ids than ours for {different[0]!r})"
    return "tokenizer"


def their_tokenizer(folder: Path) -> Any:
    """The tokenizer that `transformers` finds in a folder. Raises ValueError if it cannot be read."""
    from transformers import AutoTokenizer

    try:
        with _quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of many kinds
        words = " ".join(str(error).split())
        raise ValueError(f"transformers cannot read the tokenizer in {folder}: {words}") from error


def compare_tokenizers(made: Path, source: Path) -> None:
    """Raise ValueError unless `transformers` finds the same tokenizer in both folders: ids of sample texts, special
    tokens, chat template and ends of generation."""
    expected, found = their_tokenizer(source), their_tokenizer(made)
    special = "".join(expected.all_special_tokens[:8])
    texts = (*_TEXTS, f"{special}text{special}")
    pairs: dict[str, tuple[Any, Any]] = {
        "special tokens": (found.special_tokens_map, expected.special_tokens_map),
        "added tokens": (found.get_added_vocab(), expected.get_added_vocab()),
        "chat template": (found.chat_template, expected.chat_template),
        "ends of generation": (_ends(made), _ends(source) or _ends(made)),
    }
    pairs |= {f"ids of {text[:30]!r}": (found(text).input_ids, expected(text).input_ids) for text in texts}
    if expected.chat_template and found.chat_template == expected.chat_template:
        pairs["ids of a chat"] = (_chat_ids(found), _chat_ids(expected))
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise ValueError(
                f"the tokenizer in the new folder is not that of the source: {name} are {str(ours)[:80]}, not "
                f"{str(theirs)[:80]}"
            )


def _chat_ids(tokenizer: Any) -> Any:
    try:
        return list(tokenizer.apply_chat_template(_CHAT, add_generation_prompt=True, return_dict=False))
    except Exception as error:  # templates may refuse what they like
        return str(error)


def _ends(folder: Path) -> list[int]:
    from transformers import GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
    except (OSError, ValueError):
        return []
    return sorted({*(ends if isinstance(ends, list) else [ends])} - {None})
