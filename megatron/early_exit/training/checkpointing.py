"""Saves and loads training checkpoints in core's `torch_dist` format, readable under any TP/PP/DP layout.

    SAVE/latest_checkpointed_iteration.txt      number of the last finished checkpoint
    SAVE/iter_0000100/                          a finished checkpoint: core's files, plus
        run_config.yaml                         all settings of the run
        tokenizer/                              the tokenizer, so that the folder stands alone
    SAVE/iter_0000100.partial/                  a checkpoint that is being written, or whose writer was killed

A checkpoint gets its final name only when it is complete, so a killed save never damages an older one.
"""

from __future__ import annotations

import logging
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron.early_exit.checkpoint.core_loading import load_common, load_sharded
from megatron.early_exit.checkpoint.safe_pickle import UnsafeFileError, first_failure
from megatron.early_exit.checkpoint.store import (
    CONTENT_METADATA,
    TOKENIZER_FOLDER,
    checkpoint_folder,
    link_rest,
    publish,
)
from megatron.early_exit.checkpoint.tensors import EXIT_HEAD
from megatron.early_exit.config.parallel import ParallelConfig
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.config.serialize import (
    RUN_CONFIG_FILE,
    architecture_differences,
    iteration_folder,
    load_run_config,
    save_run_config,
)
from megatron.early_exit.config.validate import LATEST_FILE
from megatron.early_exit.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from megatron.early_exit.model.build import Model, build_model
from megatron.early_exit.platform.distributed import on_rank_zero
from megatron.early_exit.platform.optimizer_state import allocate_optimizer_state
from megatron.early_exit.training.state import TrainingState

_UNTOUCHED = "Earlier checkpoints are untouched: make room and resume with --load."

log = logging.getLogger(__name__)


