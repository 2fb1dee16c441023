"""Flags of Megatron-LM and EE-LLM that are no field of ours: other spellings, ignored ones, refused ones.

A launch script of the original must either do the same here or be told, by name, why not. `docs/flags.md` is generated
from these tables.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Alias:
    """Another spelling of a field's flag, or a switch that sets the field to one value."""

    flag: str
    field: str
    value: str | None = None
    """What the switch sets; None if the alias takes the same values as the field's own flag."""


@dataclass(frozen=True)
class FlagNote:
    """A known flag that sets nothing: why it is ignored (`refused=False`) or refused."""

    flag: str
    """Name, or with a trailing `*` every flag that starts like this."""

    reason: str
    refused: bool = False
    harmless_values: tuple[str, ...] = ()
    """Values of a refused flag that ask for what is done anyway; they pass in silence."""

    harmless_with: tuple[str, str] | None = None
    """(field, value): the refused flag is only ignored when the field has this value."""


ALIASES = (
    Alias("--layernorm-epsilon", "norm_epsilon"),
    Alias("--query-key-layer-scaling", "apply_query_key_layer_scaling"),
    Alias("--no-query-key-layer-scaling", "apply_query_key_layer_scaling", "false"),
    Alias("--use-rotary-position-embeddings", "position_embedding_type", "rope"),
    Alias("--recompute-activations", "recompute_granularity", "selective"),
    Alias("--log-timers-to-tensorboard", "log_timers_to_tracker"),
    Alias("--override-opt_param-scheduler", "override_opt_param_scheduler"),
    Alias("--use-checkpoint-opt_param-scheduler", "use_checkpoint_opt_param_scheduler"),
)


def _ignore(reason: str, *flags: str) -> tuple[FlagNote, ...]:
    return tuple(FlagNote(flag, reason) for flag in flags)


def _refuse(reason: str, *flags: str, harmless_values: tuple[str, ...] = ()) -> tuple[FlagNote, ...]:
    return tuple(FlagNote(flag, reason, refused=True, harmless_values=harmless_values) for flag in flags)


IGNORED = (
    *_ignore(
        "attention always runs PyTorch's scaled_dot_product_attention (a flash kernel on GPU), or Transformer Engine's",
        "--use-flash-attn",
        "--use-flash-attn-v2",
        "--attention-backend",
    ),
    *_ignore("the softmax of attention is always computed in fp32 or better", "--attention-softmax-in-fp32"),
    *_ignore("the model is always Megatron-Core's", "--use-mcore-models"),
    *_ignore(
        "kernels are chosen by what is installed; the function is the same",
        "--no-gradient-accumulation-fusion",
        "--no-masked-softmax-fusion",
        "--no-bias-dropout-fusion",
        "--no-bias-gelu-fusion",
        "--no-bias-swiglu-fusion",
        "--no-rope-fusion",
        "--no-persist-layer-norm",
        "--cross-entropy-loss-fusion",
        "--cross-entropy-fusion-impl",
        "--tp-comm-overlap",
        "--enable-cuda-graph",
    ),
    *_ignore("the backend follows the device: nccl on CUDA, gloo on CPU", "--distributed-backend"),
    *_ignore("torchrun gives the local rank in the environment", "--local-rank", "--local_rank"),
    *_ignore("Megatron-Core's DistributedDataParallel is the only one", "--DDP-impl"),
    *_ignore(
        "Megatron-Core decides how communication overlaps; the results are the same",
        "--no-async-tensor-model-parallel-allreduce",
        "--overlap-p2p-communication",
        "--no-overlap-p2p-communication",
        "--no-scatter-gather-tensors-in-pipeline",
        "--no-delay-grad-reduce",
        "--delay-grad-reduce",
        "--align-grad-reduce",
        "--ddp-bucket-size",
        "--no-align-param-gather",
        "--use-ring-exchange-p2p",
    ),
    *_ignore(
        "where initial weights are made follows the device",
        "--use-cpu-initialization",
        "--no-initialization",
    ),
    *_ignore("memory is left to PyTorch's allocator", "--empty-unused-memory-level", "--manual-gc", "--manual-gc-*"),
    *_ignore(
        "timers are those of --log-timers-to-tracker",
        "--timing-log-level",
        "--timing-log-option",
        "--no-barrier-with-level-1-timing",
        "--log-straggler",
    ),
    *_ignore(
        "trackers get what the log line has, at --log-interval",
        "--tracker-log-interval",
        "--tensorboard-log-interval",
        "--tensorboard-queue-size",
        "--log-params-norm",
        "--log-num-zeros-in-grad",
        "--log-batch-size-to-*",
        "--log-validation-ppl-to-*",
        "--log-memory-to-*",
        "--log-world-size-to-*",
        "--log-learning-rate-to-*",
        "--no-log-learnig-rate-to-*",
        "--no-log-learning-rate-to-*",
        "--log-loss-scale-to-*",
        "--no-log-loss-scale-to-*",
        "--log-progress",
    ),
    *_ignore("there is no profiler inside; run nsys or py-spy around the command", "--profile", "--profile-*"),
    *_ignore("a gradient norm that is no number ends the run", "--no-check-for-nan-in-loss-and-grad"),
    *_ignore(
        "data files are memory-mapped and masks built where attention needs them",
        "--mmap-warmup",
        "--no-mmap-bin-files",
        "--no-create-attention-mask-in-dataloader",
        "--num-dataset-builder-threads",
    ),
    *_ignore(
        "checkpoints are always distributed ones that load under any layout",
        "--use-dist-ckpt",
        "--auto-detect-ckpt-format",
        "--ckpt-fully-parallel-*",
        "--no-ckpt-fully-parallel-*",
        "--ckpt-assume-constant-structure",
        "--dist-ckpt-strictness",
    ),
    *_ignore("the tokenizers are Megatron-Core's", "--legacy-tokenizer"),
)


