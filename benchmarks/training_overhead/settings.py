"""What is measured, and the configuration of every model that is compared."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.config.optimization import OptimizerConfig, TrainingConfig
from megatron.early_exit.config.parallel import ParallelConfig
from megatron.early_exit.config.run import RunConfig


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    device: str = "cpu"
    """cpu or cuda."""

    num_layers: int = 8
    hidden_size: int = 256
    num_attention_heads: int = 8

    vocab_size: tuple[int, ...] = (32768, 49152)
    """Vocabularies. The first is measured with all of `exits`, sequence lengths and numbers of microbatches, the others
    with the first of `exits`."""

    exits: tuple[int, ...] = (1, 2, 3)
    """Numbers of exits."""

    pipeline_model_parallel_size: tuple[int, ...] = (1, 2, 4)
    """Numbers of pipeline stages; one rank each."""

    seq_length: tuple[int, ...] = (256, 128, 512)
    """Sequence lengths (tokens). Time is measured with the first, memory with all."""

    micro_batch_size: int = 2
    """Sequences of one microbatch."""

    num_microbatches: int | None = None
    """Microbatches of an iteration; None: 8 with two stages, else 4. Memory is measured with both, or with twice as
    many as well."""

    iterations: int = 3
    """Timed rounds."""

    warmup_iterations: int = 0
    """Rounds before them, beside the iteration in which memory is measured."""

    threads_per_rank: int = 1
    """Threads of each rank (CPU)."""

    pre_exit: bool = False
    use_exit_norm: bool = False
    use_exit_mlp: bool = False
    use_exit_block: bool = False
    untie_exit_output_weights: bool = False
    untie_embeddings_and_output_weights: bool = False
    bf16: bool = False
    transformer_impl: str = "local"
    """As the flags of the training program."""

    seed: int = 1234
    """Seed of initial weights and tokens."""

    def microbatches(self, num_stages: int) -> int:
        return self.num_microbatches or (8 if num_stages == 2 else 4)

    def exits_with(self, vocab_size: int) -> tuple[int, ...]:
        """Numbers of exits that are measured with this vocabulary."""
        return self.exits if vocab_size == self.vocab_size[0] else self.exits[:1]


QUICK = Settings(
    num_layers=4, hidden_size=64, num_attention_heads=4, vocab_size=(32768,), exits=(1, 2),
    pipeline_model_parallel_size=(1, 2), seq_length=(128, 256), iterations=2,
)  # fmt: skip
"""Shows that everything runs; its times say nothing."""


def problems(settings: Settings) -> list[str]:
    """What is wrong with the settings, in words."""
    found = []
    if not set(settings.exits) <= {1, 2, 3}:
        found.append(f"--exits is {settings.exits}; choose among 1, 2 and 3.")
    if settings.num_layers < 4 or any(settings.num_layers % size for size in settings.pipeline_model_parallel_size):
        found.append(
            f"--num-layers is {settings.num_layers}; it must be at least 4 and a multiple of every "
            f"--pipeline-model-parallel-size {settings.pipeline_model_parallel_size}."
        )
    if settings.num_attention_heads > 0 and settings.hidden_size % settings.num_attention_heads:
        found.append(
            f"--hidden-size is {settings.hidden_size}; it must be a multiple of --num-attention-heads "
            f"{settings.num_attention_heads}."
        )
    if settings.use_exit_mlp and (settings.pre_exit or settings.use_exit_block):
        found.append("--use-exit-mlp goes neither with --pre-exit nor with --use-exit-block.")
    for name in ("hidden_size", "num_attention_heads", "micro_batch_size", "iterations", "threads_per_rank"):
        if getattr(settings, name) < 1:
            found.append(f"--{name.replace('_', '-')} is {getattr(settings, name)}; it must be at least 1.")
    return found


@dataclass(frozen=True)
class Variant:
    """One of the models that are compared."""

    kind: str
    """plain, core, ee or naive."""

    num_exits: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.num_exits}" if self.num_exits else self.kind


def variants(exits: tuple[int, ...]) -> list[Variant]:
    return [Variant("plain"), Variant("core"), *(Variant(kind, n) for n in exits for kind in ("ee", "naive"))]


def exit_layer_nums(settings: Settings, num_exits: int) -> tuple[int, ...]:
    """After 1/4, 2/4, 3/4 of the layers; with pre-exit the same places under the number of the next layer."""
    after = [settings.num_layers * (index + 1) // 4 for index in range(num_exits)]
    return tuple(layer + 1 if settings.pre_exit else layer for layer in after)


def run_config(settings: Settings, num_stages: int, num_exits: int) -> RunConfig:
    exits = ExitConfig()
    if num_exits:
        exits = ExitConfig(
            exit_layer_nums=exit_layer_nums(settings, num_exits),
            pre_exit=settings.pre_exit,
            use_exit_norm=settings.use_exit_norm,
            use_exit_mlp=settings.use_exit_mlp,
            use_exit_block=settings.use_exit_block,
            untie_exit_output_weights=settings.untie_exit_output_weights,
        )
    model = ModelConfig(
        num_layers=settings.num_layers,
        hidden_size=settings.hidden_size,
        num_attention_heads=settings.num_attention_heads,
        position_embedding_type="rope",
        normalization="RMSNorm",
        swiglu=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        untie_embeddings_and_output_weights=settings.untie_embeddings_and_output_weights,
        transformer_impl=settings.transformer_impl,
    )
    training = TrainingConfig(
        seq_length=settings.seq_length[0],
        micro_batch_size=settings.micro_batch_size,
        seed=settings.seed,
        bf16=settings.bf16,
    )
    parallel = ParallelConfig(pipeline_model_parallel_size=num_stages)
    return RunConfig(model, training, OptimizerConfig(lr=1e-4), exits, parallel)
