"""Records of exits, taken while the full model answers; and how much its answers depend on rounding."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron.early_exit.evaluation.prompts import EvalPrompt
from megatron.early_exit.evaluation.statistics.text_metrics import text_loss
from megatron.early_exit.inference.certificates import AnswerSettings, Risk
from megatron.early_exit.inference.engine_loading import LoadedEngine
from megatron.early_exit.inference.exit_records import PromptRecord, RecordsFolder
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.text_engine import RequestOutput
from megatron.early_exit.platform.part_files import Parts

_PROMPTS_PER_PART, _SECONDS_PER_PART = 64, 120.0

Progress = Callable[[int, int], None]
"""Is called with what is done and what is to be done."""

ShowProgress = Callable[[str], Progress]
"""Makes one for a kind of work, in words."""


def leaving_layers(loaded: LoadedEngine, purpose: str) -> tuple[int, ...]:
    """The exits that tokens may leave at. purpose: what they are wanted for, in words. Raises ValueError if there are
    none."""
    exits, path = loaded.engine.exits, loaded.checkpoint.config.path
    if exits.leaving_layers:
        return exits.leaving_layers
    add = "tools/convert_checkpoint.py add-exits"
    if not exits.num_exits:
        raise ValueError(f"the model in {path} has no exits to {purpose}; add some ({add}), and tune them")
    only = ", ".join(map(str, exits.exit_layer_nums))
    raise ValueError(
        f"the model in {path} has no exits to {purpose}: its exits ({only}) only draft (--exit-uses). Self-speculative "
        f"decoding needs nothing of the kind; for early exit add exits that tokens may leave at ({add} --exit-uses "
        "leave), and tune them"
    )


def full_params(answers: AnswerSettings) -> GenerationParams:
    """Greedy answers of the full model, as they are certified."""
    return GenerationParams(max_tokens=answers.max_tokens, ignore_eod=answers.ignore_eod)


def outputs_as_they_end(
    llm: LLM, prompts: Sequence[Sequence[int]], params: GenerationParams | Sequence[GenerationParams]
) -> Iterator[RequestOutput]:
    """Answers of a model that has many at once, in the order in which they end. params: of all, or of each. Raises
    ValueError if one fails; so each has a result."""
    for delta in llm.stream([list(ids) for ids in prompts], params):
        if delta.is_finished:
            if delta.output.error is not None:
                raise ValueError(f"prompt {delta.output.prompt_index} could not be answered: {delta.output.error}")
            yield delta.output


def take_records(
    llm: LLM, prompts: Sequence[EvalPrompt], folder: RecordsFolder, progress: Progress
) -> tuple[list[PromptRecord], float]:
    """(records of all prompts in order, seconds that it took). What the folder has is not taken again, and an
    interruption keeps what has been taken."""
    records = {record.prompt: record for record in folder.open()}
    missing = [number for number in range(len(prompts)) if number not in records]
    score = folder.about.fingerprint.score
    params = replace(full_params(folder.about.answers), observe_exits=True, exit_score=score)
    start = time.perf_counter()
    progress(len(records), len(prompts))
    with Parts(folder.add, _PROMPTS_PER_PART, _SECONDS_PER_PART) as parts:
        for output in outputs_as_they_end(llm, [prompts[number].ids for number in missing], params):
            record = _record(missing[output.prompt_index], output)
            records[record.prompt] = record
            parts.add(record)
            progress(len(records), len(prompts))
    return [records[number] for number in range(len(prompts))], time.perf_counter() - start


def _record(number: int, output: RequestOutput) -> PromptRecord:
    tokens = output.check().tokens
    exits = [[one for one in token.predictions if one.exit_layer is not None] for token in tokens]
    return PromptRecord(
        number,
        tokens=np.array([token.token for token in tokens], np.int64),
        scores=np.array([[one.confidence for one in of_token] for of_token in exits], np.float64),
        choices=np.array([[one.token for one in of_token] for of_token in exits], np.int64),
        final_confidences=np.array([token.confidence for token in tokens], np.float64),
    )


@dataclass(frozen=True)
class RoundingFloor:
    """How much the full model at batch 1 differs from itself in the batches of the records."""

    num_prompts: int
    num_differing: int
    num_decisions: int
    """Up to the first difference, this one included."""
    text_loss: float
    """1 - ROUGE-L, on average."""

    @property
    def rate(self) -> float:
        """Of decisions that differ."""
        return self.num_differing / self.num_decisions if self.num_decisions else 0.0

    def risk(self, risk: Risk) -> float:
        """What rounding alone costs: no promise below it means anything."""
        if risk == "C":
            return self.text_loss
        if risk == "B":
            return self.num_differing / self.num_prompts if self.num_prompts else 0.0
        return self.rate


def rounding_floor(
    llm: LLM,
    prompts: Sequence[EvalPrompt],
    records: Sequence[PromptRecord],
    answers: AnswerSettings,
    progress: Progress,
) -> RoundingFloor:
    """Answer every prompt by itself, and compare with the records."""
    num_differing = num_decisions = 0
    text_losses, text = [], llm.tokenizer.detokenize
    for number, (prompt, record) in enumerate(zip(prompts, records, strict=True), start=1):
        (output,) = outputs_as_they_end(llm, [prompt.ids], full_params(answers))
        alone = np.array(output.check().token_ids)
        common = min(len(alone), len(record.tokens))
        differs = np.flatnonzero(alone[:common] != record.tokens[:common])
        num_differing += bool(differs.size)
        num_decisions += int(differs[0]) + 1 if differs.size else common
        text_losses.append(text_loss(text(record.tokens.tolist()), text(alone.tolist())))
        progress(number, len(prompts))
    mean_loss = float(np.mean(text_losses)) if text_losses else 0.0
    return RoundingFloor(len(prompts), num_differing, num_decisions, mean_loss)
