"""Text in, text out: a loaded model, its tokenizer and an engine.

llm = LLM.load("checkpoints")
for output in llm.generate(["import os", "def main"], GenerationParams(mode="early_exit", exit_thresholds=(0.6,))):
    print(output.text, output.result.statistics.runs_saved)
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.data.tokenizer import Tokenizer
from megatron.early_exit.inference import checked
from megatron.early_exit.inference.engine.audit import AuditReport
from megatron.early_exit.inference.engine.engine import Engine
from megatron.early_exit.inference.engine_loading import load_engine
from megatron.early_exit.inference.executor.worker_ranks import DEFAULT_LIMITS
from megatron.early_exit.inference.params import GenerationParams, ScoreParams
from megatron.early_exit.inference.results import ScoreResult
from megatron.early_exit.inference.text_engine import LocalTextEngine, OutputDelta, Prompt, RequestOutput, request_error
from megatron.early_exit.inference.worker.certified_head import CertifiedHeadSetting
from megatron.early_exit.inference.worker.kv_cache import CacheSize

log = logging.getLogger(__name__)

DEFAULT_PARAMS = GenerationParams()
DEFAULT_SCORES = ScoreParams()

_QUEUED_PER_SLOT = 16
"""Requests for scores that are in the engine at once: enough to find beginnings that they share, few enough to look
through in every step, of any number."""

Params = TypeVar("Params", GenerationParams, ScoreParams)
News = TypeVar("News", OutputDelta, ScoreResult)


class LLM:
    """A model that answers prompts. Ranks that share its weights are other processes; this one has none of them."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, exits: ExitConfig) -> None:
        self.engine, self.tokenizer, self.exits = engine, tokenizer, exits
        self._text_engine = LocalTextEngine(engine, tokenizer)
        self._outputs: list[_Mailbox[OutputDelta]] = []
        self._scores: list[_Mailbox[ScoreResult]] = []

    @classmethod
    def load(
        cls,
        path: str,
        *,
        iteration: int | None = None,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        pipeline_layers: Sequence[int] | None = None,
        fill_min_rows: int | None = None,
        dtype: str | None = None,
        max_requests: int | None = None,
        max_length: int | None = None,
        kv_cache_gib: float | None = None,
        max_waiting: int | None = None,
        prefill_chunk: int = 256,
        audit_share: float = 0.0,
        quantize: str | None = None,
        shortlist: bool | None = None,
        certified_head: CertifiedHeadSetting = "auto",
        cuda_graphs: bool = True,
        join_torchrun: bool = False,
        worker_timeout: float = DEFAULT_LIMITS.hang,
    ) -> LLM:
        """Load a training checkpoint of any layout.

        path: the --save folder. max_waiting, prefill_chunk: see `Engine`. audit_share: of the early_exit requests,
        0 to 1, of which the final head checks every token afterwards, see `finish_audits`. join_torchrun: this is rank
        0 of a torchrun job, whose ranks share the model; the others call `serve_torchrun_rank`. worker_timeout:
        seconds without progress after which worker processes count as dead. The other arguments are those of
        `LoadConfig`; with a `tensor_parallel_size` or `pipeline_parallel_size` above 1 the workers are processes that
        are started here.

        Several models may be loaded in one process.

        Raises ValueError or FileNotFoundError if there is no checkpoint, ValueError for settings that cannot work,
        among them sizes that no memory holds; ExecutorError if a worker process fails."""
        loaded = load_engine(
            path,
            iteration=iteration,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            pipeline_layers=pipeline_layers,
            fill_min_rows=fill_min_rows,
            dtype=dtype,
            max_requests=max_requests,
            max_length=max_length,
            kv_cache_gib=kv_cache_gib,
            quantize=quantize,
            shortlist=shortlist,
            certified_head=certified_head,
            cuda_graphs=cuda_graphs,
            max_waiting=max_waiting,
            prefill_chunk=prefill_chunk,
            audit_share=audit_share,
            join_torchrun=join_torchrun,
            worker_timeout=worker_timeout,
        )
        return cls(loaded.engine, loaded.tokenizer, loaded.engine.exits)

    @property
    def cache_size(self) -> CacheSize:
        """Memory for keys and values on each rank."""
        model = self.engine.description
        return CacheSize(model.num_slots, model.num_positions, model.bytes_per_token)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: GenerationParams | Sequence[GenerationParams] = DEFAULT_PARAMS,
    ) -> list[RequestOutput]:
        """Answer `prompts` (one, or several), all with the same settings or each with its own.

        Returns n outputs for each prompt, in order. A prompt that cannot be answered gives an output with `error` set;
        the others are untouched. Raises ValueError if the numbers of prompts and settings differ, or the model does not
        have the exits that the settings name."""
        outputs = [delta.output for delta in self.stream(prompts, params) if delta.is_finished]
        return sorted(outputs, key=lambda output: (output.prompt_index, output.sample_index))

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: GenerationParams | Sequence[GenerationParams] = DEFAULT_PARAMS,
    ) -> Generator[OutputDelta, None, None]:
        """As `generate`, step by step. Leaving the loop early cancels what is unfinished."""
        prompts = as_list(prompts)
        each = self._for_each(prompts, params)
        with self._opened(self._outputs) as mailbox:
            for index, (prompt, settings) in enumerate(zip(prompts, each, strict=True)):
                for sample_index in range(settings.n):
                    try:
                        mailbox.open.add(self._text_engine.add(prompt, settings, sample_index, index))
                    except Exception as error:  # whatever it is, it is this prompt's
                        output = RequestOutput(None, [], sample_index, index, error=request_error(error))
                        yield OutputDelta(output, (), (), is_finished=True)
            while mailbox.open or mailbox.news:
                if not mailbox.news:
                    self._step()
                while mailbox.news:
                    yield mailbox.news.popleft()[1]

    def score(
        self, prompts: Prompt | Sequence[Prompt], params: ScoreParams | Sequence[ScoreParams] = DEFAULT_SCORES
    ) -> list[ScoreResult]:
        """What heads predict at each position of `prompts` (one, or several; texts or ids), with nothing generated, all
        with the same settings or each with its own.

        A prompt that cannot be scored gives a result with `error` set; the others are untouched. Raises ValueError if
        the numbers of prompts and settings differ, or the model does not have the exits that the settings name."""
        results = dict(self.stream_scores(prompts, params))
        return [results[index] for index in range(len(results))]

    def stream_scores(
        self, prompts: Prompt | Sequence[Prompt], params: ScoreParams | Sequence[ScoreParams] = DEFAULT_SCORES
    ) -> Iterator[tuple[int, ScoreResult]]:
        """As `score`, each result as it comes with the index of its prompt. Leaving the loop early cancels what is
        unfinished."""
        prompts = as_list(prompts)
        each = _one_for_each(prompts, params, ScoreParams)
        for settings in dict.fromkeys(each):
            settings.heads(self.exits)
        waiting = deque(enumerate(zip(prompts, each, strict=True)))
        most = _QUEUED_PER_SLOT * self.engine.description.num_slots
        place: dict[int, int] = {}
        with self._opened(self._scores) as mailbox:
            while waiting or mailbox.open or mailbox.news:
                while waiting and len(mailbox.open) < most:
                    index, (prompt, settings) = waiting.popleft()
                    try:
                        request_id = self._text_engine.add_scoring(prompt, settings)
                    except Exception as error:  # this prompt's
                        yield index, ScoreResult(None, (), request_error(error))
                    else:
                        mailbox.open.add(request_id)
                        place[request_id] = index
                if mailbox.open and not mailbox.news:
                    self._step()
                while mailbox.news:
                    request_id, result = mailbox.news.popleft()
                    yield place.pop(request_id), result

    def finish_audits(self) -> tuple[AuditReport, ...]:
        """Check the answers that were drawn (`audit_share`) and have ended; nothing else waits for that. Returns what
        all audits have found so far, for each promise that was made."""
        while self.engine.audit.has_work:
            self._step()
        return self.engine.audit.reports()

    @contextmanager
    def _opened(self, mailboxes: list[_Mailbox[News]]) -> Iterator[_Mailbox[News]]:
        """A new mailbox; requests that are still open when it is closed are cancelled."""
        mailbox: _Mailbox[News] = _Mailbox()
        mailboxes.append(mailbox)
        try:
            yield mailbox
        finally:
            mailboxes.remove(mailbox)
            for request_id in mailbox.open:
                self._text_engine.cancel(request_id)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes, if there are any; without it they end with this process."""
        self.engine.executor.close()

    def _for_each(
        self, prompts: list[Prompt], params: GenerationParams | Sequence[GenerationParams]
    ) -> list[GenerationParams]:
        """The settings of each prompt. Raises ValueError as `generate` does."""
        each = _one_for_each(prompts, params, GenerationParams)
        for settings in each:
            self.engine.checks.check(settings)
            self.engine.prepare(settings)
        return each

    def _step(self) -> None:
        """Run a step of the engine and sort what it brings into the mailboxes."""
        try:
            news = self._text_engine.step()
        except BaseException:
            self._sort(self._text_engine.fail_all("the engine failed"))
            raise
        self._sort(news)

    def _sort(self, news: list[OutputDelta | ScoreResult]) -> None:
        for one in news:
            if isinstance(one, OutputDelta):
                _put(one, self._outputs)
            else:
                _put(one, self._scores)


def _put(one: News, mailboxes: list[_Mailbox[News]]) -> None:
    """Put news into the mailbox of its request."""
    assert one.request_id is not None, "what is refused is never in the engine"
    mailbox = next(mailbox for mailbox in mailboxes if one.request_id in mailbox.open)
    mailbox.news.append((one.request_id, one))
    if one.is_finished:
        mailbox.open.remove(one.request_id)


def _one_for_each(prompts: list[Prompt], params: Params | Sequence[Params], kind: type[Params]) -> list[Params]:
    """The settings of each prompt. Raises ValueError unless they are of this kind, one for all or one for each."""
    if not isinstance(params, kind | Sequence):
        raise ValueError(f"params is {params!r}; it must be {kind.__name__}(...), or a list of them")
    each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
    if len(each) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(each)} settings; give one for all, or one for each")
    for settings in each:
        if not isinstance(settings, kind):
            raise ValueError(f"params holds {settings!r}; it must be {kind.__name__}(...), or a list of them")
    return each


@dataclass(eq=False)
class _Mailbox(Generic[News]):
    """What is new for the requests of one call. Several may be open: a step of one brings news of the others."""

    open: set[int] = field(default_factory=set)
    """Requests that have not ended."""
    news: deque[tuple[int, News]] = field(default_factory=deque)
    """With the ids of their requests."""


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt (a text, or a list of ids) or several, as a list. Arrays of NumPy or torch are lists."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping):
        raise ValueError(f"prompts is a {type(prompts).__name__}; give its input_ids, or texts")
    prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if isinstance(prompts, bytes) or not hasattr(prompts, "__iter__"):
        raise ValueError(f"prompts is of the type {type(prompts).__name__}; give text, a list of ids, or several")
    prompts = list(prompts)
    return [prompts] if prompts and all(map(checked.is_integer, prompts)) else prompts
