"""Caches what the frozen layers make of the training samples, so that tuning exits need not run the layers again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron.early_exit.checkpoint.tensors import EXIT_HEAD
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.data.batches import Batch, Samples, build_iterator
from megatron.early_exit.data.core_datasets import TokenDataset
from megatron.early_exit.data.hidden_states import CacheContent, CachedSamples, HiddenStateCache
from megatron.early_exit.model.build import Model, params_dtype
from megatron.early_exit.model.exit_losses import FINAL
from megatron.early_exit.model.exit_strategies import Capture
from megatron.early_exit.model.sizes import cached_samples
from megatron.early_exit.platform.device import device
from megatron.early_exit.platform.distributed import on_rank_zero
from megatron.early_exit.training.step import run_schedule


class HiddenStateCaching:
    """The cache of one run on this rank: its files, and which part of them this rank writes and reads."""

    def __init__(self, folder: Path, config: RunConfig, model: Model, dataset: TokenDataset, num_samples: int) -> None:
        """dataset: the training samples; num_samples: that training draws in all. All ranks make one together, after
        the checkpoint is loaded. Raises ValueError if the folder holds hidden states of something else, OSError if the
        disk is too small."""
        self._config, self._model, self._dataset = config, model, dataset
        self._num_drawn = num_samples
        (self._chunk,) = model.chunks
        self.capture_points = self._chunk.capture_points()
        """Hidden states that are made on this rank."""
        self.tuning_points = self._chunk.tuning_points()
        """Hidden states that exits on this rank are tuned on; what they follow is made on the last stage."""
        seq_length = config.training.seq_length
        content = CacheContent(
            seq_length=seq_length,
            hidden_size=config.model.hidden_size,
            dtype=str(params_dtype(config)).removeprefix("torch."),
            layers=_sums_of_layers(model, config.build.num_built_layers),
            samples=_digests(dataset, cached_samples(config, num_samples)),
        )
        self.cache = HiddenStateCache(folder, content, cached_samples(config, num_samples))
        everywhere: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, (self.capture_points, self.tuning_points))
        made, read = ({point for one in everywhere for point in one[kind]} for kind in (0, 1))
        on_rank_zero(lambda: self.cache.create(sorted(made | read)))
        on_rank_zero(lambda: self._check_kept(read - made))
        if not _smallest(int(self.cache.is_there)):
            raise OSError(f"--cache-hidden-states {folder}: not all ranks see this folder; give one on a shared disk")
        self._tp_rank = parallel_state.get_tensor_model_parallel_rank()
        part = seq_length // parallel_state.get_tensor_model_parallel_world_size()
        is_split = config.parallel.sequence_parallel
        self._rows = slice(part * self._tp_rank, part * (self._tp_rank + 1)) if is_split else slice(None)

    def iterator(self, consumed_samples: int) -> Iterator[Batch] | None:
        """Microbatches with their hidden states, from sample `consumed_samples` on; None on a rank without exits."""
        if not self.tuning_points:
            return None
        samples = CachedSamples(
            self._dataset, self.cache, points=self.tuning_points, rows=self._rows, num_samples=self._num_drawn,
            seed=self._config.training.seed,
        )  # fmt: skip
        return self._iterator(samples, consumed_samples)

    def _iterator(self, samples: Samples, consumed_samples: int) -> Iterator[Batch]:
        return build_iterator(
            samples,
            consumed_samples=consumed_samples,
            micro_batch_size=self._config.training.micro_batch_size,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            num_workers=self._config.data.num_workers,
            device=device(),
        )

    def _check_kept(self, points: set[str]) -> None:
        """Raise ValueError if hidden states are not all there that no stage of this run makes."""
        missing = self.cache.num_samples - self.cache.num_leading(sorted(points))
        if missing:
            raise ValueError(
                f"--cache-hidden-states {self.cache.folder} lacks what the final head reads of {missing:,} of "
                f"{self.cache.num_samples:,} samples, and the stages after the last exit do not run. Keep it first: "
                "the same command without --tune-exit-pipeline-parallel-size, on ranks for all stages"
            )

    @torch.no_grad()
    def fill(self, say: Callable[[str], None], interruption: Callable[[], str | None]) -> bool:
        """Run the frozen layers over the samples that are not there yet; returns whether all are, or it was
        interrupted. What is written stays, and the next run goes on there. All ranks call it together."""
        num_samples, training = self.cache.num_samples, self._config.training
        stride = training.micro_batch_size * parallel_state.get_data_parallel_world_size()
        done = _smallest(self.cache.num_leading(self.capture_points)) // stride * stride
        if done < num_samples:
            say(f" caching hidden states of {num_samples - done:,} samples in {self.cache.folder}")
        iterator = self._iterator(self._dataset, done) if self._needs_data and done < num_samples else None
        per_call = max((training.global_batch_size or stride) // stride, 1)
        shown = 10 * done // num_samples
        while done < num_samples:
            if reason := interruption():
                say(f" stopped at {done:,} of {num_samples:,} samples: {reason}; the next run goes on there")
                return False
            num_microbatches = min(per_call, (num_samples - done) // stride)
            self._capture(iterator, done, num_microbatches)
            done += num_microbatches * stride
            if 10 * done // num_samples > shown:
                shown = 10 * done // num_samples
                say(f" cached {done:,} of {num_samples:,} samples")
        return True

    @property
    def _needs_data(self) -> bool:
        chunk = self._chunk
        return bool(
            chunk.pre_process or chunk.post_process or self.capture_points or self._config.data.reset_attention_mask
        )

    def _capture(self, iterator: Iterator[Batch] | None, first_sample: int, num_microbatches: int) -> None:
        """Run the layers over the next microbatches and write what exits read."""
        size = self._config.training.micro_batch_size
        stride = size * parallel_state.get_data_parallel_world_size()
        mine = first_sample + size * parallel_state.get_data_parallel_rank()
        starts = range(mine, mine + num_microbatches * stride, stride)
        next_start = {point: iter(starts) for point in self.capture_points}
        # Without sequence parallelism all TP ranks hold the same.
        is_writing = self._tp_rank == 0 or self._config.parallel.sequence_parallel

        def capture(point: str, hidden_states: Tensor) -> None:
            start = next(next_start[point])
            if is_writing:
                self.cache.write(point, start, self._rows.start or 0, hidden_states.transpose(0, 1))

        run_schedule(
            self._model, [iterator], Capture(capture), num_microbatches=num_microbatches, micro_batch_size=size,
            seq_length=self._config.training.seq_length,
        )  # fmt: skip
        torch.distributed.barrier()  # all parts of these samples are written
        if self._tp_rank == 0:
            for point in self.capture_points:
                self.cache.mark(point, [start + index for start in starts for index in range(size)])
        torch.distributed.barrier()


def _smallest(value: int) -> int:
    """The smallest value of all ranks."""
    tensor = torch.tensor([value], device=device())
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MIN)
    return int(tensor.item())


def _sums_of_layers(model: Model, num_layers: int) -> dict[str, float]:
    """The sum of absolute values of each frozen layer's weights, of the embedding's and of the final norm's, over all
    ranks of the model.

    Tells one model from another under any layout."""
    sums = torch.zeros(num_layers + 2, dtype=torch.float64, device=device())
    is_first_tp_rank = parallel_state.get_tensor_model_parallel_rank() == 0
    for chunk in model.chunks:
        modules = [(layer.layer_number, layer) for layer in chunk.decoder.layers]
        if chunk.pre_process:
            modules.append((0, chunk.embedding))
        if chunk.post_process:
            modules.append((num_layers + 1, chunk.decoder.final_layernorm))
        for number, module in modules:
            for name, parameter in module.named_parameters():
                is_counted = is_first_tp_rank or getattr(parameter, "tensor_model_parallel", False)
                if is_counted and not f".{name}".startswith(EXIT_HEAD):
                    sums[number] += torch.linalg.vector_norm(parameter.detach(), ord=1, dtype=torch.float64)
    torch.distributed.all_reduce(sums, group=parallel_state.get_model_parallel_group())
    *layers, final_norm = sums.tolist()
    named = {str(number): value for number, value in enumerate(layers)}
    # Without the final head it is not there, and nothing depends on it.
    return named | ({FINAL: final_norm} if final_norm else {})


def _digests(dataset: TokenDataset, num_samples: int) -> dict[str, str]:
    """Digests of samples 0, 1, 3, 7, ..., which tell one set of data from another."""
    numbers = [2**power - 1 for power in range(num_samples.bit_length())]
    return {str(number): _digest(dataset[number]) for number in numbers}


def _digest(sample: Batch) -> str:
    digest = hashlib.sha256(sample.tokens.numpy().tobytes())
    for field in (sample.position_ids, sample.attention_mask):
        if field is not None:
            digest.update(field.numpy().tobytes())
    return digest.hexdigest()[:16]
