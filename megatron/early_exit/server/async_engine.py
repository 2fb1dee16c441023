"""The engine for asynchronous callers: it starts the engine's process, admits requests, sorts what comes into
mailboxes, and notices when the process dies or hangs.

Everything runs in one event loop; text is made of tokens there, prompts are tokenized in threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron.early_exit.data.tokenizer import build_tokenizer
from megatron.early_exit.inference.engine.audit import AuditReport
from megatron.early_exit.inference.executor.base import ExecutorError
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.protocol import StageLoad
from megatron.early_exit.inference.text_engine import OutputDelta, Prompt, TextEngine
from megatron.early_exit.server.admission import Admission
from megatron.early_exit.server.config import EngineConfig
from megatron.early_exit.server.engine_client import EngineClient
from megatron.early_exit.server.engine_link import EngineLink
from megatron.early_exit.server.engine_messages import EngineLoad, Failed, FromEngine, Pong, Ready, StepEvents
from megatron.early_exit.server.errors import NotReady
from megatron.early_exit.server.loaded_model import LoadedModel, PromptMaker
from megatron.early_exit.server.mailbox import Answers
from megatron.early_exit.server.request_record import current_record

log = logging.getLogger(__name__)

_SECONDS_FOR_WORKERS = 5.0
"""That the engine's process has to notice a dead worker before it counts as hung itself."""
_MOST_DEATHS = 3
"""Of engines in a row that have finished no answer, after which loading another makes no sense."""


class EngineObserver(Protocol):
    """Who wants to know what happens, for metrics."""

    def on_answers(self, answers: Answers) -> None:
        """A request that was admitted, whose prompts are ids now."""

    def on_delta(self, delta: OutputDelta, answer: OpenAnswer) -> None:
        """Something new of an answer, the last of it included."""

    def on_cancel(self, params: GenerationParams) -> None:
        """An answer that was cancelled, of which there will be no more deltas."""


@dataclass
class OpenAnswer:
    """An answer that the engine works on."""

    answers: Answers
    params: GenerationParams
    started: float
    """When the request came (`time.monotonic`)."""
    last_token: float | None = None
    """When its last tokens came; for the observer, who sets it."""


