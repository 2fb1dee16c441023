"""An early-exit GPT in plain PyTorch autograd: full logits, no chunks, no deferral, no parallelism, nothing of core.

Parameters are a dict under the names of our model with global layer indices (from 0).
"""

from __future__ import annotations

import math
import zlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron.early_exit.config.run import RunConfig


class ReferenceBatch(NamedTuple):
    """One microbatch; all [b, s]; attention_mask [b, 1, s, s], True = forbidden, or None."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None = None


def parameter_value(name: str, shape: tuple[int, ...]) -> Tensor:
    """The full tensor of the parameter `name`, the same in every process."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    value = torch.randn(shape, generator=generator) * (0.02 if "embed" in name or "output_layer" in name else 0.08)
    if "norm" in name and name.endswith("weight"):
        value = 1.0 + value
    return value


def make_batches(
    cfg: RunConfig, vocab_size: int, count: int, seed: int = 0, masked: bool = True
) -> list[ReferenceBatch]:
    """`count` microbatches of random tokens; with `masked`, a different share of each is masked."""
    generator = torch.Generator().manual_seed(seed)
    b, s = cfg.training.micro_batch_size, cfg.training.seq_length
    batches = []
    for index in range(count):
        ids = torch.randint(0, vocab_size, (b, s + 1), generator=generator)
        loss_mask = torch.ones(b, s)
        if masked:
            loss_mask = (torch.rand(b, s, generator=generator) > 0.15 * (index % 4)).float()
        positions = torch.arange(s).expand(b, s)
        batches.append(ReferenceBatch(ids[:, :-1].clone(), ids[:, 1:].clone(), loss_mask, positions))
    return batches


def drawn_token_weights(labels: Tensor, loss_mask: Tensor, fraction: float, key: tuple[int, int, int]) -> Tensor:
    """[b, s]: n / n' at the tokens that an exit learns from, 0 elsewhere. In integers of Python, by the definition.

    key: (seed, iteration, exit); labels, loss_mask: [b, s]"""
    modulus = 2**64

    def mix(value: int) -> int:
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % modulus
        value = (value ^ value >> 27) * 0x94D049BB133111EB % modulus
        return value ^ value >> 31

    in_order = labels.t().flatten().tolist()  # as hidden states [s, b, h]
    state = sum(mix((mix(place) + label) % modulus) for place, label in enumerate(in_order, start=1)) % modulus
    for number in key:
        state = mix((state + number) % modulus)
    numbers = [mix((state + place * 0x9E3779B97F4A7C15) % modulus) for place in range(1, len(in_order) + 1)]
    unmasked = [row for row, mask in enumerate(loss_mask.t().flatten().tolist()) if mask]
    drawn = sorted(unmasked, key=lambda row: numbers[row])[: max(1, round(fraction * len(unmasked)))]
    weights = torch.zeros(len(in_order))
    weights[drawn] = len(unmasked) / max(len(drawn), 1)
    return weights.view(labels.t().shape).t()


