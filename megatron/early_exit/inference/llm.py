"""Text in, text out: a loaded model, its tokenizer and an engine.

llm = LLM.load("checkpoints")
for answer in llm.generate(["import os", "def main"], GenerationParams(mode="early_exit", exit_thresholds=(0.6,))):
    print(answer.text, answer.result.statistics.runs_saved)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.serialize import checkpoint_folder, read_description
from megatron.early_exit.data.tokenizer import Tokenizer
from megatron.early_exit.inference import checked
from megatron.early_exit.inference.calibration import ExitCalibration
from megatron.early_exit.inference.engine.engine import Engine, Event, QueueFull
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.results import GeneratedToken, RequestResult
from megatron.early_exit.inference.text import StopStrings, TextStream
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.inference.worker.kv_cache import check_cache_fits
from megatron.early_exit.inference.worker.linear import Int8Linear
from megatron.early_exit.inference.worker.weights import ExitProbe, decoder_weights, num_ids_with_rows
from megatron.early_exit.platform.device import use_cuda
from megatron.early_exit.platform.world import check_world_size

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

DEFAULT_PARAMS = GenerationParams()

Prompt = str | Sequence[int]
"""Text, or token ids."""


@dataclass
class Answer:
    """One answer to one prompt, as it grows."""

    prompt_index: int
    sample_index: int
    """0 to n - 1"""
    prompt_ids: list[int]
    text: str = ""
    """Without what a stop string cut off."""
    pieces: list[str] = field(default_factory=list)
    """The text that each token added."""
    tokens: list[GeneratedToken] = field(default_factory=list)
    result: RequestResult | None = None
    """Set when the answer is finished; None also for a prompt that was refused."""
    error: str | None = None
    """Why the prompt was refused or the request failed."""

    @property
    def finish_reason(self) -> str | None:
        """None while it grows."""
        if self.result is not None:
            return self.result.finish_reason
        return None if self.error is None else "error"


@dataclass(frozen=True)
class Update:
    """What one step added to one answer."""

    answer: Answer
    text: str
    """New text that no stop string can take back."""
    tokens: tuple[GeneratedToken, ...]
    """New tokens."""
    is_finished: bool


class _Growing:
    """An answer with what turns its ids into text."""

    def __init__(self, answer: Answer, tokenizer: Tokenizer, params: GenerationParams) -> None:
        self.answer = answer
        self._stream = TextStream(tokenizer, answer.prompt_ids)
        self._stops = StopStrings(params.stop)

    @property
    def is_stopped(self) -> bool:
        return self._stops.is_found

    def add(self, tokens: Sequence[GeneratedToken], is_last: bool) -> tuple[str, list[GeneratedToken]]:
        """(text that may be shown, tokens up to the one that completed a stop string)"""
        text, used = "", []
        for token in tokens:
            if self.is_stopped:
                break
            used.append(token)
            piece = self._stream.add(token.token)
            self.answer.pieces.append(piece)
            text += self._stops.add(piece)
        if is_last and not self.is_stopped:
            rest = self._stream.finish()
            if rest and self.answer.pieces:
                self.answer.pieces[-1] += rest
            text += self._stops.add(rest) + self._stops.finish()
        self.answer.text += text
        self.answer.tokens += used
        return text, used


class LLM:
    """A model that answers prompts. Under tensor parallelism all ranks make the same calls and get the same answers."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, exits: ExitConfig) -> None:
        self.engine, self.tokenizer, self.exits = engine, tokenizer, exits
        # Several streams may be open: a step of one brings events of the others.
        self._owned: set[int] = set()
        self._unclaimed: list[Event] = []

    @classmethod
    def load(
        cls,
        path: str,
        *,
        iteration: int | None = None,
        tensor_parallel_size: int = 1,
        dtype: str | None = None,
        max_requests: int = 16,
        max_length: int | None = None,
        max_waiting: int | None = None,
        prefill_chunk: int = 256,
        quantize: str | None = None,
        shortlist: bool | None = None,
        cuda_graphs: bool = True,
    ) -> LLM:
        """Load a training checkpoint of any layout.

        path: the --save folder. iteration: default the last one. tensor_parallel_size: ranks that share the weights
        (start them with torchrun). dtype: "fp32" or "bf16", default that of the training, fp32 for one in fp16.
        max_requests: slots, each with a KV cache. max_length: longest prompt and answer together, default what the
        model takes. max_waiting, prefill_chunk: see `Engine`. quantize: "exits" asks exits with weights in int8
        (tokens are still the exit's own), "all" keeps all linear layers in int8; on the CPU. shortlist: ask exits about
        frequent tokens only, as the checkpoint's calibration lists them; default if there is one that covers at most
        half of the vocabulary. cuda_graphs: start the kernels of several layers at once where that can be done (one
        GPU).

        Several models may be loaded in one process, all onto as many ranks.

        Raises ValueError or FileNotFoundError if there is no checkpoint, ValueError for settings that cannot work,
        among them sizes that no memory holds."""
        from megatron.early_exit.checkpoint.load_model import load_model_for_inference

        path, tensor_parallel_size = str(path), checked.integer("tensor_parallel_size", tensor_parallel_size)
        existing = torch.distributed.get_world_size() if torch.distributed.is_initialized() else None
        check_world_size(tensor_parallel_size, "tensor_parallel_size", existing)
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
        max_requests = checked.integer("max_requests", max_requests)
        if max_requests < 1:
            raise ValueError(f"max_requests is {max_requests}; it must be at least 1")
        if max_length is not None:
            max_length = checked.integer("max_length", max_length)
            if max_length < 1:
                raise ValueError(f"max_length is {max_length}; it must be at least 1")
        if quantize not in (None, "exits", "all"):
            raise ValueError(f"quantize is {quantize!r}; choose 'exits' or 'all', or leave it out")
        if quantize is not None and use_cuda():
            raise ValueError("quantize is for decoding on the CPU; on a GPU choose dtype bf16")
        folder = checkpoint_folder(path, iteration)
        saved = read_description(folder)
        if max_length is not None and max_length > saved.max_position_embeddings:
            raise ValueError(
                f"max_length is {max_length}; the model takes sequences of 1 to {saved.max_position_embeddings} tokens"
            )
        computes_in = DTYPES[dtype or ("bf16" if saved.dtype == "bf16" else "fp32")]
        check_cache_fits(saved, max_requests, max_length, tensor_parallel_size, computes_in.itemsize)
        calibration = ExitCalibration.load(folder)
        description, model, tokenizer = load_model_for_inference(path, iteration, tensor_parallel_size)
        weights = decoder_weights(
            model.chunks[0],
            description.model,
            computes_in,
            Int8Linear if quantize == "all" else None,
            _exit_probe(calibration, shortlist, quantize, tokenizer.vocab_size),
        )
        num_ids = num_ids_with_rows(model.chunks[0].model_output_weight, tokenizer.vocab_size, weights.tp)
        decoder = Decoder(
            weights, num_slots=max_requests, num_positions=max_length, vocab_size=num_ids,
            use_graphs=None if cuda_graphs else False,
        )  # fmt: skip
        engine = Engine(
            decoder, description.exits, ends=tokenizer.ends, max_waiting=max_waiting, prefill_chunk=prefill_chunk,
            calibration=calibration,
        )  # fmt: skip
        return cls(engine, tokenizer, description.exits)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: GenerationParams | Sequence[GenerationParams] = DEFAULT_PARAMS,
    ) -> list[Answer]:
        """Answer `prompts` (one, or several), all with the same settings or each with its own.

        Returns n answers for each prompt, in order. A prompt that cannot be answered gives an answer with `error` set;
        the others are untouched. Raises ValueError if the numbers of prompts and settings differ, or the model does not
        have the exits that the settings name."""
        answers: dict[tuple[int, int], Answer] = {}
        for update in self.stream(prompts, params):
            answers[update.answer.prompt_index, update.answer.sample_index] = update.answer
        return [answers[key] for key in sorted(answers)]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: GenerationParams | Sequence[GenerationParams] = DEFAULT_PARAMS,
    ) -> Iterator[Update]:
        """As `generate`, step by step. Leaving the loop early cancels what is unfinished."""
        growing: dict[int, _Growing] = {}
        try:
            yield from self._add(_as_list(prompts), params, growing)
            while growing:
                for event in self._events_of(growing):
                    yield self._update(event, growing)
        finally:
            for request_id in growing:
                self.engine.cancel(request_id)
            self._owned -= set(growing)

    def _events_of(self, growing: dict[int, _Growing]) -> list[Event]:
        """What is new for these requests; runs a step of the engine if nothing is."""
        if not any(event.request_id in growing for event in self._unclaimed):
            try:
                events = self.engine.step()
            except BaseException:
                self._keep(self.engine.fail_all("the engine failed"))
                raise
            self._keep(events)
        mine = [event for event in self._unclaimed if event.request_id in growing]
        self._unclaimed = [event for event in self._unclaimed if event.request_id not in growing]
        return mine

    def _keep(self, events: list[Event]) -> None:
        self._unclaimed += [event for event in events if event.request_id in self._owned]

    def _add(
        self,
        prompts: list[Prompt],
        params: GenerationParams | Sequence[GenerationParams],
        growing: dict[int, _Growing],
    ) -> Iterator[Update]:
        """Queue all prompts; yields those that are refused."""
        each = [params] * len(prompts) if isinstance(params, GenerationParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(each)} settings; give one for all, or one for each")
        for settings in each:
            if not isinstance(settings, GenerationParams):
                raise ValueError(f"params holds {settings!r}; it must be GenerationParams(...), or a list of them")
        for settings in each:
            settings.exit_policy(self.exits)
            settings.drafting_exit(self.exits)
        for prompt_index, (prompt, settings) in enumerate(zip(prompts, each, strict=True)):
            for sample_index in range(settings.n):
                answer = Answer(prompt_index, sample_index, [])
                try:
                    answer.prompt_ids = self._ids_of(prompt, settings)
                    request_id = self.engine.add(answer.prompt_ids, settings, seed_offset=sample_index)
                except Exception as error:  # whatever it is, it is this prompt's
                    answer.error = _in_words(error)
                    yield Update(answer, "", (), is_finished=True)
                else:
                    growing[request_id] = _Growing(answer, self.tokenizer, settings)
                    self._owned.add(request_id)

    def _ids_of(self, prompt: Prompt, settings: GenerationParams) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode_prompt(prompt, settings.add_special_tokens)
        ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
        if not isinstance(ids, Sequence) or isinstance(ids, (bytes, bytearray)):
            raise ValueError(f"a prompt is of the type {type(prompt).__name__}; give text or a list of ids")
        return [checked.integer("an id of the prompt", token) for token in ids]

    def _update(self, event: Event, growing: dict[int, _Growing]) -> Update:
        one, result = growing[event.request_id], event.result
        try:
            text, tokens = one.add(event.tokens, is_last=result is not None)
        except Exception as error:  # of the tokenizer, for instance
            return self._end_with_error(event.request_id, growing, error)
        if one.is_stopped and result is None:
            self.engine.stop(event.request_id, len(one.answer.tokens))  # the result comes with the next step
        if one.is_stopped and result is not None:
            result = replace(result, finish_reason="stop", tokens=tuple(one.answer.tokens))
        if result is not None:
            one.answer.result, one.answer.error = result, result.error
            del growing[event.request_id]
            self._owned.discard(event.request_id)
        return Update(one.answer, text, tuple(tokens), is_finished=result is not None)

    def _end_with_error(self, request_id: int, growing: dict[int, _Growing], error: Exception) -> Update:
        """End one request whose text cannot be made; the others go on."""
        log.info("request %d failed", request_id, exc_info=error)
        answer = growing.pop(request_id).answer
        self._owned.discard(request_id)
        self.engine.cancel(request_id)  # its result comes with the next step, for nobody
        answer.error = f"its text could not be made ({_in_words(error)})"
        return Update(answer, "", (), is_finished=True)


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError | QueueFull) else f"{type(error).__name__}: {error}"


def _exit_probe(
    calibration: ExitCalibration | None, shortlist: bool | None, quantize: str | None, vocab_size: int
) -> ExitProbe | None:
    if shortlist and calibration is None:
        raise ValueError("shortlist needs a calibration of the exits; tools/calibrate_exits.py makes it")
    if shortlist is None:
        shortlist = calibration is not None and 2 * len(calibration.shortlist) <= vocab_size
    ids = tuple(calibration.shortlist.tolist()) if shortlist else ()
    return ExitProbe(ids, quantize == "exits") if ids or quantize == "exits" else None


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
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