REFUSED = (
    *_refuse(
        "context parallelism is not supported: exits cut chunks from whole sequences; use --sequence-parallel",
        "--context-parallel-size",
        harmless_values=("1",),
    ),
    *_refuse("context parallelism is not supported", "--cp-comm-type", "--hierarchical-context-parallel-sizes"),
    *_refuse("mixture of experts is not supported: layers are dense", "--num-experts", "--moe-*", "--expert-parallel"),
    *_refuse(
        "mixture of experts is not supported, so there are no experts to share",
        "--expert-model-parallel-size",
        "--expert-tensor-parallel-size",
        harmless_values=("1",),
    ),
    *_refuse(
        "FP8 and FP4 training are not supported; use --bf16", "--fp8", "--fp8-*", "--no-fp8-*", "--fp4", "--fp4-*"
    ),
    *_refuse(
        "multi-token prediction is not supported: its heads would stand behind the last exit",
        "--mtp-*",
        harmless_values=("0",),
    ),
    *_refuse("multi-latent attention is not supported", "--multi-latent-attention"),
    *_refuse(
        "GPT2BPETokenizer's two files are no longer read; save a tokenizer folder with them and give"
        " --tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER",
        "--vocab-file",
        "--merge-file",
    ),
    *_refuse("T5's sentinel tokens have no use in a GPT", "--vocab-extra-ids", harmless_values=("0",)),
    *_refuse("only .bin/.idx files are read (tools/preprocess_data.py)", "--data-impl", harmless_values=("mmap",)),
    *_refuse(
        "give --train-data-path, --valid-data-path and --test-data-path",
        "--data-args-path",
        "--per-split-data-args-path",
    ),
    *_refuse("the data loader is Megatron's `single` one", "--dataloader-type", harmless_values=("single",)),
    *_refuse("the name is --num-layers-per-virtual-pipeline-stage", "--num-layers-per-stage"),
    *_refuse(
        "give the layers of one chunk with --num-layers-per-virtual-pipeline-stage, or of every chunk with"
        " --pipeline-model-parallel-layout",
        "--num-virtual-stages-per-pipeline-rank",
    ),
    *_refuse(
        "the embedding and the loss count as no layers; give fewer layers to the first or the last stage with"
        " --decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers",
        "--account-for-*",
    ),
    *_refuse(
        "every stage has a layer: the first one has the embedding, the last one the loss",
        "--standalone-embedding-stage",
    ),
    *_refuse("a GPT has one stack of layers, without an encoder", "--pipeline-model-parallel-split-rank"),
    *_refuse(
        "parameters are gathered after the optimizer step: core waits for a gather when a module runs, and exits use"
        " output weights in the backward pass without running their module",
        "--overlap-param-gather",
        "--overlap-param-gather-with-optimizer-step",
    ),
    *_refuse("ranks are ordered tensor, data, pipeline", "--use-tp-pp-dp-mapping"),
    *_refuse("a GPT has one sequence length: --seq-length", "--encoder-seq-length", "--decoder-seq-length"),
    *_refuse("a GPT has one stack of layers: --num-layers", "--encoder-num-layers", "--decoder-num-layers"),
    *_refuse("Megatron's own old models are gone; the model is Megatron-Core's", "--use-legacy-models"),
    *_refuse("layer specs are built from --transformer-impl and the exits", "--spec", "--model-spec"),
    *_refuse("the activation is GELU, or SwiGLU with --swiglu", "--squared-relu", "--quick-geglu"),
    *_refuse(
        "this variant of the layer is not supported",
        "--apply-layernorm-1p",
        "--apply-residual-connection-post-layernorm",
        "--window-size",
        "--fp32-residual-connection",
        "--fp16-lm-cross-entropy",
    ),
    *_refuse("rotary positions turn channels i and i + d/2 together", "--rotary-interleaved"),
    FlagNote(
        "--no-position-embedding",
        "a model without position embeddings is not supported; with --position-embedding-type rope the flag changes"
        " nothing",
        refused=True,
        harmless_with=("position_embedding_type", "rope"),
    ),
    *_refuse(
        "initial weights are normal with --init-method-std, equal on all replicas",
        "--init-method-xavier-uniform",
        "--data-parallel-random-init",
    ),
    *_refuse("recomputed activations are not distributed; use --sequence-parallel", "--distribute-saved-activations"),
    *_refuse("weight decay is constant: --weight-decay", "--weight-decay-incr-style", harmless_values=("constant",)),
    *_refuse("weight decay is constant: --weight-decay", "--start-weight-decay", "--end-weight-decay"),
    *_refuse("use --lr-decay-style constant, linear, cosine or inverse-square-root", "--lr-wsd-*"),
    *_refuse(
        "memory sharing beyond --use-distributed-optimizer is not supported",
        "--use-*-fsdp*",
        "--data-parallel-sharding-*",
    ),
    *_refuse(
        "the global batch size must be divisible by micro batch size x data-parallel size",
        "--decrease-batch-size-if-needed",
    ),
    *_refuse(
        "checkpoints have the format torch_dist", "--ckpt-format", "--dist-ckpt-format", harmless_values=("torch_dist",)
    ),
    *_refuse(
        "all checkpoints are kept alike; --keep-last N removes older ones",
        "--non-persistent-*",
        "--ckpt-convert-*",
    ),
    *_refuse("this program trains; evaluation has tools of its own", "--skip-train"),
    *_refuse("give the YAML file with --config", "--yaml-cfg"),
    *_refuse("retrieval models are not supported", "--retro-*"),
    *_refuse(
        "this program trains GPT and Llama models; the flag is for BERT, T5, retrievers or images",
        "--bert-*",
        "--biencoder-*",
        "--block-data-path",
        "--classes-fraction",
        "--data-per-class-fraction",
        "--dino-*",
        "--embedding-path",
        "--evidence-data-path",
        "--head-lr-mult",
        "--ict-*",
        "--img-*",
        "--indexer-*",
        "--iter-per-epoch",
        "--mask-factor",
        "--mask-prob",
        "--mask-type",
        "--no-data-sharding",
        "--num-channels",
        "--num-classes",
        "--output-bert-embeddings",
        "--patch-dim",
        "--query-in-block-prob",
        "--retriever-*",
        "--sample-rate",
        "--short-seq-prob",
        "--swin-*",
        "--titles-data-path",
        "--use-one-sent-docs",
        "--vision-*",
    ),
    *_refuse(
        "this program trains; tools/run_text_generation_server.py has --max-length and --max-requests",
        "--inference-batch-times-seqlen-threshold",
        "--max-tokens-to-oom",
    ),
    *_refuse("the program connects its processes itself", "--lazy-mpu-init"),
    *_refuse("there is no export to ONNX", "--onnx-safe"),
    *_refuse("the cluster manager should send SIGTERM; use --exit-signal-handler", "--adlr-autoresume*"),
    *_refuse("the name is --micro-batch-size", "--batch-size"),
    *_refuse("the name is --lr-warmup-iters, --lr-warmup-samples or --lr-warmup-fraction", "--warmup"),
    *_refuse("the name is --tensor-model-parallel-size", "--model-parallel-size"),
    *_refuse(
        "the name is --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "--checkpoint-activations",
    ),
)

REFUSED_VALUES = {
    ("tokenizer_type", "GPT2BPETokenizer"): "give HuggingFaceTokenizer and a folder with vocab.json and merges.txt",
    ("position_embedding_type", "none"): "a model without position embeddings is not supported",
    ("lr_decay_style", "WSD"): "the decay styles are those of EE-LLM",
}
"""(field, value) pairs that Megatron has and we do not, with what to do instead."""


def note_of(flag: str) -> FlagNote | None:
    """The note on `flag` (`--kebab-case`), or None. Exact names go before patterns."""
    notes = (*IGNORED, *REFUSED)
    exact = [note for note in notes if note.flag == flag]
    matching = exact or [note for note in notes if "*" in note.flag and fnmatch.fnmatchcase(flag, note.flag)]
    return matching[0] if matching else None


def is_harmless(note: FlagNote, values: Sequence[str]) -> bool:
    """Whether these values of a refused flag ask for what is done anyway."""
    return len(values) == 1 and values[0] in note.harmless_values
