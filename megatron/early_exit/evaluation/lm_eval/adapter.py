"""The model `early-exit` of lm-eval (lm-evaluation-harness): a checkpoint in this process, in any mode of decoding.

    import lm_eval
    from megatron.early_exit.evaluation.lm_eval import adapter   # registers the model

    lm_eval.simple_evaluate(model="early-exit", model_args="pretrained=CHECKPOINTS,exit_layer=4", tasks=["hellaswag"])

Likelihoods and answers are those of lm-eval's own `hf` over the same weights, up to rounding: texts are tokenized, cut
and stopped by the same rules. All requests of a task are given to the engine, which runs as many as have a place, and
computes beginnings that they share once.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from megatron.early_exit.data.tokenizer_libraries import HuggingFaceLibrary
from megatron.early_exit.evaluation.lm_eval.answers import AnswerRequest
from megatron.early_exit.evaluation.lm_eval.model_arguments import ModelArguments
from megatron.early_exit.evaluation.lm_eval.modes import FULL, DecodingMode
from megatron.early_exit.evaluation.lm_eval.texts import TextRules
from megatron.early_exit.inference.llm import LLM

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

log = logging.getLogger(__name__)

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]
"""(texts, ids of the context, ids of the continuation), as lm-eval passes them."""


@register_model("early-exit")
class EarlyExitLM(TemplateLM):
    """A loaded model as lm-eval asks it."""

    max_gen_toks = 256
    """Tokens of an answer, unless the task says; that of `hf`."""

    def __init__(
        self,
        llm: LLM,
        mode: DecodingMode = FULL,
        *,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        model_info: Mapping[str, Any] | None = None,
    ) -> None:
        """add_bos_token, prefix_token_id: see `ModelArguments`. model_info: of the checkpoint, for `get_model_info`.

        Raises ValueError if the model cannot do what the mode asks for."""
        super().__init__()
        if mode.params.certified_level is None:  # else it depends on the length of answers as well
            llm.engine.checks.check(mode.params)
        mode.score_params.heads(llm.exits)
        self.llm, self.mode = llm, mode
        self._tokenizer = llm.tokenizer
        self.texts = TextRules(llm.tokenizer, add_bos_token, prefix_token_id)
        self._model_info = dict(model_info or {})
        library = llm.tokenizer.library
        self.tokenizer = library.tokenizer if isinstance(library, HuggingFaceLibrary) else None
        """That of transformers, if it is one: lm-eval reports its special tokens and asks for its chat template."""
        self.thresholds = self._thresholds()
        """By layer, of exits that may be taken; also those of a certificate."""

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> EarlyExitLM:
        """Load what the model arguments name. additional_config: lm-eval's batch size and device, which the engine has
        of its own. Raises ValueError for odd arguments, before anything is loaded."""
        arguments = ModelArguments.from_mapping(arg_dict)
        mode = arguments.decoding()
        loaded = arguments.load()
        checkpoint = loaded.checkpoint
        return cls(
            LLM(loaded.engine, loaded.tokenizer, loaded.engine.exits),
            mode,
            add_bos_token=arguments.add_bos_token,
            prefix_token_id=arguments.prefix_token_id,
            model_info={
                "checkpoint": str(checkpoint.folder),
                "model_dtype": str(checkpoint.dtype).removeprefix("torch."),
                "quantize": arguments.quantize,
            },
        )

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> EarlyExitLM:
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    def _thresholds(self) -> dict[int, float]:
        """Raises ValueError if there is no certificate of the level."""
        params = self.mode.params
        if params.certified_level is not None:
            return self.llm.engine.checks.certificates.find(params.certified_level).thresholds
        policy = params.exit_policy(self.llm.exits)
        return {} if policy is None else dict(zip(policy.exit_layers, policy.thresholds, strict=True))

    def check_answers(self, arguments: Mapping[str, Any]) -> None:
        """Raise ValueError if the model cannot answer with these generation arguments, whatever the prompt."""
        self.llm.engine.checks.check(self._answer("", arguments).params)

    # What lm-eval asks about the model.

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is conditioned on."""
        return self.texts.prefix_token_id

    @property
    def max_length(self) -> int:
        """Tokens of a sequence."""
        return self.llm.engine.description.num_positions

    @property
    def tokenizer_name(self) -> str:
        """Names files of cached requests, which depend on the tokenizer."""
        return f"early-exit-{self._tokenizer.fingerprint[:16]}".replace("/", "__").replace(" ", "_")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation. A template that refuses a system message gets the others alone, as in `hf`.

        Raises ValueError if the tokenizer has no template."""
        if self._tokenizer.chat_template is None or self.tokenizer is None:
            raise ValueError("the tokenizer of this checkpoint has no chat template; leave out --apply_chat_template")
        import jinja2

        settings = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            text: str = self.tokenizer.apply_chat_template(chat_history, **settings)
        except jinja2.exceptions.TemplateError:
            log.warning("the chat template refuses a conversation; trying it without the system message")
            rest = [message for message in chat_history if message["role"] != "system"]
            text = self.tokenizer.apply_chat_template(rest, **settings)
        return text

    def get_model_info(self) -> dict[str, Any]:
        """What a table of results should say beside the numbers."""
        thresholds = {"thresholds": {str(layer): value for layer, value in self.thresholds.items()}}
        return {**self._model_info, "max_length": self.max_length, **self.mode.settings, **thresholds}

    # Text to ids.

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text. By default with what the tokenizer begins texts with, unless the text spells it already."""
        if add_special_tokens is None:
            return self.texts.encode(string, begins_with=self.prefix_token_id)
        return self._tokenizer.encode_prompt(string, add_special_tokens)

    # Likelihoods.

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = super().loglikelihood(
            requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty()
        )
        return answers

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is what greedy decoding would give) of each continuation."""
        whole = self._cut([(context, continuation) for _, context, continuation in requests])
        starts = [len(ids) - len(request[2]) - 1 for ids, request in zip(whole, requests, strict=True)]
        params = [replace(self.mode.score_params, score_from=start) for start in starts]
        answers: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or None, desc="Running loglikelihood requests") as bar:
            for index, result in self.llm.stream_scores(whole, params):
                (head,) = result.check().heads
                texts, continuation = requests[index][0], requests[index][2]
                answers[index] = math.fsum(head.log_probs), list(head.tokens) == continuation
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answers[index])
                bar.update()
        return answers

    def _cut(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[list[int]]:
        """Contexts and continuations, without what does not fit at the left. A context without ids (nothing but spaces,
        which belong to the continuation) is as none. Raises ValueError if a continuation alone does not fit."""
        for _, continuation in pairs:
            if not continuation:
                raise ValueError("a continuation has no tokens, so that it has no likelihood; see the task's choices")
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens, but the model takes {self.max_length} (max_length)"
                )
        whole = [(context or [self.prefix_token_id]) + continuation for context, continuation in pairs]
        self._warn_of_cuts([len(ids) for ids in whole], self.max_length + 1)
        return [ids[-(self.max_length + 1) :] for ids in whole]

    @staticmethod
    def _warn_of_cuts(lengths: Sequence[int], room: int) -> None:
        num_cut = sum(length > room for length in lengths)
        if num_cut:
            log.warning(
                "%d of %d prompts are cut on the left: of at most %d tokens the last %d are used",
                num_cut, len(lengths), max(lengths), room,
            )  # fmt: skip

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood (nats) of each whole text, in windows that share no token but the first of their context."""
        windows: list[TokenRequest] = []
        counts = []
        for (text,) in (request.args for request in requests):
            rolling = utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            of_text = [(None, *utils.make_disjoint_window(window)) for window in rolling]
            windows += of_text
            counts.append(len(of_text))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        sums = [math.fsum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    # Answers.

    def _answer(self, context: str, arguments: Mapping[str, Any]) -> AnswerRequest:
        """Raises ValueError for generation arguments that are not known."""
        return AnswerRequest(self.texts, self.mode.params, context, arguments, self.max_length, self.max_gen_toks)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text of each answer, up to the first of the task's stop strings or the end of text."""
        asked = [request.args[:2] for request in requests]
        prepared = [self._answer(context, arguments) for context, arguments in asked]
        for room in {one.room for one in prepared}:
            self._warn_of_cuts([one.prompt_length for one in prepared if one.room == room], room)
        # A task that asks the same several times wants several samples.
        seen: Counter[str] = Counter()
        params = []
        for (context, arguments), one in zip(asked, prepared, strict=True):
            key = repr((context, arguments))
            params.append(replace(one.params, sampling=one.params.sampling.of_sample(seen[key])))
            seen[key] += 1
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or None, desc="Running generate_until requests") as bar:
            for delta in self.llm.stream([one.prompt for one in prepared], params):
                if not delta.is_finished:
                    continue
                output = delta.output
                if output.error is not None:
                    raise ValueError(f"a prompt could not be answered: {output.error}")
                index = output.prompt_index
                texts[index] = prepared[index].text(output.check().token_ids)
                self.cache_hook.add_partial("generate_until", asked[index], texts[index])
                bar.update()
        return texts