class ReferenceModel:
    """Losses of all exits and of the final head for one microbatch."""

    def __init__(self, cfg: RunConfig, vocab_size: int) -> None:
        self.cfg, self.vocab_size = cfg, vocab_size
        self.params: dict[str, Tensor] = {}

    def p(self, name: str, *shape: int) -> Tensor:
        if name not in self.params:
            self.params[name] = parameter_value(name, shape).requires_grad_()
        return self.params[name]

    def norm(self, name: str, x: Tensor) -> Tensor:
        m = self.cfg.model
        weight = self.p(f"{name}.weight", m.hidden_size)
        if m.normalization == "RMSNorm":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.norm_epsilon) * weight
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(var + m.norm_epsilon) * weight + self.p(f"{name}.bias", m.hidden_size)

    def linear(self, name: str, x: Tensor, out_size: int, bias: bool | None = None) -> Tensor:
        y = x @ self.p(f"{name}.weight", out_size, x.size(-1)).t()
        if self.cfg.model.add_bias_linear if bias is None else bias:
            y = y + self.p(f"{name}.bias", out_size)
        return y

    def rotate(self, x: Tensor) -> Tensor:
        """x: [b, heads, s, d]"""
        m = self.cfg.model
        dim = int(m.head_size * m.rotary_percent)
        frequencies = m.rotary_base ** (-torch.arange(0, dim, 2).float() / dim)
        angles = torch.outer(torch.arange(x.size(2)).float(), frequencies)
        cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
        rotated, passed = x[..., :dim], x[..., dim:]
        half = torch.cat([-rotated[..., dim // 2 :], rotated[..., : dim // 2]], -1)
        return torch.cat([rotated * cos + half * sin, passed], -1)

    def attention(self, name: str, x: Tensor, mask: Tensor | None) -> Tensor:
        """x: [b, s, h]"""
        m = self.cfg.model
        b, s, _ = x.shape
        groups, per_group, d = m.num_kv_heads, m.num_attention_heads // m.num_kv_heads, m.head_size
        bias = m.add_bias_linear or m.add_qkv_bias
        qkv = self.linear(f"{name}.linear_qkv", x, groups * (per_group + 2) * d, bias)
        qkv = qkv.view(b, s, groups, per_group + 2, d)
        q = qkv[..., :per_group, :].reshape(b, s, groups * per_group, d).transpose(1, 2)
        k = qkv[..., per_group : per_group + 1, :].expand(b, s, groups, per_group, d).reshape(q.transpose(1, 2).shape)
        v = qkv[..., per_group + 1 :, :].expand(b, s, groups, per_group, d).reshape(q.transpose(1, 2).shape)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if m.position_embedding_type == "rope":
            q, k = self.rotate(q), self.rotate(k)
        scores = q @ k.transpose(-1, -2) / math.sqrt(d)
        forbidden = torch.ones(s, s, dtype=torch.bool).triu(1) if mask is None else mask
        context = scores.masked_fill(forbidden, -torch.inf).softmax(-1) @ v
        context = context.transpose(1, 2).reshape(b, s, groups * per_group * d)
        return self.linear(f"{name}.linear_proj", context, m.hidden_size)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        m = self.cfg.model
        if m.swiglu:
            gate, up = self.linear(f"{name}.linear_fc1", x, 2 * m.ffn_size).chunk(2, -1)
            return self.linear(f"{name}.linear_fc2", F.silu(gate) * up, m.hidden_size)
        return self.linear(
            f"{name}.linear_fc2", F.gelu(self.linear(f"{name}.linear_fc1", x, m.ffn_size)), m.hidden_size
        )

    def layer(self, name: str, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(residual after attention, output)"""
        residual = x + self.attention(f"{name}.self_attention", self.norm(f"{name}.input_layernorm", x), mask)
        return residual, residual + self.mlp(f"{name}.mlp", self.norm(f"{name}.pre_mlp_layernorm", residual))

    def output_weight(self) -> Tensor:
        m = self.cfg.model
        tied = not m.untie_embeddings_and_output_weights
        return self.p(
            "embedding.word_embeddings.weight" if tied else "output_layer.weight", self.vocab_size, m.hidden_size
        )

    def logits(self, batch: ReferenceBatch) -> list[Tensor]:
        """[b, s, vocabulary] of every exit in order, and of the final head."""
        m, exits = self.cfg.model, self.cfg.exits
        table = self.p("embedding.word_embeddings.weight", self.vocab_size, m.hidden_size)
        x = table[batch.tokens]
        if m.position_embedding_type == "learned_absolute":
            length = m.max_position_embeddings or self.cfg.training.seq_length
            x = x + self.p("embedding.position_embeddings.weight", length, m.hidden_size)[batch.position_ids]
        logits = []
        for index in range(m.num_layers):
            name = f"decoder.layers.{index}"
            before = x
            residual, x = self.layer(name, x, batch.attention_mask)
            if index + 1 in exits.exit_layer_nums:
                h, kind = before if exits.pre_exit else x, exits.head_of(len(logits))
                if kind.mlp:
                    h = residual + self.mlp(f"{name}.exit_head.mlp", self.norm(f"{name}.pre_mlp_layernorm", residual))
                if kind.block:
                    _, h = self.layer(f"{name}.exit_head.block", h, batch.attention_mask)
                if kind.norm:
                    h = self.norm(f"{name}.exit_head.norm", h)
                if kind.untied_output:
                    weight = self.p(f"{name}.exit_head.output_layer.weight", self.vocab_size, m.hidden_size)
                else:
                    weight = self.output_weight()
                logits.append(h @ weight.t() / exits.temperature_of(len(logits)))
        logits.append(self.norm("decoder.final_layernorm", x) @ self.output_weight().t())
        return logits

    def token_weights(self, batch: ReferenceBatch, head: int, iteration: int) -> Tensor:
        """[b, s]: how often each unmasked token counts in the loss of an exit, or (last) of the final head."""
        exits = self.cfg.exits
        if head == exits.num_exits or exits.token_fraction_of(head) == 1.0:
            return torch.ones_like(batch.loss_mask)
        key = (self.cfg.training.seed, iteration, head)
        return drawn_token_weights(batch.labels, batch.loss_mask, exits.token_fraction_of(head), key)

    def losses(self, batch: ReferenceBatch, iteration: int = 0) -> tuple[list[Tensor], list[Tensor]]:
        """(sums that are differentiated, plain sums of losses), one for every exit and last the final head."""
        objectives, plain = [], []
        for position, logits in enumerate(self.logits(batch)):
            token_losses = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
            token_losses = token_losses.view(batch.labels.shape) * batch.loss_mask
            token_weights = self.token_weights(batch, position, iteration)
            plain.append((token_losses * (token_weights > 0)).sum().detach())
            is_exit = position < self.cfg.exits.num_exits
            if is_exit and self.cfg.exits.use_dynamic_exit_layer_weight:
                token_losses = token_losses * logits.softmax(-1).amax(-1).detach()
            objectives.append((token_losses * token_weights).sum())
        return objectives, plain

    def gradients(
        self, batches: list[ReferenceBatch], weights: tuple[float, ...], iteration: int = 0
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of the objective over a global batch, and [exits + 1] mean losses in nats per token that counts."""
        sums, tokens = 0.0, 0.0
        total_tokens = sum(batch.loss_mask.sum() for batch in batches)
        for batch in batches:
            objectives, plain = self.losses(batch, iteration)
            objective = sum(w * o for w, o in zip((*weights, 1.0), objectives, strict=True))
            divisor = batch.loss_mask.sum().clamp(min=1) * len(batches)
            if self.cfg.parallel.calculate_per_token_loss:
                divisor = total_tokens
            (objective / divisor).backward()
            heads = [self.token_weights(batch, head, iteration) for head in range(len(plain))]
            counted = [(batch.loss_mask * (token_weights > 0)).sum() for token_weights in heads]
            sums, tokens = sums + torch.stack(plain), tokens + torch.stack(counted)
        return {name: value.grad for name, value in self.params.items()}, sums / tokens
