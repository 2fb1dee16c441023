"""A model of transformers with early exits. Written by Megatron Early Exit (tools/convert_checkpoint.py).

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    ids = model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=20, exit_threshold=0.9)
    model.last_exit_layers      # the layer that each of these tokens left at

Without `exit_threshold` it generates as the plain model does. Without `trust_remote_code` it is the plain model; the
exits are then reported as parameters that are not used.
With a threshold: one sequence, greedily or by sampling; all settings of `generate` for logits and for stopping act. A
token leaves at the first exit whose largest probability (before temperature and other such settings) reaches it; exits
whose use is drafting alone are left out.

Hidden states that left wait where they left, and run through the deeper layers together with the next token that goes
there, so every KV cache is that of the whole model. The transformer block of an exit is one more layer with a cache of
its own, which every token runs when it reaches the exit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig
from transformers import LlamaForCausalLM as Base
from transformers.generation import GenerationMode


class ExitHead(nn.Module):
    """What one exit has of its own: a block, an MLP branch, a norm, an output projection, or some of these."""

    def __init__(self, model: EarlyExitForCausalLM, index: int) -> None:
        super().__init__()
        config, settings = model.config, model.config.early_exits
        # Each part is one of a layer's, whatever the architecture calls its classes and settings.
        layer_class: Any = type(model.decoder_layers[0])
        new_layer = lambda: layer_class(config, layer_idx=0)
        self.block = new_layer() if settings["block"][index] else None
        self.mlp = new_layer().mlp if settings["mlp"][index] else None
        self.norm = model.mlp_norm_of(new_layer()) if settings["norm"][index] else None
        own_output = settings["own_output"][index]
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if own_output else None
        modules: list[Any] = list(self.modules())
        for module in modules:
            if hasattr(module, "layer_idx"):
                module.layer_idx = len(model.decoder_layers) + index  # its cache lies behind those of the layers


@dataclass
class DecodeState:
    """How far one sequence has come."""

    length: int = 0
    """Tokens that have been read."""
    cache: DynamicCache = field(default_factory=DynamicCache)
    waiting: dict[int, Tensor] = field(default_factory=dict)
    """By the number of layers that they have run: hidden states [1, rows, h] of tokens that left there."""


class EarlyExitForCausalLM(Base):
    """The plain model, and its exits beside it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.last_exit_layers: list[int] = []
        # Parameters like all others: loaded, moved, saved and pushed with the model.
        self.exits = nn.ModuleList(ExitHead(self, index) for index in range(len(config.early_exits["layers"])))
        self.post_init()

    # Modules that architectures call by different names; config.json says which.

    @property
    def decoder_layers(self) -> nn.ModuleList:
        layers: nn.ModuleList = self.get_submodule(self.config.early_exits["modules"]["layers"])
        return layers

    @property
    def final_norm(self) -> nn.Module:
        norm: nn.Module = self.get_submodule(self.config.early_exits["modules"]["final_norm"])
        return norm

    def mlp_norm_of(self, layer: nn.Module) -> nn.Module:
        """The norm before its MLP."""
        return layer.get_submodule(self.config.early_exits["modules"]["mlp_norm"])

    def _module(self, role: str) -> nn.Module | None:
        """One that not every architecture has."""
        name = self.config.early_exits["modules"].get(role)
        return None if name is None else self.get_submodule(name)

    def generate(self, *args: Any, exit_threshold: float | None = None, **kwargs: Any) -> Any:
        if exit_threshold is None:
            return super().generate(*args, **kwargs)
        if not 0.0 <= exit_threshold <= 1.0:
            raise ValueError(f"exit_threshold is {exit_threshold}; it is a probability, from 0 to 1")
        for name in ("assistant_model", "past_key_values", "inputs_embeds", "stop_strings"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} cannot be used with exit_threshold; leave one of them out")

        # Called with all settings prepared, but without the streamer.
        def decode(model: EarlyExitForCausalLM, input_ids: Tensor, **prepared: Any) -> Tensor:
            return model._generate_early(input_ids, exit_threshold, kwargs.get("streamer"), **prepared)

        return super().generate(*args, custom_generate=decode, **kwargs)

    def _generate_early(
        self,
        input_ids: Tensor,
        exit_threshold: float,
        streamer: Any,
        *,
        generation_config: GenerationConfig,
        logits_processor: Any,
        stopping_criteria: Any,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """[1, tokens]: the prompt and what follows."""
        self._check(input_ids, attention_mask, generation_config)
        state, new = DecodeState(), input_ids
        self.last_exit_layers = []
        is_done = False
        while not is_done:
            logits, layer = self._next_logits(new.to(self.device), state, exit_threshold)
            scores = logits_processor(input_ids, logits.to(input_ids.device, torch.float32))
            if generation_config.do_sample:
                new = torch.multinomial(scores.softmax(-1), 1)
            else:
                new = scores.argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, new], -1)
            self.last_exit_layers.append(layer)
            if streamer is not None:
                streamer.put(new[0].cpu())
            is_done = bool(stopping_criteria(input_ids, None).all())
        if streamer is not None:
            streamer.end()
        return input_ids

    def _check(self, input_ids: Tensor, attention_mask: Tensor | None, settings: GenerationConfig) -> None:
        mode, attention = settings.get_generation_mode(), self.config._attn_implementation
        problem = None
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            problem = f"the generation mode {mode.value}; give num_beams=1 and no settings of assistants"
        elif input_ids.size(0) != 1:
            problem = f"{input_ids.size(0)} sequences; generate them one by one"
        elif attention_mask is not None and not attention_mask.all():
            problem = "an attention_mask with zeros; leave padding out"
        elif settings.return_dict_in_generate:
            problem = "return_dict_in_generate; it returns token ids, and the exits are in last_exit_layers"
        elif attention not in ("sdpa", "eager"):
            problem = f"attn_implementation {attention}; load the model with sdpa or eager"
        if problem is not None:
            raise ValueError(f"early exit generates one sequence, greedily or by sampling, but this asks for {problem}")

    def _next_logits(self, ids: Tensor, state: DecodeState, exit_threshold: float) -> tuple[Tensor, int]:
        """(logits [1, vocabulary] of the next token, the layer that says them). ids: [1, rows], not read yet"""
        settings, layers = self.config.early_exits, list(self.decoder_layers)
        state.length += ids.size(1)
        hidden, depth = self._embed(ids, state), 0
        for index, exit_layer in enumerate(settings["layers"]):
            following = exit_layer - 1 if settings["pre_exit"] else exit_layer
            hidden, residual = self._run(layers[depth:following], hidden, state)
            depth = following
            if settings["uses"][index] == "draft":
                continue  # nothing leaves there
            logits = self._ask(index, hidden, residual, state)
            hidden = torch.cat([state.waiting.pop(depth, hidden[:, :0]), hidden], 1)
            if logits.softmax(-1).max() >= exit_threshold:
                state.waiting[depth] = hidden
                return logits, exit_layer
        hidden, _ = self._run(layers[depth:], hidden, state)
        return self.get_output_embeddings()(self.final_norm(hidden[:, -1])), len(layers)

    def _embed(self, ids: Tensor, state: DecodeState) -> Tensor:
        hidden: Tensor = self.get_input_embeddings()(ids)
        positions = self._module("positions")
        return hidden if positions is None else hidden + positions(_position_ids(hidden, state))

    def _run(self, layers: Sequence[nn.Module], hidden: Tensor, state: DecodeState) -> tuple[Tensor, Tensor]:
        """The newest rows of the sequence through layers, or through a block. Returns them, and the last layer's
        residual after attention. hidden: [1, rows, h]"""
        if not layers:
            return hidden, hidden
        positions, rotary = _position_ids(hidden, state), self._module("rotary")
        arguments = {
            "attention_mask": self._mask(hidden, state), "position_ids": positions,
            "past_key_values": state.cache, "use_cache": True,
        }  # fmt: skip
        if rotary is not None:
            arguments["position_embeddings"] = rotary(hidden, position_ids=positions)
        residuals: list[Tensor] = []
        keep = lambda _, inputs: residuals.append(inputs[0])
        with self.mlp_norm_of(layers[-1]).register_forward_pre_hook(keep):
            for layer in layers:
                output = layer(hidden, **arguments)
                hidden = output if isinstance(output, Tensor) else output[0]  # a tuple in transformers 5.0
        return hidden, residuals[0]

    def _mask(self, hidden: Tensor, state: DecodeState) -> Tensor | None:
        """[1, 1, rows, tokens], added to attention scores; None if it hides nothing, or sdpa makes it itself."""
        rows, length = hidden.size(1), state.length
        if rows == 1 or (rows == length and self.config._attn_implementation == "sdpa"):
            return None
        allowed = torch.ones(rows, length, dtype=torch.bool, device=hidden.device).tril(length - rows)
        return torch.zeros_like(allowed, dtype=hidden.dtype).masked_fill_(~allowed, -torch.inf)[None, None]

    def _ask(self, index: int, hidden: Tensor, residual: Tensor, state: DecodeState) -> Tensor:
        """[1, vocabulary]: logits of an exit for the last row. All rows are new to its block, and run through it."""
        head, settings = cast(ExitHead, self.exits[index]), self.config.early_exits
        if head.block is not None:
            hidden, _ = self._run([head.block], hidden, state)
        states = hidden[:, -1]
        if head.mlp is not None:
            states = residual[:, -1]
            states = states + head.mlp(self.mlp_norm_of(self.decoder_layers[settings["layers"][index] - 1])(states))
        if head.norm is not None:
            states = head.norm(states)
        output = self.get_output_embeddings() if head.output is None else head.output
        logits: Tensor = output(states).float() / settings["temperatures"][index]
        return logits


def _position_ids(hidden: Tensor, state: DecodeState) -> Tensor:
    """[1, rows] of the newest rows of the sequence. hidden: [1, rows, h]"""
    return torch.arange(state.length - hidden.size(1), state.length, device=hidden.device)[None]
