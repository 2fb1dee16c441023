"""Known models on known clusters, by name, and any others from training's flags.

The first four have the settings of the original's launch scripts (github.com/pan-x-c/EE-LLM, examples/ee_training, the
models of arXiv:2312.04916): sizes, TP, PP, microbatch, batch of 2,048 sequences of 2,048 tokens, exits before the layer
behind a quarter and a half of the depth, tied weights for 1.3B and untied ones for the others. The number of GPUs is a
launcher's argument there; 64 A100 are assumed, and a vocabulary of 32,000.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.early_exit.config.flags import parse_run_config
from megatron.early_exit.config.layer_split import layout_text
from megatron.early_exit.config.run import ResolvedConfig, RunConfig
from megatron.early_exit.config.settings import with_tuned_stages
from megatron.early_exit.config.yaml_files import read_yaml
from megatron.early_exit.schedules.comparison import Setup
from megatron.early_exit.schedules.cost_model import DEFAULT_ASSUMPTIONS, Assumptions, gpu_named

VOCAB_SIZE = 32000
"""Assumed where no vocabulary is given."""

_LLAMA = (
    "--bf16 --use-distributed-optimizer --swiglu --normalization RMSNorm --position-embedding-type rope "
    "--disable-bias-linear --hidden-dropout 0 --attention-dropout 0 --pre-exit"
)
_EE_LLM = f"{_LLAMA} --seq-length 2048 --global-batch-size 2048 --pipeline-model-parallel-size 4"
_UNTIED = "--untie-embeddings-and-output-weights --untie-exit-output-weights"
# Llama 3's sizes, sequences of 8,192 and TP 8 (arXiv:2407.21783, tables 3 and 4).
_LLAMA3 = (
    f"{_LLAMA} {_UNTIED} --seq-length 8192 --micro-batch-size 1 --padded-vocab-size 128256 --group-query-attention "
    "--num-query-groups 8 --tensor-model-parallel-size 8 --sequence-parallel"
)


@dataclass(frozen=True)
class Case:
    """A named model and cluster."""

    flags: str
    """Training's flags."""
    world_size: int
    gpu: str
    split: str = ""
    """Flags for other layers on some stages; left out where other layers or stages are asked for."""

    def flags_with(self, more: Sequence[str]) -> list[str]:
        """The case's flags and more, which win. Other exit layers are taken without the case's --pre-exit."""
        given = {flag.partition("=")[0] for flag in more}
        own = [] if given & _OTHER_SPLIT else self.split.split()
        own += self.flags.split()
        if "--exit-layer-nums" in given:
            own = [flag for flag in own if flag != "--pre-exit"]
        return [*own, *more]


_OTHER_SPLIT = {
    "--num-layers", "--pipeline-model-parallel-size", "--pipeline-model-parallel-layout",
    "--num-layers-per-virtual-pipeline-stage",
}  # fmt: skip


CASES = {
    "1.3B": Case(
        f"{_EE_LLM} --num-layers 24 --hidden-size 2048 --num-attention-heads 32 --micro-batch-size 4 "
        "--exit-layer-nums 7 13",
        64, "A100-80GB",
    ),
    "7B": Case(
        f"{_EE_LLM} {_UNTIED} --num-layers 32 --hidden-size 4096 --num-attention-heads 32 --micro-batch-size 2 "
        "--exit-layer-nums 9 17",
        64, "A100-80GB",
    ),
    "13B": Case(
        f"{_EE_LLM} {_UNTIED} --num-layers 40 --hidden-size 5120 --num-attention-heads 40 --micro-batch-size 1 "
        "--tensor-model-parallel-size 2 --sequence-parallel --exit-layer-nums 11 21",
        64, "A100-80GB",
    ),
    "30B": Case(
        f"{_EE_LLM} {_UNTIED} --num-layers 60 --hidden-size 6656 --num-attention-heads 52 --micro-batch-size 1 "
        "--tensor-model-parallel-size 4 --sequence-parallel --exit-layer-nums 16 31",
        64, "A100-80GB",
    ),
    # The batch is Llama 3's first one, 4 million tokens.
    "70B": Case(
        f"{_LLAMA3} --num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64 "
        "--pipeline-model-parallel-size 4 --global-batch-size 512 --exit-layer-nums 21 41",
        1024, "H100-80GB",
    ),
    # Llama 3 405B's pipeline: 16 stages of eight layers, the first and the last of seven, 32 microbatches (2,048
    # sequences on 64 replicas there, 256 on 8 here). Five layers of a stage are recomputed, so that it fits.
    "405B": Case(
        f"{_LLAMA3} --num-layers 126 --hidden-size 16384 --ffn-hidden-size 53248 --num-attention-heads 128 "
        "--pipeline-model-parallel-size 16 --global-batch-size 256 --exit-layer-nums 32 64 "
        "--recompute-granularity full --recompute-method block --recompute-num-layers 5",
        1024, "H100-80GB", "--decoder-first-pipeline-num-layers 7 --decoder-last-pipeline-num-layers 7",
    ),
}  # fmt: skip


