"""The tuning recipe without a model: what is done again and what is not, packing, flags."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron.early_exit.checkpoint.writing import write_checkpoint
from megatron.early_exit.config.data import TokenizerConfig
from megatron.early_exit.data.conversations import MarkedTokens, prompt_and_answer
from megatron.early_exit.evaluation.own_answers import Answer, AnswersFolder
from megatron.early_exit.evaluation.prompts import EvalPrompt
from megatron.early_exit.inference.params import SamplingSettings
from megatron.early_exit.tuning.answer_progress import AnswerProgress
from megatron.early_exit.tuning.command_line import build_parser, check, main
from megatron.early_exit.tuning.estimates import resolved, training_flops
from megatron.early_exit.tuning.manifest import Manifest, Step
from megatron.early_exit.tuning.recipe import Recipe
from megatron.early_exit.tuning.samples import marked_answers, num_held_out, pack, write_samples
from megatron.early_exit.tuning.training_words import TrainingPlan
from tests.reference_checkpoint import decoding_config, reference_description, reference_tensors

IDS, CHAT = '{"ids": [1, 2, 3]}', '{"messages": [{"role": "user", "content": "a"}]}'
BASE = ["--load", "model", "--output", "out", "--prompts-file", "p.jsonl"]


def manifest(folder: Path, first: int = 1, second: int = 1) -> Manifest:
    nothing = lambda: {}
    return Manifest(folder, [
        Step("first", "", {"size": first, "words": ("a", "b")}, nothing, outputs=(folder / "one",)),
        Step("second", "", {"size": second}, nothing, ("first",), (folder / "two",)),
        Step("other", "", {}, nothing),
    ])  # fmt: skip


def test_a_step_is_done_once_and_again_with_other_settings_or_other_results_before_it(tmp_path: Path) -> None:
    states = lambda one: [one.state(name) for name in ("first", "second", "other")]
    before = manifest(tmp_path)
    assert states(before) == ["to do"] * 3
    before.begin("first")
    assert states(manifest(tmp_path)) == ["begun", "to do", "to do"]
    for name, path in (("first", "one"), ("second", "two"), ("other", "three")):
        (tmp_path / path).mkdir()
        before.begin(name)
        before.finish(name, 2.0, {"rows": 3})
    again = manifest(tmp_path)
    assert states(again) == ["done"] * 3 and again.facts("second") == {"rows": 3} and again.seconds("first") == 2.0
    assert states(manifest(tmp_path, second=2)) == ["done", "changed", "done"]
    changed = manifest(tmp_path, first=2)
    assert states(changed) == ["changed", "changed", "done"]
    assert changed.differences("first") == ["size: 2 in place of 1"] and changed.differences("second") == []
    changed.forget(["first", "second"])
    assert states(manifest(tmp_path)) == ["to do", "to do", "done"]
    (tmp_path / "one").rmdir()
    before.finish("first", 1.0, {})
    assert manifest(tmp_path).state("first") == "begun", "what it made is gone"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.json", "three", "two"]


def test_a_step_that_has_made_nothing_takes_other_settings(tmp_path: Path) -> None:
    """Prompts that cannot be used, say, are mended and the same command is run again."""
    manifest(tmp_path).begin("first")
    assert manifest(tmp_path, first=2).state("first") == "to do"
    (tmp_path / "one").mkdir()
    assert manifest(tmp_path, first=2).state("first") == "changed"


@pytest.mark.parametrize(("before", "now", "said"), [
    (["a", "b"], ["a", "c"], "c in place of b"),
    ([True, False], [False, True], "False True in place of True False"),
    (["8", "8"], ["8"], "8 in place of 8 8"),
    (None, [True, False], "[True, False] in place of nothing"),
    ("a" * 64, "0" * 64, "other content than before"),
    (None, "0" * 64, f"{'0' * 40} in place of nothing"),
])  # fmt: skip
def test_differences_say_what_differs(tmp_path: Path, before: object, now: object, said: str) -> None:
    one, other = (
        Manifest(tmp_path, [Step("only", "", {"key": value}, lambda: {}, outputs=(tmp_path / "made",))])
        for value in (before, now)
    )
    one.begin("only")
    assert other.differences("only") == [f"key: {said}"]


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match=r"recipe.json cannot be read"):
        manifest(tmp_path).state("first")


def test_answers_come_back_from_their_parts(tmp_path: Path) -> None:
    folder = AnswersFolder(tmp_path / "answers")
    prompts = [EvalPrompt((1, 2), "letters", "a:1"), EvalPrompt((3,), None, "a:2")]
    folder.write_prompts(prompts)
    answers = [Answer(3, (7, 8), "eod"), Answer(0, (9,), "max_tokens"), Answer(2, (5, 5, 5), "eod")]
    folder.add(answers[:2])
    folder.add(answers[2:])
    folder.add([])
    (folder.folder / "part_000001_1.npz.partial-1").write_bytes(b"half")
    assert folder.prompts() == prompts
    assert folder.answers() == [answers[1], answers[2], answers[0]]
    texts = marked_answers(prompts, folder.answers(), 2)
    assert [number for number, _ in texts] == [0, 1, 1]
    assert texts[1][1] == MarkedTokens([3, 5, 5, 5], [2, 1, 1, 1])
    (folder.folder / "part_000009_1.npz").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"part_000009_1.npz cannot be read .* remove it"):
        folder.answers()


def test_held_out_prompts_leave_some_to_train_on() -> None:
    assert [num_held_out(count, share) for count, share in ((2, 0.01), (2, 0.99), (100, 0.1), (5, 0.5))] == [
        1,
        1,
        10,
        2,
    ]


@pytest.mark.parametrize("length", [24, 27, 64])
def test_rows_hold_every_text_whole(length: int) -> None:
    generator = np.random.default_rng(length)
    texts = []
    for number in range(200):
        prompt, answer = generator.integers(1, 9), generator.integers(1, 20)
        texts.append(prompt_and_answer([1000 + number] * int(prompt), [2000 + number] * int(answer)))
    rows, num_cut = pack(texts, length, filler=0)
    assert all(len(row.ids) == len(row.marks) == length for row in rows)
    assert num_cut == sum(len(text.ids) > length for text in texts)
    assert not any(row.marks[0] & 1 for row in rows), "the last label of the row before"
    found = {}
    for row in rows:
        starts = [place for place, mark in enumerate(row.marks) if mark & 2] + [length]
        for start, end in itertools.pairwise(starts):
            if row.ids[start]:
                found[row.ids[start] - 1000] = MarkedTokens(row.ids[start:end], row.marks[start:end])
            else:
                assert not any(row.ids[start:]) and not any(mark & 1 for mark in row.marks[start:])
    expected = {number: MarkedTokens(text.ids[:length], text.marks[:length]) for number, text in enumerate(texts)}
    assert found == expected
    full = sum(min(len(text.ids), length) for text in texts)
    assert len(rows) * length < (1.05 if length > 2 * 28 else 1.3) * full, "little is filled"


def test_prompts_that_leave_no_room_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no answer begins within 4 tokens"):
        write_samples(tmp_path / "s" / "train", [prompt_and_answer([1] * 4, [2])], 4, 0, 10)


def plan(*words: str) -> TrainingPlan:
    args = build_parser().parse_args([*BASE, *words])
    args.more = []
    return TrainingPlan.of(args)


def words_of(one: TrainingPlan, num_train: int = 100, world_size: int = 1) -> list[str]:
    paths = {name: Path(name) for name in ("exits", "tuned", "samples", "cache")}
    return one.words(**paths, num_train=num_train, num_held_out=9, world_size=world_size)


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_iterations_follow_from_passes_and_hidden_states_are_kept_where_that_pays() -> None:
    words = words_of(plan())
    assert value(words, "--train-iters") == "38"  # 3 passes over 100 samples, 8 at once
    assert value(words, "--cache-samples") == "100" and value(words, "--lr") == "0.005"
    assert value(words_of(plan(), 101, world_size=4), "--cache-samples") == "96"
    once = words_of(plan("--passes", "1", "--untie-exit-output-weights"))
    assert value(once, "--lr") == "0.001"
    assert "--cache-hidden-states" in once  # 13 x 8 samples are more than 100
    assert "--cache-hidden-states" not in words_of(plan("--train-iters", "12"))
    assert "--cache-hidden-states" not in words_of(plan("--no-keep-hidden-states"))
    blend = words_of(plan("--blend", "0.5", "text", "--passes", "1"))
    assert value(blend, "--train-iters") == "19"
    assert blend[blend.index("--train-data-path") + 1 :][:4] == ["1", "samples/train", "0.5", "text"]


def test_validations_take_at_most_a_tenth_of_the_batches() -> None:
    for iterations in (5, 480, 3000):
        every, batches = plan("--train-iters", str(iterations)).evaluation(num_samples=1000, num_held_out=400)
        assert iterations // every <= 10 or every == 1
        assert batches == 1 or iterations // every * batches <= iterations / 10
    assert plan("--train-iters", "3000").evaluation(1000, 400) == (300, 20)


def recipe(checkpoint: Path, *words: str) -> Recipe:
    (checkpoint / "p.jsonl").write_text('{"prompt": "a"}\n')
    prompts = ["--prompts-file", str(checkpoint / "p.jsonl")]
    args = build_parser().parse_args(["--load", str(checkpoint), "--output", str(checkpoint / "out"), *prompts, *words])
    args.more = []
    return Recipe(args)


def test_exits_that_are_there_say_how_they_are_tuned(tmp_path: Path) -> None:
    cfg = decoding_config(untie_exit_output_weights=(True, False, False))
    write_checkpoint(tmp_path, reference_description(cfg), reference_tensors(cfg))
    rate = lambda *words: recipe(tmp_path, *words).training.learning_rate
    assert rate() == 1e-3 and rate("--lr", "0.1") == 0.1
    assert rate("--exit-layer-nums", "1", "--replace") == 5e-3 and rate("--exit-layer-nums", "4") == 1e-3
    assert recipe(tmp_path, "--load-iteration", "0").training.learning_rate == 1e-3
    with pytest.raises(ValueError, match="--load-iteration 7: exits that are there are tuned from the last checkpoint"):
        recipe(tmp_path, "--load-iteration", "7")
    report = lambda *words: recipe(tmp_path, *words).manifest.signatures["report"]
    assert report() == report("--report-answers", "200") != report("--report-answers", "9")


def test_exits_that_were_tuned_on_some_tokens_are_tuned_on_all(tmp_path: Path) -> None:
    """Unless that is asked for again: --use-checkpoint-args would take it over."""
    from megatron.early_exit.config.flags import parse_run_config

    cfg = decoding_config(use_exit_norm=True, exit_loss_token_fraction=(0.5,))
    tokenizer = TokenizerConfig("NullTokenizer", None, 93)
    write_checkpoint(tmp_path, replace(reference_description(cfg), tokenizer=tokenizer), reference_tensors(cfg))
    for words, fraction in (((), 1.0), (("--exit-loss-token-fraction", "0.25"), 0.25)):
        one = recipe(tmp_path, "--seq-length", "16", *words)
        config = parse_run_config(one._words(1000, 100), world_size=1, warn=lambda _: None)
        assert [config.exits.token_fraction_of(index) for index in range(3)] == [fraction] * 3


def test_the_words_are_flags_of_the_training_program() -> None:
    from megatron.early_exit.config.flag_parser import known_flags

    words = words_of(plan("--blend", "0.5", "text", "--bf16"))
    assert {word for word in words if word.startswith("--")} <= set(known_flags())


@pytest.mark.parametrize(("words", "said"), [
    (["--load", "model", "--output", "out"], "give prompts"),
    ([*BASE, "--answers-to-each", "2"], "give a --temperature"),
    ([*BASE, "--held-out", "1"], "--held-out is 1.0"),
    ([*BASE, "--passes", "0"], "--passes is 0.0"),
    ([*BASE, "--seq-length", "1"], "--seq-length is 1"),
    ([*BASE, "--tune-exit-distillation", "1.5"], "--tune-exit-distillation is 1.5"),
])  # fmt: skip
def test_impossible_settings_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check(build_parser().parse_args(words))


@pytest.mark.parametrize("is_dry", [False, True])
@pytest.mark.parametrize(("lines", "words", "said"), [
    ([IDS, '{"ids": [4]}'], ["--answer-tokens", "39"], "1 of 2 prompts are too long with an answer of 39 tokens"),
    ([IDS, '{"ids": [4]}'], ["--answer-tokens", "41"], "answers of 41 tokens leave no room for a prompt"),
    ([IDS, '{"ids": [4]}'], ["--prompts", "3"], "3 prompts are needed, but .*p.jsonl has 2 different prompts"),
    ([IDS, '{"ids": [4]}'], ["--seq-length", "41"], "--seq-length 41 is more than the model takes: 40"),
    ([IDS, '{"ids": [4, 5, 6]}'], ["--seq-length", "3"], "no answer begins within 3 tokens"),
    ([IDS], [], "one prompt is too few"),
    ([CHAT, CHAT], [], "has no chat template; give --chat-template FILE"),
    ([CHAT, IDS], [], "chats and other prompts are evaluated apart"),
])  # fmt: skip
def test_prompts_that_cannot_be_answered_are_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture, lines: list[str], words: list[str], said: str, is_dry: bool
) -> None:
    cfg = decoding_config(use_exit_norm=True)
    tokenizer = TokenizerConfig("NullTokenizer", None, 93)
    write_checkpoint(
        tmp_path / "model", replace(reference_description(cfg), tokenizer=tokenizer), reference_tensors(cfg)
    )
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    given = ["--load", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--exit-layer-nums", "2"]
    given += ["--prompts-file", str(tmp_path / "p.jsonl"), "--seq-length", "16", "--answer-tokens", "4", *words]
    assert main([*given, *(["--dry-run"] if is_dry else [])]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_prompts_that_have_answers_are_not_drawn_again(tmp_path: Path) -> None:
    cfg = decoding_config(use_exit_norm=True)
    write_checkpoint(tmp_path, reference_description(cfg), reference_tensors(cfg))
    folder, prompts = AnswersFolder(tmp_path / "out/answers"), [EvalPrompt((1, 2), None, "a:1")]
    folder.write_prompts(prompts)
    begun = recipe(tmp_path)
    begun.manifest.begin("answers")
    assert begun.prompts == recipe(tmp_path).prompts == prompts


def test_answers_are_asked_for_without_log_probs(tmp_path: Path) -> None:
    """So that the certified head may choose their tokens."""
    cfg = decoding_config(use_exit_norm=True)
    write_checkpoint(tmp_path, reference_description(cfg), reference_tensors(cfg))
    params = recipe(tmp_path, "--answer-tokens", "7", "--temperature", "0.5", "--seed", "3").answer_params(2)
    assert (params.max_tokens, params.sampling, params.log_probs) == (
        7,
        SamplingSettings(temperature=0.5, seed=5),
        False,
    )


def test_estimates_count_what_runs(tmp_path: Path) -> None:
    """Layers once where their hidden states are kept, heads on their share of the tokens, validations."""
    cfg = decoding_config(use_exit_norm=True, untie_exit_output_weights=(True, False, False))
    tokenizer = TokenizerConfig("NullTokenizer", None, 93)
    write_checkpoint(tmp_path, replace(reference_description(cfg), tokenizer=tokenizer), reference_tensors(cfg))

    def flops(*words: str) -> float:
        one = recipe(tmp_path, "--seq-length", "16", "--train-iters", "20", "--global-batch-size", "4", *words)
        return training_flops(resolved(one), one.training, num_train=40, num_held_out=9) / 16

    # h = 32, four heads of 8, two groups, SwiGLU of 48, 96 ids; multiplications and additions of a forward pass.
    head, layer = 2 * 32 * 96, 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48) + 2 * 32 * 16
    validated, drawn = 10 * 1 * 4, 20 * 4  # every second iteration, one global batch
    of_exits, of_final = (
        3 + 2 + 2,
        3,
    )  # forward, and gradients of inputs, and of the output weight that is an exit's own
    validation = validated * (4 * layer + 4 * head)
    live, kept = "--no-keep-hidden-states", "--keep-hidden-states"
    assert flops(live) == drawn * (4 * layer + (of_exits + of_final) * head) + validation
    assert flops(kept) == flops() == 40 * 4 * layer + drawn * (of_exits + of_final) * head + validation
    part = 40 * 4 * layer + drawn * (of_exits + of_final) * head / 4 + validation
    assert flops("--exit-loss-token-fraction", "0.25") == pytest.approx(part)
    alone = 40 * 3 * layer + drawn * of_exits * head + validated * (3 * layer + 3 * head)
    assert flops("--tune-exit-distillation", "0") == pytest.approx(alone)


def test_a_model_that_is_none_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["--output", str(tmp_path / "out"), "--prompts-file", str(tmp_path / "p.jsonl"), "--load"]
    assert main([*words, str(tmp_path / "nothing")]) == 2
    assert main([*words, str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "does not exist; give a folder of checkpoints, or of a Hugging Face model" in said
    assert "holds neither checkpoints" in said
    assert not (tmp_path / "out").exists()
    assert main([*words, str(tmp_path), "--blend", "text"]) == 2
    assert main([*words, str(tmp_path), "--", "--lr=3", "--min-lr", "1"]) == 2
    assert "--lr behind -- is for this program to set" in capsys.readouterr().err


def test_the_progress_of_answers_counts_what_has_come_since(capsys: pytest.CaptureFixture) -> None:
    progress = AnswerProgress()
    for done, num_tokens in ((3, 0), (4, 7), (5, 0)):
        progress.show(done, 5, num_tokens)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("answers: 5/5, 7 tokens, ")
