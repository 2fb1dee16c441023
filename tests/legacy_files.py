"""Checkpoints of the original EE-LLM in other layouts than the fixtures: packed anew, cut to their first stages, with
exits that tuning has changed. The pages of the format say how; nothing here is shared with the code under test but the
reader of pickles."""

from __future__ import annotations

import copy
import functools
import re
import tarfile
import tempfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.enums import ModelType
from torch import Tensor

from megatron.early_exit.checkpoint.legacy_files import read_file

_ARCHIVES = Path(__file__).resolve().parent / "fixtures" / "legacy"
VOCAB_SIZE = 128
"""Ids in the fixtures; with NullTokenizer the last is the end of a document."""
_EMBEDDING, _FINAL_NORM, _OUTPUT = "embedding.word_embeddings.weight", "final_norm.weight", "output_layer.weight"
_OF_EXITS = ("exit_norm.", "exit_block.", "mlp.branch.")


@functools.cache
def legacy_checkpoint(variant: str) -> Path:
    """Folder of one of the real checkpoints, with `expected_logits.npz` beside its iteration; to be read only, and gone
    when this process ends."""
    with tarfile.open(_ARCHIVES / f"{variant}.tar.xz") as archive:
        archive.extractall(_unpacked().name, filter="data")
    return Path(_unpacked().name, variant)


@functools.cache
def _unpacked() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="legacy_checkpoints_")


@dataclass
class LegacyModel:
    """A whole model as the original names it, without its division into stages."""

    args: Namespace
    ranks: list[dict[str, Tensor]]
    """Of every tensor-parallel rank: `layers.N.*` with N from 1, `exit_output.N` of the exit at layer N, the others."""

    @classmethod
    def of_fixture(cls, variant: str) -> LegacyModel:
        """One of the real checkpoints, of any layout."""
        folder = legacy_checkpoint(variant) / "iter_0000002"
        stages: dict[str, list[Path]] = {}
        for path in sorted(folder.glob("mp_rank_*")):
            stages.setdefault(path.name[:10], []).append(path / "model_optim_rng.pt")
        ranks = [_joined([read_file(path) for path in paths]) for paths in stages.values()]
        return cls(copy.deepcopy(read_file(next(iter(stages.values()))[0])["args"]), ranks)

    @property
    def exit_layers(self) -> list[int]:
        """In the order of the command line."""
        return self.args.exit_layer_nums

    def copy(self) -> LegacyModel:
        return copy.deepcopy(self)

    def without_exits(self, layers: Sequence[int] | None = None) -> LegacyModel:
        """Plain at `layers` (default: everywhere)."""
        model = self.copy()
        gone = set(self.exit_layers if layers is None else layers)
        of_gone = lambda name: (m := re.match(r"(?:layers|exit_output)\.(\d+)", name)) and int(m[1]) in gone
        is_exits = lambda name: name.startswith("exit_output.") or any(part in name for part in _OF_EXITS)
        model.ranks = [
            {
                name.replace("mlp.trunk.", "mlp.") if of_gone(name) else name: tensor
                for name, tensor in rank.items()
                if not (of_gone(name) and is_exits(name))
            }
            for rank in self.ranks
        ]
        model.args.exit_layer_nums = [layer for layer in self.exit_layers if layer not in gone]
        for name in ("exit_layer_weight", "exit_layer_weight_init", "exit_layer_temperature"):
            setattr(model.args, name, [])  # as the original's converter leaves them
        return model

    def split(self) -> LegacyModel:
        """One tensor-parallel rank divided among two."""
        (whole,) = self.ranks
        model = self.copy()
        model.ranks = [{name: _part(name, tensor, rank) for name, tensor in whole.items()} for rank in range(2)]
        model.args.tensor_model_parallel_size = 2
        return model

    def whole(self) -> LegacyModel:
        """The inverse of `split`."""
        model = self.copy()
        model.ranks = [{name: _put_together(name, [rank[name] for rank in self.ranks]) for name in self.ranks[0]}]
        model.args.tensor_model_parallel_size = 1
        return model

    def tune_exits(self, layers: Sequence[int]) -> LegacyModel:
        """As tuning would: changes everything that belongs to the exits at `layers`, and nothing else."""
        model = self.copy()
        generator = torch.Generator().manual_seed(7)
        for rank in model.ranks:
            for name, tensor in rank.items():
                is_exits = name.startswith("exit_output.") or any(part in name for part in _OF_EXITS)
                if is_exits and int(name.split(".")[1]) in layers:
                    # Norms are alike on all ranks.
                    noise = torch.Generator().manual_seed(3) if "norm" in name else generator
                    rank[name] = tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=noise) + 0.01
        return model

    def save(self, folder: Path, num_stages: int = 1, keep: int | None = None) -> Path:
        """Write it with `num_stages` pipeline stages, of which the first `keep` are saved (as --tune-exit does)."""
        args = copy.deepcopy(self.args)
        args.pipeline_model_parallel_size = args.transformer_pipeline_model_parallel_size = num_stages
        args.tune_exit, args.tune_exit_pipeline_parallel_size = keep is not None, keep or 1
        args.model_type = ModelType.encoder_or_decoder  # under the name that it has in real files
        for tp_rank, tensors in enumerate(self.ranks):
            for stage in range(keep or num_stages):
                name = f"mp_rank_{tp_rank:02d}" + (f"_{stage:03d}" if num_stages > 1 else "")
                path = folder / "iter_0000007" / name / "model_optim_rng.pt"
                path.parent.mkdir(parents=True)
                model = _stage_of(tensors, args, stage, num_stages)
                torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 7, "model": model}, path)
        (folder / "latest_checkpointed_iteration.txt").write_text("7")
        return folder