class AsyncEngine:
    """An engine in another process. One event loop uses it."""

    def __init__(self, config: EngineConfig, max_waiting: int, observer: EngineObserver | None = None) -> None:
        """max_waiting: answers that may wait for a slot."""
        self._config, self._observer = config, observer
        self.model: LoadedModel | None = None
        """None while there is no engine that can serve."""
        self.failure: str | None = None
        """Why the last engine has ended by itself; None while one is loaded or serves."""
        self.load = EngineLoad()
        self.stage_loads: tuple[StageLoad, ...] = ()
        """What each pipeline stage has done since it was loaded, as of a second ago."""
        self.audits: tuple[AuditReport, ...] = ()
        """What audits of early exit have found since it was loaded, as of a second ago."""
        self.is_draining = False
        """About to end: what runs may finish, nothing new is taken."""
        self._admission = Admission(max_waiting)
        self._link: EngineLink | None = None
        """From the start of a process to its end; longer than there is a model."""
        self._open: dict[int, OpenAnswer] = {}
        self._num_finished = 0
        self._is_closing = False

    @property
    def is_ready(self) -> bool:
        return self.model is not None and not self.is_draining

    @property
    def num_admitted(self) -> int:
        """Answers that were promised and have not ended: waiting, running or being tokenized."""
        return self._admission.num_admitted

    @property
    def process_id(self) -> int | None:
        """Of the engine's process; None if there is none."""
        return None if self._link is None else self._link.process_id

    async def start(self) -> LoadedModel:
        """Start the engine's process and wait until its model is loaded, however long that takes.

        Raises ValueError or OSError if it says that the user can mend it, ExecutorError if it fails otherwise."""
        self.failure = None
        self._link = link = await EngineLink.start(self._config)
        try:
            while isinstance(message := await link.receive_or_end(), Pong) and not self._is_closing:
                pass
        except BaseException:  # cancelled
            await self._ended(link, None)
            raise
        if not isinstance(message, Ready) or self._is_closing:
            error = await self._ended(link, message)
            kinds = {"ValueError": ValueError, "OSError": OSError}
            raise kinds.get(error.kind, ExecutorError)(error.error)
        tokenizer = await asyncio.to_thread(build_tokenizer, message.tokenizer)
        if self._is_closing:  # meanwhile; the process has been told
            raise ExecutorError("the server ends")
        client = EngineClient(message, link.send)
        self.model = LoadedModel(message, tokenizer, client, TextEngine(client, tokenizer))
        return self.model

    async def run(self) -> None:
        """Serve until `close`, or until the engine ends by itself: raises ExecutorError then, when every request has
        been told. Where the engine restarts, that goes on until engines end, or cannot be loaded, time after time."""
        link, model, num_deaths = self._link, self.model, 0
        while True:
            assert link is not None and model is not None, "run follows start"
            num_finished = self._num_finished
            if (error := await self._serve(link, model)) is None:
                return
            self._fail(error)
            num_deaths = 1 if self._num_finished > num_finished else num_deaths + 1
            model = None
            while model is None:
                if not self._config.restart or self.is_draining:
                    raise ExecutorError(error)
                if num_deaths >= _MOST_DEATHS:
                    raise ExecutorError(f"{error}; so it went {num_deaths} times, and no answer was finished meanwhile")
                log.warning("%s; the model is loaded again", error)
                try:
                    model, link = await self.start(), self._link
                    log.warning("the model is loaded again and serves")
                except (ValueError, OSError, ExecutorError) as problem:  # memory that is not yet free, for instance
                    if self._is_closing:
                        return
                    self.failure = error = str(problem)
                    num_deaths += 1

    async def close(self) -> None:
        """End the engine's process; requests that are open end with an error."""
        self._is_closing = True
        if self._link is not None:
            link, self._link = self._link, None
            self._fail("the server ends")
            self.failure = None
            await link.end()

    # Requests.

    async def answer(
        self,
        prompts: Sequence[Prompt | PromptMaker],
        params: GenerationParams | Sequence[GenerationParams],
        *,
        must_fit: bool = False,
    ) -> Answers:
        """Queue `n` answers to each prompt, all or none.

        params: of all prompts, or of each. must_fit: refuse answers that cannot have `max_tokens`; else they end where
        the model takes no longer sequence. Raises ValueError if one cannot be answered with these settings,
        PromptTooLong among them, Overloaded if too many answers wait, NotReady if there is no engine."""
        started, model = time.monotonic(), self.ready_model()
        each = [params] * len(prompts) if isinstance(params, GenerationParams) else list(params)
        for one in each:
            model.client.checks.check(one)
        num_answers = sum(one.n for one in each)
        self._admission.reserve(num_answers, model.client.description.num_slots)
        answers = Answers(num_answers, [], self._close_answers)
        try:
            # In a thread, since long prompts take long.
            answers.prompt_ids = await asyncio.to_thread(model.prompt_ids, prompts, each, must_fit)
            if self.model is not model:
                raise NotReady(self._why_not_ready())
            for prompt_index, (ids, one) in enumerate(zip(answers.prompt_ids, each, strict=True)):
                for sample_index in range(one.n):
                    request_id = model.text_engine.add_checked(ids, one, sample_index, prompt_index)
                    self._open[request_id] = OpenAnswer(answers, one, started)
                    answers.request_ids.add(request_id)
        except BaseException:
            self._admission.release(num_answers - len(answers.request_ids))
            answers.close()
            raise
        if (record := current_record.get()) is not None:
            record.answers.append(answers)
        if self._observer is not None:
            self._observer.on_answers(answers)
        return answers

    def ready_model(self) -> LoadedModel:
        """The model that serves. Raises NotReady."""
        if self.model is None or self.is_draining:
            raise NotReady(self._why_not_ready(), retry_after=5)
        return self.model

    def _why_not_ready(self) -> str:
        if self.failure is not None:
            return f"the engine has ended: {self.failure}"
        if self.is_draining or self._is_closing:
            return "the server is about to end; send the request to another one"
        return "the model is being loaded"

    def _close_answers(self, answers: Answers) -> None:
        for request_id in sorted(answers.request_ids):
            one = self._open.pop(request_id)
            self._admission.release()
            if self.model is not None:
                self.model.text_engine.cancel(request_id)
            if self._observer is not None:
                self._observer.on_cancel(one.params)
        answers.request_ids.clear()

    def _deliver(self, deltas: Sequence[OutputDelta]) -> None:
        for delta in deltas:
            request_id = delta.request_id
            assert request_id is not None, "only prompts that were refused have none, and those have no events"
            one = self._open[request_id]
            one.answers.put(delta)
            if delta.is_finished:
                del self._open[request_id]
                one.answers.request_ids.remove(request_id)
                self._admission.end(time.monotonic() - one.started)
                self._num_finished += delta.output.error is None
            if self._observer is not None:
                self._observer.on_delta(delta, one)

    # The engine's process.

    async def _serve(self, link: EngineLink, model: LoadedModel) -> str | None:
        """Take messages until the engine ends. Returns why; None if it was told to."""
        limit = self._config.worker_timeout * model.ready.description.num_stages + _SECONDS_FOR_WORKERS
        watch = asyncio.create_task(link.watch(limit))
        try:
            while isinstance(message := await link.receive_or_end(), StepEvents | Pong):
                if isinstance(message, Pong):
                    self.stage_loads, self.audits = message.stages, message.audits
                elif not self._is_closing:
                    self._take(message, model)
        except Exception as error:
            # Nobody may wait for an engine that is no longer listened to.
            log.exception("the engine's messages cannot be used")
            message = Failed(f"what the engine has sent could not be used ({type(error).__name__}: {error})")
        finally:
            watch.cancel()
        if self._is_closing:
            return None
        if isinstance(message, Failed):
            self._fail(message.error)  # before the process has ended, which takes its time
        return (await self._ended(link, message)).error

    def _take(self, step: StepEvents, model: LoadedModel) -> None:
        self.load = step.load
        self._deliver(model.text_engine.take(model.client.take(step.events)))

    async def _ended(self, link: EngineLink, last: FromEngine | None) -> Failed:
        """What became of the process."""
        self._link = None
        how = await link.end()
        return last if isinstance(last, Failed) else Failed(how)

    def _fail(self, error: str) -> None:
        """Tell everybody."""
        model, self.model, self.failure, self.load = self.model, None, error, EngineLoad()
        self.stage_loads, self.audits = (), ()
        if model is not None:
            self._deliver(model.text_engine.take(model.client.fail_all(error)))
