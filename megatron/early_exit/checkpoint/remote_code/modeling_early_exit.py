"""A Llama-like model of transformers with early exits. Written by Megatron Early Exit (tools/convert_checkpoint.py).

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    ids = model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=20, exit_threshold=0.9)
    model.last_exit_layers      # the layer that each of these tokens left at

Without `exit_threshold` it generates as the plain model does, and without `trust_remote_code` it is the plain model.
With a threshold: one sequence, greedy; a token leaves at the first exit whose largest probability reaches it. Hidden
states of tokens that left wait where they left, and run through the deeper layers together with the next token that
goes there, so the KV cache is that of the whole model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache
from transformers import LlamaForCausalLM as Base
from transformers.utils import cached_file

EXITS_FILE = "exits.safetensors"


class ExitHead(nn.Module):
    """What one exit has of its own: a norm, an MLP branch, an output projection, or some of these."""

    def __init__(self, model: Base, settings: dict[str, Any]) -> None:
        super().__init__()
        config, norm, mlp = model.config, type(model.model.norm), type(model.model.layers[0].mlp)
        self.norm = norm(config.hidden_size, config.rms_norm_eps) if settings["norm"] else None
        self.mlp = mlp(config) if settings["mlp"] else None
        own_output = settings["own_output"]
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if own_output else None


class EarlyExitForCausalLM(Base):
    """The plain model, and its exits beside it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.last_exit_layers: list[int] = []
        # Not registered: the weights of the plain model are loaded by themselves.
        self.__dict__["exits"] = None

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, **kwargs: Any) -> EarlyExitForCausalLM:
        loaded = super().from_pretrained(path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        settings = model.config.early_exits
        exits = nn.ModuleList(ExitHead(model, settings) for _ in settings["layers"])
        file = Path(path) / EXITS_FILE if Path(path).is_dir() else cached_file(path, EXITS_FILE)
        exits.load_state_dict(load_file(file))
        model.__dict__["exits"] = exits.to(device=model.device, dtype=model.dtype).eval().requires_grad_(False)
        return loaded

    def generate(
        self, inputs: Tensor | None = None, *args: Any, exit_threshold: float | None = None, **kwargs: Any
    ) -> Tensor:
        if exit_threshold is None:
            return super().generate(inputs, *args, **kwargs)
        if not 0.0 <= exit_threshold <= 1.0:
            raise ValueError(f"exit_threshold is {exit_threshold}; it is a probability")
        ids = kwargs.pop("input_ids", inputs)
        if ids is None or ids.size(0) != 1 or kwargs.pop("do_sample", False) or kwargs.pop("num_beams", 1) != 1:
            raise ValueError("early exit generates for one sequence, greedily")
        count = kwargs.pop("max_new_tokens", None) or kwargs.pop("max_length", 20 + ids.size(1)) - ids.size(1)
        ends = kwargs.pop("eos_token_id", self.generation_config.eos_token_id)
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        return self._generate_early(ids, exit_threshold, count, ends)

    @torch.no_grad()
    def _generate_early(self, ids: Tensor, threshold: float, count: int, ends: set[int]) -> Tensor:
        cache, waiting = DynamicCache(config=self.config), {}
        self.last_exit_layers = []
        tokens = ids[0].tolist()
        if len(tokens) > 1:
            self.model(ids[:, :-1], past_key_values=cache, use_cache=True)
        for _ in range(count):
            token, layer = self._next(tokens[-1], cache, waiting, threshold)
            tokens.append(token)
            self.last_exit_layers.append(layer)
            if token in ends:
                break
        return torch.tensor([tokens], device=ids.device)

    def _next(self, token: int, cache: DynamicCache, waiting: dict[int, Tensor], threshold: float) -> tuple[int, int]:
        """(the next token, the layer that it left at). waiting: by depth, states [1, rows, h] that have run so far."""
        settings, layers = self.config.early_exits, self.model.layers
        hidden = residual = self.model.embed_tokens(torch.tensor([[token]], device=self.device))
        before = 1 if settings["pre_exit"] else 0
        depth = 0
        for index, layer in enumerate(settings["layers"]):
            hidden, residual = self._run(hidden, depth, layer - before, cache)
            depth = layer - before
            states = residual if settings["mlp"] else hidden
            probability, best = self._ask(index, layer, states[:, -1]).softmax(-1).max(-1)
            if probability.item() >= threshold:
                waiting[depth] = torch.cat([waiting[depth], hidden], 1) if depth in waiting else hidden
                return int(best), layer
            if depth in waiting:
                hidden = torch.cat([waiting.pop(depth), hidden], 1)
        hidden, _ = self._run(hidden, depth, len(layers), cache)
        return int(self.lm_head(self.model.norm(hidden[:, -1])).argmax(-1)), len(layers)

    def _run(self, hidden: Tensor, first: int, last: int, cache: DynamicCache) -> tuple[Tensor, Tensor]:
        """Rows through layers; returns them, and the last layer's residual after attention."""
        residual = hidden
        for index in range(first, last):
            layer, rows, cached = self.model.layers[index], hidden.size(1), cache.get_seq_length(index)
            positions = torch.arange(cached, cached + rows, device=hidden.device)[None]
            mask = None
            if rows > 1:
                allowed = torch.ones(rows, cached + rows, dtype=torch.bool, device=hidden.device).tril(cached)
                mask = torch.zeros_like(allowed, dtype=hidden.dtype).masked_fill_(~allowed, -torch.inf)[None, None]
            attended, _ = layer.self_attn(
                hidden_states=layer.input_layernorm(hidden),
                attention_mask=mask,
                position_ids=positions,
                position_embeddings=self.model.rotary_emb(hidden, position_ids=positions),
                past_key_values=cache,
                use_cache=True,
            )
            residual = hidden + attended
            hidden = residual + layer.mlp(layer.post_attention_layernorm(residual))
        return hidden, residual

    def _ask(self, index: int, layer: int, states: Tensor) -> Tensor:
        """Logits of an exit. states: [1, h]"""
        head = self.exits[index]
        if head.mlp is not None:
            states = states + head.mlp(self.model.layers[layer - 1].post_attention_layernorm(states))
        if head.norm is not None:
            states = head.norm(states)
        logits = (self.lm_head if head.output is None else head.output)(states)
        return logits.float() / self.config.early_exits["temperatures"][index]