def _joined(files: list[dict[str, Any]]) -> dict[str, Tensor]:
    """All stages of one rank."""
    args = files[0]["args"]
    per_stage = args.num_layers // len(files)
    tensors: dict[str, Tensor] = {}
    for stage, file in enumerate(files):
        model = file["model"]["language_model"]
        here = range(stage * per_stage + 1, (stage + 1) * per_stage + 1)
        for name, tensor in model["encoder"].items():
            match = re.match(r"layers\.(\d+)\.(.*)", name)
            tensors[f"layers.{here[int(match[1])]}.{match[2]}" if match else name] = tensor
        mine = [layer for layer in args.exit_layer_nums if layer in here]
        for name, tensor in model.get("exit_output_layer", {}).items():
            tensors[f"exit_output.{mine[int(name.split('.')[0])]}"] = tensor
        if "embedding" in model:
            tensors[_EMBEDDING] = model["embedding"]["word_embeddings"]["weight"]
        if "output_layer" in model:
            tensors[_OUTPUT] = model["output_layer"]["weight"]
    return tensors


def _part(name: str, tensor: Tensor, rank: int) -> Tensor:
    if "dense_h_to_4h" in name:  # gate and up of swiglu: each rank has a part of both
        return torch.cat([half.chunk(2)[rank] for half in tensor.chunk(2)])
    if "dense_4h_to_h" in name or "self_attention.dense" in name:
        return tensor.chunk(2, 1)[rank].contiguous()
    return tensor if "norm" in name else tensor.chunk(2)[rank].contiguous()


def _put_together(name: str, parts: list[Tensor]) -> Tensor:
    if len(parts) == 1 or "norm" in name:
        return parts[0]
    if "dense_h_to_4h" in name:
        return torch.cat([part.chunk(2)[half] for half in range(2) for part in parts])
    return torch.cat(parts, 1 if "dense_4h_to_h" in name or "self_attention.dense" in name else 0)


def _stage_of(tensors: dict[str, Tensor], args: Namespace, stage: int, num_stages: int) -> dict[str, Any]:
    per_stage = args.num_layers // num_stages
    here = range(stage * per_stage + 1, (stage + 1) * per_stage + 1)
    encoder = OrderedDict()
    for name, tensor in tensors.items():
        match = re.match(r"layers\.(\d+)\.(.*)", name)
        if match and int(match[1]) in here:
            encoder[f"layers.{here.index(int(match[1]))}.{match[2]}"] = tensor
    model: dict[str, Any] = {"language_model": {"encoder": encoder}}
    language_model, mine = model["language_model"], [layer for layer in args.exit_layer_nums if layer in here]
    if stage == 0:
        names = [name.split(".")[1] for name in tensors if name.startswith("embedding.")]
        of = lambda name: OrderedDict(weight=tensors[f"embedding.{name}.weight"])
        language_model["embedding"] = {name: of(name) for name in names}
    if stage == num_stages - 1:
        encoder[_FINAL_NORM] = tensors[_FINAL_NORM]
        if args.untie_embeddings_and_output_weights:
            language_model["output_layer"] = OrderedDict(weight=tensors[_OUTPUT])
    if mine and args.untie_exit_output_weights:
        outputs = [(f"{i}.weight", tensors[f"exit_output.{layer}"]) for i, layer in enumerate(mine)]
        language_model["exit_output_layer"] = OrderedDict(outputs)
    has_copy = stage > 0 and (mine or stage == num_stages - 1)
    if has_copy and not args.untie_embeddings_and_output_weights:
        model["word_embeddings_for_head"] = OrderedDict(weight=tensors[_EMBEDDING])
    return model


# Our names, for the reference model

_MODULES = {
    "input_norm": "input_layernorm",
    "self_attention.query_key_value": "self_attention.linear_qkv",
    "self_attention.dense": "self_attention.linear_proj",
    "post_attention_norm": "pre_mlp_layernorm",
    "mlp.dense_h_to_4h": "mlp.linear_fc1",
    "mlp.dense_4h_to_h": "mlp.linear_fc2",
    "mlp.trunk.dense_h_to_4h": "mlp.linear_fc1",
    "mlp.trunk.dense_4h_to_h": "mlp.linear_fc2",
    "mlp.branch.dense_h_to_4h": "exit_head.mlp.linear_fc1",
    "mlp.branch.dense_4h_to_h": "exit_head.mlp.linear_fc2",
    "exit_norm": "exit_head.norm",
}


def our_parameters(model: LegacyModel) -> dict[str, Tensor]:
    """The whole model under the names of the reference; of one tensor-parallel rank."""
    (tensors,) = model.ranks
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"layers\.(\d+)\.(.*)\.weight", name):
            name = f"decoder.layers.{int(match[1]) - 1}.{_MODULES[match[2]]}.weight"
        elif match := re.fullmatch(r"exit_output\.(\d+)", name):
            name = f"decoder.layers.{int(match[1]) - 1}.exit_head.output_layer.weight"
        elif name == _FINAL_NORM:
            name = "decoder.final_layernorm.weight"
        ours[name] = tensor.float()
    return ours
