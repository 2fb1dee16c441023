"""A checkpoint that is loaded as pipeline stages in processes of their own answers as it does in one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.early_exit.checkpoint.writing import write_checkpoint
from megatron.early_exit.config.checkpoint_files import LATEST_FILE
from megatron.early_exit.config.data import TokenizerConfig
from megatron.early_exit.inference.executor import distributed
from megatron.early_exit.inference.executor.messages import WorkerFactory
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings, ScoreParams
from megatron.early_exit.inference.worker.kv_cache import CacheSize
from tests.distributed.test_llm import Characters
from tests.reference_checkpoint import decoding_config, reference_description, reference_tensors

SAMPLED = SamplingSettings(temperature=1.0, seed=3)
FULL = GenerationParams(max_tokens=12, ignore_eod=True)
EXITS = replace(FULL, mode="early_exit", exit_thresholds=(0.0114, 0.0115, 0.0117))
DRAFTS = replace(FULL, mode="self_speculative")
PARAMS = (
    FULL, EXITS, replace(EXITS, exit_thresholds=(0.0,), max_deferred=2), DRAFTS,
    replace(DRAFTS, draft_exit=3, draft_length=3, sampling=SAMPLED), replace(FULL, sampling=SAMPLED),
    replace(EXITS, sampling=SAMPLED, exit_layers=(1, 3), exit_thresholds=(0.0113, 0.0117)),
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, cfg = tmp_path_factory.mktemp("checkpoint"), decoding_config(use_exit_block=True)
    description = replace(
        reference_description(cfg), dtype="fp32", tokenizer=TokenizerConfig("NullTokenizer", None, 93)
    )
    write_checkpoint(folder, description, reference_tensors(cfg))
    return folder


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> LLM:
    return speaking(LLM.load(str(checkpoint), max_requests=4))


@pytest.fixture(scope="module")
def stages(checkpoint: Path) -> Iterator[LLM]:
    llm = LLM.load(str(checkpoint), pipeline_parallel_size=2, pipeline_layers=[3, 1], max_requests=4)
    yield speaking(llm)
    llm.close()


def speaking(llm: LLM) -> LLM:
    """The same, with a tokenizer that has a text for each id."""
    return LLM(llm.engine, Characters(), llm.exits)


def test_what_the_stages_have(stages: LLM) -> None:
    described = stages.engine.description
    assert (described.layers_per_stage, described.num_stages, described.vocab_size) == ((3, 1), 2, 94)
    assert [described.stage_of(index) for index in range(3)] == [0, 0, 0]
    assert stages.cache_size == CacheSize(4, 40, (3 + 3) * 2 * 2 * 8 * 4)  # layers and blocks of the first stage


def test_answers_of_all_modes(whole: LLM, stages: LLM) -> None:
    """More requests than slots, each with settings of its own."""
    prompts, params = ["hello", "a", "the_world", "stages", "x" * 20, "yes", "no"], list(PARAMS)
    expected, answers = (llm.generate(prompts, params) for llm in (whole, stages))
    for theirs, ours in zip(expected, answers, strict=True):
        assert (ours.error, ours.text, ours.finish_reason) == (None, theirs.text, theirs.finish_reason)
        assert ours.result.token_ids == theirs.result.token_ids
        for one, other in zip(theirs.tokens, ours.tokens, strict=True):
            assert other.log_prob == pytest.approx(one.log_prob, abs=1e-5)
    for index in (1, 2, 6):
        of_exits = [[token.exit_layer for token in one[index].tokens] for one in (expected, answers)]
        assert of_exits[0] == of_exits[1] and min(of_exits[0]) < 4
    left = {token.exit_layer for index in (1, 6) for token in expected[index].tokens}
    assert 4 in left and len(left) > 1, "some leave at exits, some do not"


def test_statistics_are_of_the_layers_that_tokens_waited_for(whole: LLM, stages: LLM) -> None:
    params = replace(EXITS, exit_thresholds=(0.0,), exit_layers=(2,))
    answers = [llm.generate("hello", params)[0].result for llm in (whole, stages)]
    assert [one.statistics.layer_runs for one in answers] == [12 * (2 + 1)] * 2  # layers and the exit's block
    assert [one.statistics.runs_saved for one in answers] == [0.25] * 2


def test_a_draft_that_is_accepted_waited_for_the_layers_of_its_exit_alone(stages: LLM) -> None:
    (answer,) = stages.generate("hello", replace(DRAFTS, draft_exit=1))
    statistics = answer.result.statistics
    num_accepted = sum(token.is_draft for token in answer.tokens)
    runs = num_accepted * (1 + 1) + (12 - num_accepted) * 4  # a layer and the exit's block; all layers
    assert num_accepted == statistics.accepted
    assert runs <= statistics.layer_runs <= runs + (12 - num_accepted)  # and the block, where there was a draft


@pytest.mark.parametrize("params", PARAMS[:4], ids=["full", "early_exit", "first exit", "self_speculative"])
def test_stop_strings_and_streams(whole: LLM, stages: LLM, params: GenerationParams) -> None:
    (expected,) = whole.generate("hello", params)
    stop = expected.text[5:7]
    cut = replace(params, stop=(stop,))
    deltas = list(stages.stream(["hello", "other"], [cut, params]))
    texts = {prompt: "".join(one.text for one in deltas if one.output.prompt_index == prompt) for prompt in (0, 1)}
    assert texts[0] == expected.text[: expected.text.index(stop)]
    assert len(texts[1]) == 12 and len([one for one in deltas if one.output.prompt_index == 1]) > 3
    for delta in stages.stream("hello", params):
        if len(delta.output.tokens) >= 4:
            break  # the stages still run rows of it
    assert [one.text for one in stages.generate(["hello", "hello"], params)] == [expected.text] * 2


def test_scores(whole: LLM, stages: LLM) -> None:
    for params in (ScoreParams(), ScoreParams(exit_layers=(2,), top_log_probs=3)):
        for theirs, ours in zip(*(llm.score(["hello", "other_one"], params) for llm in (whole, stages)), strict=True):
            assert ours.error is None and [one.exit_layer for one in ours.heads] == [
                one.exit_layer for one in theirs.heads
            ]
            for one, other in zip(theirs.heads, ours.heads, strict=True):
                assert list(other.tokens) == list(one.tokens)
                assert list(other.log_probs) == pytest.approx(list(one.log_probs), abs=1e-5)


def test_two_ranks_of_each_stage(whole: LLM, checkpoint: Path) -> None:
    with LLM.load(str(checkpoint), pipeline_parallel_size=2, tensor_parallel_size=2, max_requests=4) as loaded:
        llm = speaking(loaded)
        answers = llm.generate(["hello"] * 4, list(PARAMS[:4]))
        assert llm.engine.description.layers_per_stage == (2, 2)
    expected = whole.generate(["hello"] * 4, list(PARAMS[:4]))
    assert [one.result.token_ids for one in answers] == [one.result.token_ids for one in expected]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pipeline_parallel_size": 5}, "pipeline_parallel_size is 5, but the model has 4 layers"),
        ({"pipeline_parallel_size": 2, "pipeline_layers": (1, 1)}, "pipeline_layers is 1 1, 2 layers in all"),
        ({"pipeline_parallel_size": 2, "tensor_parallel_size": 3}, "3 tensor-parallel ranks cannot share the model"),
        ({"pipeline_parallel_size": 2, "max_length": 41}, "max_length is 41"),
    ],
)
def test_no_process_is_started_for_what_cannot_work(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, settings: dict, message: str
) -> None:
    monkeypatch.setattr(distributed, "start_workers", lambda *_: pytest.fail("processes were started"))
    with pytest.raises(ValueError, match=message):
        LLM.load(str(checkpoint), **settings)


def test_a_torchrun_job_of_another_size(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    for settings in ({"pipeline_parallel_size": 2}, {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}):
        with pytest.raises(ValueError, match="pipeline_parallel_size is [24] but 3 processes were started"):
            LLM.load(str(checkpoint), join_torchrun=True, **settings)


def test_memory_of_a_rank_is_refused_with_one_message(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="^max_requests 16 and max_length 40 need .* of memory are free for them"):
        LLM.load(str(checkpoint), pipeline_parallel_size=2, max_requests=16, max_length=40, kv_cache_gib=1e-5)


def test_ranks_load_the_iteration_that_was_found(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training may write another one before the ranks look."""

    class Started(Exception):
        pass

    def start(factory: WorkerFactory, *_: object) -> None:
        raise Started(factory.arguments["iteration"])

    monkeypatch.setattr(distributed, "start_workers", start)
    latest = int((checkpoint / LATEST_FILE).read_text())
    for layout in ({"pipeline_parallel_size": 2}, {"tensor_parallel_size": 2}):
        with pytest.raises(Started) as started:
            LLM.load(str(checkpoint), **layout)
        assert started.value.args == (latest,)
