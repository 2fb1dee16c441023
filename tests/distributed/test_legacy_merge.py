"""Checkpoints of partial tuning, merged with the model that they were tuned from: every head says what it should."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron.early_exit.checkpoint import writing
from megatron.early_exit.checkpoint.convert_command import main
from megatron.early_exit.checkpoint.legacy import _flatten, read_partial
from megatron.early_exit.checkpoint.legacy_files import read_file
from megatron.early_exit.checkpoint.legacy_merge import merge_partial
from megatron.early_exit.checkpoint.store import read_checkpoint
from megatron.early_exit.checkpoint.tensors import LazyTensor, Tensors
from megatron.early_exit.config.checkpoint_choice import checkpoint_folder
from megatron.early_exit.config.exits import ExitHeadKind
from tests.distributed.engines import head_logits
from tests.distributed.workers import run_distributed
from tests.legacy_files import VOCAB_SIZE, LegacyModel, legacy_checkpoint, our_parameters
from tests.reference import ReferenceBatch, ReferenceModel

NUMBERS = ("--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB_SIZE - 1))


@dataclass(frozen=True)
class Case:
    variant: str
    """A fixture, untouched."""
    num_stages: int
    keep: int
    """Stages that the tuned checkpoint has, of `num_stages`; layers are 4."""
    base: str
    """fixture; or plain, ours, ...: see `save_base`."""
    tp_size: int = 1
    """Of the tuned checkpoint, if the fixture has one tensor-parallel rank."""
    left_out: tuple[int, ...] = ()
    """Exits of the fixture that neither side has."""


CASES = (
    Case("pp4tied", 4, 2, "fixture"),
    Case("pp4tied", 4, 3, "plain in 2 stages"),
    Case("tied", 2, 1, "ours"),
    Case("norm", 2, 1, "fixture"),
    Case("norm", 4, 3, "plain in 2 stages"),
    Case("norm", 4, 3, "fixture", tp_size=2),
    Case("mlp", 2, 1, "ours"),
    Case("mlp", 2, 1, "plain of ours", left_out=(3,)),
    Case("mlp", 4, 2, "plain in 2 stages", tp_size=2, left_out=(3,)),
    Case("mlp", 4, 2, "with exits, 2 ranks in 4 stages"),
    Case("tp2", 2, 1, "fixture"),
)


def save_base(kind: str, variant: str, folder: Path) -> Path:
    """The model that was tuned, as one of several kinds of checkpoints."""
    original = LegacyModel.of_fixture(variant)
    if kind == "fixture":
        return legacy_checkpoint(variant)
    if kind == "plain in 2 stages":
        return original.without_exits().save(folder, num_stages=2)
    if kind == "with exits, 2 ranks in 4 stages":
        return original.split().save(folder, num_stages=4)
    if kind == "plain of ours":
        return convert("--load", original.without_exits().save(folder / "plain"), "--save", folder / "ours")
    return convert("--load", legacy_checkpoint(variant), "--save", folder / "ours")


def convert(*words: object) -> Path:
    """Runs from-legacy; returns the folder that it writes."""
    assert main(["from-legacy", *map(str, words), *NUMBERS]) == 0
    return Path(str(words[words.index("--save") + 1]))


def refusal(capsys: pytest.CaptureFixture, *words: object) -> str:
    """What from-legacy says when it refuses. It writes nothing."""
    save = Path(str(words[words.index("--save") + 1]))
    capsys.readouterr()
    assert main(["from-legacy", *map(str, words), *NUMBERS]) == 2
    assert not save.exists() or not any(save.iterdir())
    return capsys.readouterr().err


def tensors_of(save: Path) -> dict[str, Tensor]:
    return {name: tensor.read() for name, tensor in read_checkpoint(checkpoint_folder(save))[1].items()}


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def reference_logits(model: LegacyModel, save: Path, tokens: list[list[int]]) -> dict[str, Tensor]:
    """[sequences, positions, vocabulary] by head, in plain PyTorch from the original's tensors. save: for the settings,
    which tests of whole checkpoints compare with the original."""
    config = read_checkpoint(checkpoint_folder(save))[0]
    reference = ReferenceModel(config, VOCAB_SIZE)
    reference.params = our_parameters(model)
    ids = torch.tensor(tokens)
    positions = torch.arange(ids.size(1)).expand_as(ids)
    with torch.no_grad():
        logits = reference.logits(ReferenceBatch(ids, ids, torch.ones_like(ids), positions))
    return dict(zip([f"exit_{layer}" for layer in config.exits.exit_layer_nums] + ["final"], logits, strict=True))


def assert_same_logits(ours: Tensor, theirs: Tensor) -> None:
    ours, theirs = ours[..., : VOCAB_SIZE - 1], theirs[..., : VOCAB_SIZE - 1]
    assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.variant} {case.keep} of {case.num_stages}, {case.base}"
)
def test_every_head_says_what_it_should(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    original = LegacyModel.of_fixture(case.variant)
    here = range(1, 4 * case.keep // case.num_stages + 1)
    tuned = original.tune_exits(here)
    partial = (tuned.split() if case.tp_size == 2 else tuned).save(tmp_path / "tuned", case.num_stages, case.keep)
    base = save_base(case.base, case.variant, tmp_path / "base")
    save = convert("--load", partial, "--base", base, "--save", tmp_path / "merged")
    said_on_the_way = capsys.readouterr().err
    assert ("no exits at layers 3: the checkpoint that was tuned names them" in said_on_the_way) == bool(case.left_out)

    expected = tuned.without_exits(case.left_out)
    by_hand = convert("--load", expected.save(tmp_path / "by_hand"), "--save", tmp_path / "ours_by_hand")
    assert_same_tensors(tensors_of(save), tensors_of(by_hand))

    fixture = np.load(legacy_checkpoint(case.variant) / "expected_logits.npz")
    tokens, positions = fixture["tokens"].tolist(), fixture["positions"]
    (said,) = run_distributed(1, head_logits, folder=save, tokens=tokens)
    wanted = reference_logits(expected.whole(), save, tokens)
    assert said.keys() == wanted.keys() == {"exit_2", "exit_3", "final"} - {f"exit_{n}" for n in case.left_out}
    for name, logits in said.items():
        assert_same_logits(logits, wanted[name])
        is_tuned = name != "final" and int(name[-1]) in here and "tied" not in case.variant
        if not is_tuned:
            assert_same_logits(logits[:, positions], torch.from_numpy(fixture[name]))
        else:
            differences = (logits[:, positions] - torch.from_numpy(fixture[name]))[..., : VOCAB_SIZE - 1]
            assert differences.abs().max() > 0.01


def test_files_made_for_tests_are_like_real_ones(tmp_path: Path) -> None:
    def content(folder: Path) -> dict[str, dict[str, Tensor]]:
        files = sorted(folder.glob("*/*/model_optim_rng.pt"))
        return {path.parent.name: _flatten(read_file(path)["model"]) for path in files}

    for variant, num_stages in (("tied", 1), ("norm", 1), ("mlp", 1), ("tp2", 1), ("pp4tied", 4)):
        real = content(legacy_checkpoint(variant))
        made = content(LegacyModel.of_fixture(variant).save(tmp_path / variant, num_stages))
        assert real.keys() == made.keys()
        for name in real:
            assert_same_tensors(real[name], made[name])
    shapes = lambda files: {rank: {name: tensor.shape for name, tensor in of.items()} for rank, of in files.items()}
    split = LegacyModel.of_fixture("mlp").split()
    assert shapes(content(split.save(tmp_path / "split"))) == shapes(content(legacy_checkpoint("tp2")))
    assert_same_tensors(split.whole().ranks[0], LegacyModel.of_fixture("mlp").ranks[0])
    # One stage of several has the number of the stage in its name.
    one = split.save(tmp_path / "one", 2, 1)
    assert sorted(content(one)) == ["mp_rank_00_000", "mp_rank_01_000"]


def test_an_output_weight_of_its_own_and_learned_positions(tmp_path: Path) -> None:
    model = LegacyModel.of_fixture("norm")
    model.args.untie_embeddings_and_output_weights, model.args.position_embedding_type = True, "learned_absolute"
    generator, (rank,) = torch.Generator().manual_seed(1), model.ranks
    rank["output_layer.weight"] = 0.2 * torch.randn(VOCAB_SIZE, 64, generator=generator)
    length = model.args.max_position_embeddings
    rank["embedding.position_embeddings.weight"] = 0.2 * torch.randn(length, 64, generator=generator)
    tuned = model.tune_exits([2])
    partial, base = tuned.save(tmp_path / "tuned", 4, 2), model.save(tmp_path / "base", 2)
    save = convert("--load", partial, "--base", base, "--save", tmp_path / "merged")
    tokens = np.load(legacy_checkpoint("norm") / "expected_logits.npz")["tokens"].tolist()
    (said,) = run_distributed(1, head_logits, folder=save, tokens=tokens)
    for name, logits in reference_logits(tuned, save, tokens).items():
        assert_same_logits(said[name], logits)
    rank["embedding.position_embeddings.weight"][3, 3] += 1
    base = model.save(tmp_path / "other")
    words = ["--load", partial, "--base", base, "--save", tmp_path / "refused", *NUMBERS]
    assert main(["from-legacy", *map(str, words)]) == 2


def test_exits_of_a_stage_in_the_order_of_the_command_line(tmp_path: Path) -> None:
    original = LegacyModel.of_fixture("norm")
    for rank in original.ranks:
        rank["layers.1.exit_norm.weight"] = rank.pop("layers.3.exit_norm.weight")
        rank["exit_output.1"] = rank.pop("exit_output.3")
    original.args.exit_layer_nums, original.args.exit_layer_weight = [2, 1], [0.2, 0.1]
    original.args.exit_layer_temperature = [1.0, 1.0]
    tuned = original.tune_exits([1, 2])
    base = original.without_exits().save(tmp_path / "base")
    save = convert("--load", tuned.save(tmp_path / "tuned", 2, 1), "--base", base, "--save", tmp_path / "merged")
    config, tensors = read_checkpoint(checkpoint_folder(save))
    assert config.exits.exit_layer_nums == (1, 2) and config.exits.exit_layer_weight == (0.1, 0.2)
    for layer in (1, 2):
        name = f"decoder.layers.{layer - 1}.exit_head.output_layer.weight"
        assert torch.equal(tensors[name].read(), tuned.ranks[0][f"exit_output.{layer}"])


def test_settings_of_exits_come_from_where_the_exits_do(tmp_path: Path) -> None:
    original = LegacyModel.of_fixture("norm")
    original.args.exit_layer_weight, original.args.exit_layer_temperature = [0.1, 0.2], [1.0, 2.0]
    base = convert("--load", original.save(tmp_path / "base"), "--save", tmp_path / "ours")
    tuned = original.tune_exits([2])
    tuned.args.exit_layer_weight, tuned.args.exit_layer_temperature = [0.7, 0.8], [3.0, 4.0]
    save = convert("--load", tuned.save(tmp_path / "tuned", 2, 1), "--base", base, "--save", tmp_path / "merged")
    exits = read_checkpoint(checkpoint_folder(save))[0].exits
    assert exits.exit_layer_weight == (0.7, 0.2) and exits.exit_layer_temperature == (3.0, 2.0)


def test_the_file_of_our_base_is_linked(tmp_path: Path) -> None:
    base = convert("--load", legacy_checkpoint("norm"), "--save", tmp_path / "base")
    partial = LegacyModel.of_fixture("norm").tune_exits([2]).save(tmp_path / "tuned", 2, 1)
    save = convert("--load", partial, "--base", base, "--save", tmp_path / "merged")
    (linked,) = checkpoint_folder(save).glob("linked_*.distcp")
    assert any(linked.samefile(path) for path in checkpoint_folder(base).glob("*.distcp"))
    own = sum(path.stat().st_size for path in checkpoint_folder(save).glob("__*.distcp"))
    # The exit's output weight, its norm and what the format adds, which is less than any other weight.
    assert 0 < own - VOCAB_SIZE * 64 * 4 < 64 * 64 * 4
    before = tensors_of(save)
    shutil.rmtree(base)
    assert_same_tensors(tensors_of(save), before)


def test_exits_of_the_base_on_the_layers_that_were_tuned_give_way(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    partial = LegacyModel.of_fixture("norm").tune_exits([2]).save(tmp_path / "tuned", 2, 1)
    ours = convert("--load", legacy_checkpoint("norm"), "--save", tmp_path / "ours")
    kind = ["--untie-exit-output-weights", "--use-exit-norm"]
    base = tmp_path / "base"
    assert main(["add-exits", "--load", str(ours), "--save", str(base), "--exit-layer-nums", "1", "4", *kind]) == 0
    save = convert("--load", partial, "--base", base, "--save", tmp_path / "merged")
    assert "no exits at layers 1: the base has them" in capsys.readouterr().err
    assert read_checkpoint(checkpoint_folder(save))[0].exits.exit_layer_nums == (2, 3, 4)
    merged, of_base = tensors_of(save), tensors_of(base)
    assert {name for name in of_base if name not in merged} == {
        f"decoder.layers.0.exit_head.{name}.weight" for name in ("norm", "output_layer")
    }
    name = "decoder.layers.3.exit_head.output_layer.weight"
    assert torch.equal(merged[name], of_base[name])


WRONG: dict[str, tuple[str, Callable[[Tensor], None]]] = {
    r"decoder\.layers\.1\.mlp\.linear_fc1\.weight \(layer 2\) differs": (
        "layers.2.mlp.trunk.dense_h_to_4h.weight",
        lambda tensor: tensor[3, 5].mul_(1.001),
    ),
    r"decoder\.layers\.0\.self_attention\.linear_proj\.weight \(layer 1\) differs": (
        "layers.1.self_attention.dense.weight",
        lambda tensor: tensor.mul_(2),
    ),
    r"embedding\.word_embeddings\.weight differs": ("embedding.word_embeddings.weight", lambda tensor: tensor.add_(1)),
}


@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("is_ours", [False, True], ids=["of EE-LLM", "ours"])
def test_a_wrong_base_is_refused(message: str, is_ours: bool, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    original = LegacyModel.of_fixture("mlp")
    partial = original.tune_exits([2]).split().save(tmp_path / "tuned", 2, 1)
    other, (name, change) = original.copy(), WRONG[message]
    change(other.ranks[0][name])
    # What comes later, in the layers or in the order of the comparison, is not what is named.
    other.ranks[0]["layers.2.mlp.trunk.dense_4h_to_h.weight"].mul_(2)
    other.ranks[0]["layers.3.input_norm.weight"].mul_(2)
    base = other.save(tmp_path / "base")
    if is_ours:
        base = convert("--load", base, "--save", tmp_path / "base_of_ours")
    said = refusal(capsys, "--load", partial, "--base", base, "--save", tmp_path / "merged")
    assert re.search(f"is not the model that .*tuned.* was tuned from: .* but {message}", said)


def test_the_sign_of_a_zero_makes_a_wrong_base(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    original = LegacyModel.of_fixture("norm")
    original.ranks[0]["layers.2.input_norm.weight"][7] = 0.0
    partial = original.tune_exits([2]).save(tmp_path / "tuned", 2, 1)
    original.ranks[0]["layers.2.input_norm.weight"][7] = -0.0
    base = original.save(tmp_path / "base")
    said = refusal(capsys, "--load", partial, "--base", base, "--save", tmp_path / "merged")
    assert "decoder.layers.1.input_layernorm.weight (layer 2) differs" in said


def test_a_later_layer_is_the_bases(tmp_path: Path) -> None:
    original = LegacyModel.of_fixture("norm")
    partial = original.tune_exits([2]).save(tmp_path / "tuned", 2, 1)
    original.ranks[0]["layers.3.input_norm.weight"].mul_(2)
    base = original.save(tmp_path / "base", 4)
    merged = tensors_of(convert("--load", partial, "--base", base, "--save", tmp_path / "merged"))
    name = "layers.3.input_norm.weight"
    assert torch.equal(merged["decoder.layers.2.input_layernorm.weight"], original.ranks[0][name])


def test_the_output_weight_of_a_tied_exit_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    original = LegacyModel.of_fixture("pp4tied")
    partial = original.save(tmp_path / "tuned", 4, 2)
    path = partial / "iter_0000007" / "mp_rank_00_001" / "model_optim_rng.pt"
    with torch.serialization.safe_globals([type(original.args), type(original.args.model_type)]):
        content = torch.load(path, weights_only=False)
    content["model"]["word_embeddings_for_head"]["weight"][5] += 1
    torch.save(content, path)
    said = refusal(capsys, "--load", partial, "--base", legacy_checkpoint("pp4tied"), "--save", tmp_path / "merged")
    assert "word_embeddings_for_head.weight of pipeline stage 1 differs" in said


def test_another_architecture_is_refused_with_all_differences(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    original = LegacyModel.of_fixture("norm")
    partial = original.tune_exits([2]).save(tmp_path / "tuned", 2, 1)
    other = original.without_exits([3])
    other.args.norm_epsilon, other.args.num_attention_heads, other.args.kv_channels = 1e-6, 2, 32
    other.args.num_layers = 3
    for rank in other.ranks:
        for name in list(rank):
            if name.startswith("layers.4."):
                del rank[name]
            elif name in ("embedding.word_embeddings.weight", "exit_output.2"):
                rank[name] = rank[name][:100]
    other.ranks = [{name: tensor.bfloat16() for name, tensor in rank.items()} for rank in other.ranks]
    said = refusal(capsys, "--load", partial, "--base", other.save(tmp_path / "base"), "--save", tmp_path / "merged")
    for line in (
        "num_layers: base 3, tuned 4",
        "num_attention_heads: base 2, tuned 4",
        "kv_channels: base 32, tuned 16",
        "norm_epsilon: base 1e-06, tuned 1e-05",
        "padded_vocab_size: base 100, tuned 128",
        "type of the weights: base bfloat16, tuned float32",
    ):
        assert f"  - {line}\n" in said
    assert said.count("  - ") == 7  # and the heads of keys and values


def test_the_length_that_rotary_positions_were_trained_for_may_differ(tmp_path: Path) -> None:
    original = LegacyModel.of_fixture("norm")
    tuned = original.tune_exits([2])
    tuned.args.max_position_embeddings = tuned.args.seq_length = 32
    partial = tuned.save(tmp_path / "tuned", 2, 1)
    save = convert("--load", partial, "--base", legacy_checkpoint("norm"), "--save", tmp_path / "merged")
    length = read_checkpoint(checkpoint_folder(save))[0].model.max_position_embeddings
    assert length == original.args.max_position_embeddings > 32


def test_later_exits_of_another_kind_stay(tmp_path: Path) -> None:
    original = LegacyModel.of_fixture("norm")
    plain = convert("--load", original.without_exits().save(tmp_path / "plain"), "--save", tmp_path / "ours")
    base = tmp_path / "base"
    words = "--exit-layer-nums 2 3 4 --use-exit-block false false true --exit-uses both both draft".split()
    assert main(["add-exits", "--load", str(plain), "--save", str(base), *words]) == 0
    partial = original.tune_exits([2]).save(tmp_path / "tuned", 2, 1)
    save = convert("--load", partial, "--base", base, "--save", tmp_path / "merged")
    exits = read_checkpoint(checkpoint_folder(save))[0].exits
    assert exits.exit_layer_nums == (2, 3, 4)
    assert exits.heads == (ExitHeadKind(norm=True, untied_output=True), ExitHeadKind(), ExitHeadKind(block=True))
    assert [exits.use_of(index) for index in range(3)] == ["both", "both", "draft"]
    merged, of_base = tensors_of(save), tensors_of(base)
    block = [name for name in of_base if name.startswith("decoder.layers.3.exit_head.")]
    assert block and all(torch.equal(merged[name], of_base[name]) for name in block)


def test_later_exits_on_another_side_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    original = LegacyModel.of_fixture("norm")
    plain = convert("--load", original.without_exits().save(tmp_path / "plain"), "--save", tmp_path / "ours")
    base = tmp_path / "base"
    words = ["--exit-layer-nums", "2", "3", "4", "--pre-exit"]
    assert main(["add-exits", "--load", str(plain), "--save", str(base), *words]) == 0
    partial = original.tune_exits([2]).save(tmp_path / "tuned", 2, 1)
    said = refusal(capsys, "--load", partial, "--base", base, "--save", tmp_path / "merged")
    assert "those that the base has at layers 3 4 are on another than those that were tuned" in said
    assert "(pre_exit: base True, tuned False)" in said
    # What it says to do works.
    without = tmp_path / "without"
    assert main(["remove-exits", "--load", str(base), "--save", str(without), "--exit-layer-nums", "3", "4"]) == 0
    save = convert("--load", partial, "--base", without, "--save", tmp_path / "merged")
    assert read_checkpoint(checkpoint_folder(save))[0].exits.exit_layer_nums == (2,)


def test_what_cannot_be_merged_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    original = LegacyModel.of_fixture("norm")
    partial, save = original.tune_exits([2]).save(tmp_path / "tuned", 2, 1), tmp_path / "merged"
    base = legacy_checkpoint("norm")
    said = refusal(capsys, "--load", partial, "--save", save)
    assert "holds 2 of 4 layers: a checkpoint of partial tuning" in said and "(from-legacy --base)" in said
    said = refusal(capsys, "--load", partial, "--base", tmp_path / "nowhere", "--save", save)
    assert f"--base {tmp_path / 'nowhere'} holds no checkpoint" in said
    said = refusal(capsys, "--load", partial, "--base", partial, "--save", save)
    assert f"{partial / 'iter_0000007'} holds 2 of 4 layers" in said
    assert "holds all 4 layers and needs no base" in refusal(capsys, "--load", base, "--base", base, "--save", save)
    early = original.save(tmp_path / "early", 4, 1)
    said = refusal(capsys, "--load", early, "--base", base, "--save", save)
    assert "holds layers 1 to 1, and names exits at [2, 3]: none of them is here" in said
    second = tmp_path / "second"
    shutil.copytree(partial, second)
    (second / "iter_0000007" / "mp_rank_00_000").rename(second / "iter_0000007" / "mp_rank_00_001")
    said = refusal(capsys, "--load", second, "--base", base, "--save", save)
    assert "lacks the files of (pipeline stage, tensor rank) [(0, 0)]" in said


def test_nothing_is_left_of_a_merge_that_breaks_off(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LegacyModel.of_fixture("norm")
    partial = original.tune_exits([2]).save(tmp_path / "tuned", 2, 1)
    written: list[str] = []
    resolve = writing._StreamingPlanner.resolve_data

    def break_off(self: writing._StreamingPlanner, item: object) -> object:
        written.append(item.index.fqn)
        if len(written) == 5:
            raise OSError("the disk is gone")
        return resolve(self, item)

    monkeypatch.setattr(writing._StreamingPlanner, "resolve_data", break_off)
    said = refusal(capsys, "--load", partial, "--base", legacy_checkpoint("norm"), "--save", tmp_path / "merged")
    assert "the disk is gone" in said and len(written) == 5


def test_parameters_are_compared_one_after_the_other(tmp_path: Path) -> None:
    original = LegacyModel.of_fixture("mlp")
    folder = original.tune_exits([2]).save(tmp_path / "tuned", 2, 1)
    partial = read_partial(folder / "iter_0000007")
    ours = convert("--load", legacy_checkpoint("mlp"), "--save", tmp_path / "base")
    base, tensors = read_checkpoint(checkpoint_folder(ours))
    reads: list[str] = []

    def counted(side: str, of: Tensors) -> Tensors:
        def read(name: str) -> Tensor:
            reads.append(f"{side} {name}")
            return of[name].read()

        return {
            name: LazyTensor(lazy.shape, lazy.dtype, lambda name=name: read(name), lazy.origin)
            for name, lazy in of.items()
        }

    progress: list[int] = []
    partial = partial._replace(tensors=counted("tuned", partial.tensors))
    merge_partial(partial, base, counted("base", tensors), lambda done, total: progress.append(total - done))
    frozen = [name for name in partial.tensors if ".exit_head." not in name]
    assert reads == [f"{side} {name}" for name in frozen for side in ("tuned", "base")]
    assert len(progress) == len(frozen) == 13 and progress[-1] == 0