@contextmanager
def _saying(what: str, advice: str) -> Iterator[None]:
    """Turn any failure of core's checkpoint code into an OSError that says what failed and what to do."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        cause = first_failure(error)
        if isinstance(cause, UnsafeFileError):
            raise cause from error
        raise OSError(f"{what} ({type(cause).__name__}: {cause}). {advice}") from error


class CheckpointSaver:
    """Writes checkpoints of one run, at once or in the background (`--async-save`). All ranks call it together."""

    def __init__(self, config: RunConfig, base: Path | None = None) -> None:
        """config: with the vocabulary size resolved (`padded_vocab_size`), as it is saved beside the weights. base: of
        a run that tunes exits, the checkpoint with everything else; the files of that are linked, so that checkpoints
        of the exits alone are whole ones."""
        self.config, self._base = config, base
        self.folder = Path(config.checkpoint.save)
        self._queue = AsyncCallsQueue() if config.checkpoint.async_save else None

    def check_folder(self, checkpoint_bytes: int) -> None:
        """Raise OSError on all ranks if the folder cannot be written or cannot hold one checkpoint."""
        on_rank_zero(lambda: self._check_folder(checkpoint_bytes))

    def _check_folder(self, checkpoint_bytes: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        probe = self.folder / ".write_test"
        probe.write_bytes(b"")
        probe.unlink()
        free = shutil.disk_usage(self.folder).free
        if free < checkpoint_bytes:
            raise OSError(
                f"--save {self.folder} has {free / 2**30:.2f} GiB free, one checkpoint takes about "
                f"{checkpoint_bytes / 2**30:.2f} GiB. Free some space or choose another folder."
            )

    def save(
        self,
        model: Model,
        optimizer: MegatronOptimizer | None,
        scheduler: OptimizerParamScheduler | None,
        state: TrainingState,
    ) -> None:
        """Write the checkpoint of `state.iteration`. With asynchronous saving it is finished by a later call, or by
        `finalize`. Raises OSError if it cannot be written; the checkpoints before it are as they were."""
        self.finalize(wait=True)  # one save at a time
        with _saying(f"saving iteration {state.iteration} in {self.folder} failed", _UNTOUCHED):
            self._save(model, optimizer, scheduler, state)

    def _save(
        self,
        model: Model,
        optimizer: MegatronOptimizer | None,
        scheduler: OptimizerParamScheduler | None,
        state: TrainingState,
    ) -> None:
        checkpoint = self.config.checkpoint
        final = iteration_folder(self.folder, state.iteration)
        partial = final.with_name(final.name + ".partial")
        on_rank_zero(lambda: self._prepare(partial))
        sharded_state = _sharded_state(
            model,
            None if checkpoint.no_save_optim else optimizer,
            None if checkpoint.no_save_optim else scheduler,
            state,
            with_rng=not checkpoint.no_save_rng,
        )
        if self._base is not None:
            _keep_exits_alone(sharded_state)
        request = dist_checkpointing.save(
            sharded_state,
            str(partial),
            TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
            async_sharded_save=self._queue is not None,
            content_metadata=dict(CONTENT_METADATA),
        )
        publish = lambda: self._publish(partial, final, state.iteration)
        if request is None:
            publish()
        else:
            request.add_finalize_fn(publish)
            self._queue.schedule_async_request(request)

    def finalize(self, wait: bool = False) -> None:
        """Finish asynchronous saves that are written; with `wait`, all of them."""
        if self._queue is not None:
            with _saying(f"an asynchronous save in {self.folder} failed", _UNTOUCHED):
                self._queue.maybe_finalize_async_calls(blocking=wait)

    def close(self) -> None:
        """Wait for what is being written and end the background process."""
        self.finalize(wait=True)
        if self._queue is not None:
            self._queue.close()

    @staticmethod
    def _prepare(partial: Path) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def _publish(self, partial: Path, final: Path, iteration: int) -> None:
        def rename() -> None:
            if self._base is not None:
                link_rest(partial, self._base)
            save_run_config(self.config, partial / RUN_CONFIG_FILE)
            if not self.config.data.mock_data:
                save_tokenizer(self.config.data, partial / TOKENIZER_FOLDER)
            publish(partial, final, iteration)
            if self.config.checkpoint.keep_last is not None:
                _remove_old(self.folder, self.config.checkpoint.keep_last, iteration)

        on_rank_zero(rename)


def _remove_old(folder: Path, keep_last: int, newest: int) -> None:
    """Remove finished checkpoints of iterations before `newest`, but for the last ones."""
    iterations = [int(m[1]) for path in folder.iterdir() if (m := re.fullmatch(r"iter_(\d{7,})", path.name))]
    for iteration in sorted(i for i in iterations if i <= newest)[:-keep_last]:
        shutil.rmtree(iteration_folder(folder, iteration))


def _sharded_state(
    model: Model,
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    state: TrainingState | None,
    *,
    with_rng: bool,
    is_loading: bool = False,
) -> dict[str, Any]:
    sharded: dict[str, Any] = {
        f"model{index}": chunk.sharded_state_dict(metadata=dict(CONTENT_METADATA))
        for index, chunk in enumerate(model.chunks)
    }
    if optimizer is not None:
        models = {key: value for key, value in sharded.items() if key.startswith("model")}
        sharded["optimizer"] = optimizer.sharded_state_dict(
            models, is_loading=is_loading, metadata=dict(CONTENT_METADATA)
        )
    if scheduler is not None:
        sharded["opt_param_scheduler"] = scheduler.state_dict()
    if state is not None:
        sharded["training_state"] = state.state_dict()
    if with_rng:
        sharded["rng_state"] = _sharded_rng_state()
    return sharded


def _keep_exits_alone(sharded_state: dict[str, Any]) -> None:
    """Drop from the model's state what tuning does not change."""
    for key in [key for key in sharded_state if key.startswith("model")]:
        state = sharded_state[key]
        sharded_state[key] = {name: value for name, value in state.items() if EXIT_HEAD in name}