def case_named(name: str) -> Case:
    """Raises ValueError with the known names."""
    by_name = {key.lower(): case for key, case in CASES.items()}
    if name.lower() not in by_name:
        raise ValueError(f"no case {name!r}; there are {', '.join(CASES)}")
    return by_name[name.lower()]


def setup_of_case(name: str, more_flags: Sequence[str] = ()) -> Setup:
    """more_flags: of training; they win over the case's."""
    case = case_named(name)
    return setup_from_flags(case.flags_with(more_flags), case.world_size, case.gpu)


def setup_from_flags(
    flags: Sequence[str],
    world_size: int,
    gpu: str,
    layers_per_stage: Sequence[int] | None = None,
    assumptions: Assumptions = DEFAULT_ASSUMPTIONS,
) -> Setup:
    """The setup that training's flags describe; those for data, length and learning rate can be left out.

    layers_per_stage: default as the flags split them. Raises ValueError (ConfigError for flags)."""
    words = [*_unneeded(flags), *flags]
    if layers_per_stage is not None:
        words += layout_flags(layers_per_stage)
    config = parse_run_config(words, world_size=world_size, warn=_ignore)
    return Setup.of(_with_vocabulary(config), world_size, gpu_named(gpu), assumptions)


def layout_flags(layers_per_stage: Sequence[int]) -> list[str]:
    """Flags of training for these layers of every stage. Raises ValueError for a stage without layers."""
    if min(layers_per_stage) < 1:
        raise ValueError(f"layers per stage {' '.join(map(str, layers_per_stage))}: every stage needs a layer")
    return ["--pipeline-model-parallel-layout", layout_text(layers_per_stage)]


def _unneeded(flags: Sequence[str]) -> list[str]:
    """Flags that training demands and a plan does not depend on, if they are not given, here or in --config's file."""
    given = {word.partition("=")[0] for word in flags if word.startswith("--")} | _flags_of_file(flags)
    tokenizer = ("--tokenizer-type", "--tokenizer-model")
    made_up = {
        ("--lr",): "--lr 1", ("--train-iters", "--train-samples"): "--train-iters 1",
        ("--data-path", "--train-data-path", "--mock-data"): "--mock-data",
        tokenizer: "--tokenizer-type NullTokenizer",
        ("--vocab-size", "--padded-vocab-size", *tokenizer): f"--vocab-size {VOCAB_SIZE - 1}",
    }  # fmt: skip
    words = [word for names, text in made_up.items() if not given & set(names) for word in text.split()]
    if "--padded-vocab-size" in given and not given & {"--vocab-size", *tokenizer}:
        words += ["--vocab-size", "1"]
    return words


def _flags_of_file(flags: Sequence[str]) -> set[str]:
    words = [part for word in flags for part in word.split("=", 1)]
    if "--config" not in words[:-1]:
        return set()
    found: set[str] = set()
    for key, value in read_yaml(words[words.index("--config") + 1]).items():
        found |= {str(name) for name in value} if isinstance(value, dict) else {key}
    return {"--" + name.replace("_", "-") for name in found}


def given_number(words: Sequence[str], flag: str) -> int | None:
    """The last value of a flag, if it is given here and is a number."""
    values = [value for name, value in itertools.pairwise(words) if name == flag]
    values += [word.partition("=")[2] for word in words if word.startswith(flag + "=")]
    return int(values[-1]) if values and values[-1].isdigit() else None


def _with_vocabulary(config: RunConfig) -> ResolvedConfig:
    size = (config.data.vocab_size or VOCAB_SIZE - 1) + 1  # NullTokenizer has an id beyond, for the end of a document
    return (with_tuned_stages(config) if config.training.tune_exit else config).resolved(size)


def _ignore(message: str) -> None:
    pass