def _sharded_rng_state() -> ShardedObject:
    """Random-number states. They differ over TP and PP and are the same over DP."""
    states = {
        "random": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    tp, pp = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    shape = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    return ShardedObject("rng_state", states, shape, (pp, tp), replica_id=parallel_state.get_data_parallel_rank())


def _set_rng_state(states: dict[str, Any]) -> None:
    random.setstate(states["random"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])


def find_checkpoint(load: str | None, load_iteration: int | None) -> Path | None:
    """Folder of the checkpoint to load, or None if `load` has none yet (a run that starts where it will save).

    Raises FileNotFoundError if `load_iteration` names one that is not there."""
    if load is None or (load_iteration is None and not (Path(load) / LATEST_FILE).exists()):
        return None
    return checkpoint_folder(load, load_iteration)


def load_checkpoint(
    folder: Path,
    config: RunConfig,
    model: Model,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
) -> TrainingState:
    """Load what `config.checkpoint` asks for from `folder` into the model, the optimizer, its schedule and the
    generators. Returns the progress of the run that saved it, or a new one with --finetune.

    Raises ValueError with the list of differences if the checkpoint has another architecture."""
    saved_config = load_run_config(folder / RUN_CONFIG_FILE)
    if differences := architecture_differences(config, saved_config):
        raise ValueError(
            f"{folder} holds another architecture:\n  " + "\n  ".join(differences)
            + "\nChange the flags, or take the architecture from the checkpoint with --use-checkpoint-args."
        )  # fmt: skip
    settings = config.checkpoint
    weights_only = settings.finetune
    damaged = f"the checkpoint {folder} cannot be read"
    advice = "It may be damaged: choose another with --load-iteration."
    with _saying(damaged, advice):
        common = load_common(folder)
    with_optimizer = optimizer is not None and not (weights_only or settings.no_load_optim)
    if with_optimizer and "optimizer" not in common:
        raise ValueError(
            f"{folder} has no optimizer state. Load weights only with --finetune, or --no-load-optim to go on counting."
        )
    if with_optimizer and config.parallel.use_distributed_optimizer != saved_config.parallel.use_distributed_optimizer:
        raise ValueError(
            f"{folder} was saved {'with' if saved_config.parallel.use_distributed_optimizer else 'without'} "
            "--use-distributed-optimizer, whose optimizer state has another form. Resume with the same choice (any "
            "TP, PP and DP), or drop the optimizer state with --no-load-optim."
        )
    with_rng = not (weights_only or settings.no_load_rng) and optimizer is not None
    if with_rng and not _has_same_model_layout(config.parallel, saved_config.parallel):
        _warnon_rank_zero(
            "random-number states are not loaded: the checkpoint was saved with another tensor or pipeline parallel "
            "size. Dropout continues with other random numbers; nothing else is affected."
        )
        with_rng = False
    if with_rng and saved_config.checkpoint.no_save_rng:
        with_rng = False

    if with_optimizer:
        allocate_optimizer_state(optimizer)
    sharded = _sharded_state(
        model, optimizer if with_optimizer else None, None, None, with_rng=with_rng, is_loading=True
    )
    with _saying(damaged, advice):
        loaded = load_sharded(sharded, folder)
    for index, chunk in enumerate(model.chunks):
        chunk.load_state_dict(loaded[f"model{index}"])
    if with_optimizer:
        optimizer.load_state_dict(loaded["optimizer"])
    elif optimizer is not None:
        optimizer.reload_model_params()  # the fp32 main weights follow the loaded ones
    if with_rng:
        _set_rng_state(loaded["rng_state"])
    if weights_only or "training_state" not in common:  # a converted checkpoint has weights alone
        return TrainingState()
    if scheduler is not None and not settings.no_load_optim:
        try:
            scheduler.load_state_dict(common["opt_param_scheduler"])
        except AssertionError as error:
            raise ValueError(
                f"the learning-rate schedule of {folder} is not that of the flags ({error}). Keep it with "
                "--use-checkpoint-opt-param-scheduler, or take that of the flags with --override-opt-param-scheduler."
            ) from error
    return TrainingState.from_state_dict(common["training_state"])


def _has_same_model_layout(a: ParallelConfig, b: ParallelConfig) -> bool:
    sizes = lambda p: (p.tensor_model_parallel_size, p.num_stages)
    return sizes(a) == sizes(b)


def _warnon_rank_zero(message: str) -> None:
    if torch.distributed.get_rank() == 0:
        log.warning(message)


def load_model_for_inference(
    load: str, load_iteration: int | None = None, tensor_parallel_size: int = 1
) -> tuple[RunConfig, Model, Tokenizer]:
    """The model of a checkpoint without optimizer, in evaluation mode, on one pipeline stage: re-sharded on load.

    Starts the process groups if need be. Raises FileNotFoundError if there is no checkpoint."""
    from megatron.early_exit.platform.distributed import initialize_distributed, initialize_model_parallel

    folder = find_checkpoint(load, load_iteration)
    if folder is None:
        raise FileNotFoundError(f"--load {load} holds no checkpoint ({LATEST_FILE} is missing).")
    saved = load_run_config(folder / RUN_CONFIG_FILE)
    config = replace(
        saved,
        parallel=ParallelConfig(tensor_model_parallel_size=tensor_parallel_size),
        training=replace(saved.training, tune_exit=False),  # all layers
    )
    initialize_distributed()
    initialize_model_parallel(config.parallel, config.model.num_layers, config.training.seed)
    model = build_model(config, config.model.padded_vocab_size, wrap_with_ddp=False)
    load_checkpoint(folder, config, model)
    for chunk in model.wrapped:
        chunk.eval()
    return config, model, load_tokenizer(folder / TOKENIZER_FOLDER)
