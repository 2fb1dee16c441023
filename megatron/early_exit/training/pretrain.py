"""Pre-training from settings to the last checkpoint: build the parts, then loop over iterations."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.timers import Timers

from megatron.early_exit.checkpoint.start import find_start
from megatron.early_exit.config.checkpoint_files import TOKENIZER_FOLDER
from megatron.early_exit.config.run import ResolvedConfig, RunConfig
from megatron.early_exit.config.saved_description import read_description
from megatron.early_exit.config.settings import normalised
from megatron.early_exit.config.validate import check_outputs, validate
from megatron.early_exit.data.batches import Batch, build_iterator
from megatron.early_exit.data.core_datasets import TokenDataset
from megatron.early_exit.data.datasets import build_datasets
from megatron.early_exit.data.tokenizer import build_tokenizer, check_ids_fit
from megatron.early_exit.data.tokenizer_comparison import check_tokenizer_of_checkpoint
from megatron.early_exit.model.build import Model, build_model
from megatron.early_exit.model.exit_losses import ExitLosses
from megatron.early_exit.model.exit_strategies import Evaluation
from megatron.early_exit.model.sizes import cached_samples
from megatron.early_exit.platform.device import device
from megatron.early_exit.platform.distributed import (
    destroy_distributed,
    initialize_distributed,
    initialize_model_parallel,
    on_rank_zero,
)
from megatron.early_exit.platform.world import world_size
from megatron.early_exit.training.core_config import connect_core_config
from megatron.early_exit.training.divergence import check_gradients, check_loss_scale, check_losses
from megatron.early_exit.training.hidden_state_caching import HiddenStateCaching
from megatron.early_exit.training.loading import load_checkpoint
from megatron.early_exit.training.memory import check_memory
from megatron.early_exit.training.metrics import collect_losses
from megatron.early_exit.training.microbatches import Microbatches
from megatron.early_exit.training.optimizer import build_optimizer, build_scheduler
from megatron.early_exit.training.planned_pipeline import PlannedPipeline
from megatron.early_exit.training.plans import check_plan, follows_plan, most_fill
from megatron.early_exit.training.reporting import Reporter, evaluation_line, training_line
from megatron.early_exit.training.saving import CheckpointSaver, SaveFolder
from megatron.early_exit.training.state import TrainingState
from megatron.early_exit.training.step import StepResult, run_schedule, train_step
from megatron.early_exit.training.stopping import StopConditions
from megatron.early_exit.training.summary import checkpoint_bytes, flops_per_token, start_up_summary

log = logging.getLogger(__name__)

_TIMERS = ("forward-backward", "forward-compute", "backward-compute", "all-grads-sync", "optimizer-inner-step")


@dataclass
class Run:
    """The parts of one training run on this rank."""

    config: ResolvedConfig
    model: Model
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    microbatches: Microbatches
    training_data: TokenDataset
    validation_data: TokenDataset | None
    test_data: TokenDataset | None
    state: TrainingState
    saver: CheckpointSaver | None
    reporter: Reporter
    timers: Timers | None
    caching: HiddenStateCaching | None
    """With --cache-hidden-states."""
    planned: PlannedPipeline | None
    """With plans of the pipeline in place of core's schedules."""
    stop: StopConditions
    save_folder: SaveFolder | None
    saved_iteration: int | None = None
    """The last one that this run has saved."""

    def close(self) -> None:
        """Write what is reported and let other runs save into the folder."""
        self.reporter.close()
        if self.save_folder is not None:
            self.save_folder.release()


def pretrain(config: RunConfig, *, is_checked: bool = False) -> None:
    """Train as `config` says. Every rank of the world calls it; process groups are started here. is_checked: by the
    program, which does it before it imports what is slow to import.

    Raises ValueError (ConfigError with all that is wrong with the settings), OSError or FileNotFoundError for what the
    user can mend, on all ranks and before training."""
    if not is_checked:
        config = checked(config, world_size())
    initialize_distributed(config.parallel.distributed_timeout_minutes)
    on_rank_zero(partial(check_outputs, config))
    run = build_run(config)
    try:
        if train(run):
            evaluate(run, "test", run.test_data)
    finally:
        run.close()
    destroy_distributed()


def checked(config: RunConfig, world_size: int) -> RunConfig:
    """`config` with what it leaves open filled in. Raises ConfigError or ValueError if it cannot work on `world_size`
    ranks, or lacks files that it reads."""
    config = normalised(config, log.warning)
    validate(config, world_size)
    if config.pipeline.is_planned:
        check_plan(config, world_size)
    return config


def build_run(config: RunConfig) -> Run:
    """The parts of a run whose settings are `checked`, where the process group is started.

    Data first, since it fails fastest; then the model, the optimizer, and what a checkpoint brings."""
    initialize_model_parallel(config.parallel, config.model.num_layers, config.training.seed)
    is_main = torch.distributed.get_rank() == 0
    save_folder = None if config.checkpoint.save is None else SaveFolder(config.checkpoint.save)
    config, checkpoint_folder = find_start(config)
    tokenizer = build_tokenizer(config.data.tokenizer)
    if checkpoint_folder is not None and not (config.checkpoint.override_tokenizer or config.data.mock_data):
        check_tokenizer_of_checkpoint(tokenizer, checkpoint_folder / TOKENIZER_FOLDER)
    saved = None if checkpoint_folder is None else read_description(checkpoint_folder)
    config = config.resolved(tokenizer.vocab_size, saved)
    vocab_size = config.description.padded_vocab_size
    check_ids_fit(tokenizer.vocab_size, vocab_size)
    microbatches = Microbatches(config.training, parallel_state.get_data_parallel_world_size())
    num_samples = _num_samples(config, microbatches.target_global_batch_size)
    check_memory(config, torch.distributed.get_world_size(), num_samples)
    training_data, validation_data, test_data = build_datasets(
        config.data,
        tokenizer,
        seq_length=config.training.seq_length,
        seed=config.training.seed,
        num_samples=num_samples,
        vocab_size=vocab_size,
    )
    assert training_data is not None, "samples are asked of training, and a --split without any for it is refused"
    model = build_model(config, vocab_size)
    optimizer = build_optimizer(config, model)
    timers = Timers(log_level=2, log_option="max") if config.logging.log_timers_to_tracker else None
    connect_core_config(model, optimizer, timers)
    scheduler = build_scheduler(config, optimizer, microbatches.target_global_batch_size)
    if save_folder is not None:
        save_folder.check_room(checkpoint_bytes(config, model))
    reporter = Reporter(config, is_main)
    saver = None
    if save_folder is not None:
        base = checkpoint_folder if config.training.tune_exit else None
        saver = CheckpointSaver(config, base, reporter.text)
        for done in save_folder.cleared:
            reporter.text(f" {save_folder.path}: {done}")
    reporter.text(start_up_summary(config, model, microbatches))
    state = TrainingState()
    if checkpoint_folder is not None:
        state = load_checkpoint(checkpoint_folder, config, model, optimizer, scheduler)
        if state.iteration:
            reporter.text(f" loaded {checkpoint_folder}, training goes on at iteration {state.iteration}")
        else:
            reporter.text(f" loaded the weights of {checkpoint_folder}")
    caching = None
    if (cache_folder := config.training.cache_hidden_states) is not None:
        num_drawn = _num_training_samples(config, microbatches.target_global_batch_size)
        caching = HiddenStateCaching(Path(cache_folder), config, model, training_data, num_drawn)
    planned = PlannedPipeline(config, model, reporter.text) if follows_plan(config) and caching is None else None
    return Run(
        config, model, optimizer, scheduler, microbatches, training_data, validation_data, test_data, state, saver,
        reporter, timers, caching, planned, StopConditions(config.training), save_folder,
    )  # fmt: skip


def _num_samples(config: RunConfig, global_batch_size: int) -> tuple[int, int, int]:
    """Different samples that training, one validation and the test need. Every validation uses the same samples, so
    that its losses can be compared."""
    train = cached_samples(config, _num_training_samples(config, global_batch_size))
    evaluation = config.training.eval_iters * global_batch_size
    return train, evaluation, evaluation


def _num_training_samples(config: RunConfig, global_batch_size: int) -> int:
    training = config.training
    unit = training.micro_batch_size * parallel_state.get_data_parallel_world_size()
    in_iteration = global_batch_size + unit * most_fill(config, global_batch_size // unit)
    # The last batch of --train-samples may go beyond it; and microbatches are whole.
    samples = (training.train_samples or 0) + in_iteration * (training.train_iters or 1)
    return -(-samples // unit) * unit


def train(run: Run) -> bool:
    """Iterate until the end, or until a stop condition; save on the way and at the end. Returns whether it ran to the
    end.

    Raises FloatingPointError when losses or gradients are no numbers any more, before such weights are saved."""
    config, state, stop = run.config, run.state, run.stop
    if run.caching is None:
        iterators = _iterators(run, run.training_data, state.consumed_train_samples)
    elif run.caching.fill(run.reporter.text, stop.interruption):
        iterators = [run.caching.iterator(state.consumed_train_samples)]
    else:
        return False
    window = LogWindow(run.model.exit_losses)
    if _is_finished(run):
        run.reporter.text(
            " nothing is left to train: --train-iters or --train-samples is reached. To go on, give more, with "
            "--override-opt-param-scheduler"
        )

    stop_reason = None
    while not (stop_reason or _is_finished(run)):
        result = _one_iteration(run, iterators)
        window.num_iterations += 1

        # Once in a while: log, save, evaluate, stop. What is due to be saved is saved before a long evaluation.
        if _is_due(config.logging.log_interval, state.iteration) or _is_finished(run):
            _log(run, result, window)
        stop_reason = stop.interruption()
        with window.paused():
            if run.saver is not None:
                run.saver.finalize()
            if stop_reason or _is_finished(run) or _is_due(config.checkpoint.save_interval, state.iteration):
                _save(run)
            if not stop_reason and _is_due(config.training.eval_interval, state.iteration):
                stop_reason = evaluate(run, "validation", run.validation_data)
            if not _is_finished(run):
                stop_reason = stop_reason or stop.due(state.iteration)
            if stop_reason:
                _save(run)
    if stop_reason:
        run.reporter.text(f" stopped after iteration {state.iteration}: {stop_reason}")
    if run.saver is not None:
        run.saver.finalize(wait=True)
    return _is_finished(run) and not stop_reason


class LogWindow:
    """The iterations since the last log line: their time without evaluation and saving, and their losses."""

    def __init__(self, exit_losses: ExitLosses) -> None:
        self._exit_losses = exit_losses
        self.restart()

    def restart(self) -> None:
        self._exit_losses.reset_statistics()
        self._start = time.perf_counter()
        self.num_iterations = 0

    @property
    def seconds_per_iteration(self) -> float:
        return (time.perf_counter() - self._start) / self.num_iterations

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside counts neither as time nor as losses of the window."""
        paused_at, statistics = time.perf_counter(), self._exit_losses.statistics.clone()
        yield
        self._exit_losses.statistics.copy_(statistics)
        self._start += time.perf_counter() - paused_at


def _is_due(interval: int | None, iteration: int) -> bool:
    return interval is not None and iteration % interval == 0


def _is_finished(run: Run) -> bool:
    training, state = run.config.training, run.state
    if training.train_samples is not None:
        return state.consumed_train_samples >= training.train_samples
    return state.iteration >= training.given_iterations


def _one_iteration(run: Run, iterators: list[Iterator[Batch] | None]) -> StepResult:
    config, state, microbatches = run.config, run.state, run.microbatches
    microbatches.update(state.consumed_train_samples)
    num_samples = microbatches.global_batch_size
    if run.planned is not None:
        unit = config.training.micro_batch_size * parallel_state.get_data_parallel_world_size()
        num_samples += unit * run.planned.plan(microbatches.count).num_fill
    loss_scale = run.optimizer.get_loss_scale().item() if config.training.fp16 else 1.0
    result = train_step(
        run.model,
        run.optimizer,
        iterators,
        exit_weights=config.exits.weights_at(state.iteration),
        num_microbatches=microbatches.count,
        micro_batch_size=config.training.micro_batch_size,
        seq_length=config.training.seq_length,
        iteration=state.iteration,
        has_hidden_states=run.caching is not None,
        planned=run.planned,
    )
    if not config.training.fp16:
        check_gradients(result.grad_norm, state.iteration + 1)
    elif result.is_skipped and config.training.loss_scale is None:
        check_loss_scale(loss_scale, config.training.min_loss_scale, state.iteration + 1)
    if result.is_skipped:
        state.num_skipped_iterations += 1
    else:
        run.scheduler.step(increment=microbatches.global_batch_size)
    state.iteration += 1
    state.consumed_train_samples += num_samples
    return result


def _iterators(
    run: Run, dataset: TokenDataset, consumed_samples: int, is_cyclic: bool = False
) -> list[Iterator[Batch] | None]:
    """One iterator per chunk; every chunk that embeds, computes a loss or needs a mask draws the same batches."""
    return [
        build_iterator(
            dataset,
            consumed_samples=consumed_samples,
            micro_batch_size=run.config.training.micro_batch_size,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            num_workers=run.config.data.num_workers,
            device=device(),
            is_cyclic=is_cyclic,
        )
        if chunk.pre_process or chunk.post_process or chunk.exit_heads() or run.config.data.reset_attention_mask
        else None
        for chunk in run.model.chunks
    ]


def evaluate(run: Run, name: str, dataset: TokenDataset | None) -> str | None:
    """Losses and accuracies of all exits over `--eval-iters` global batches, always the same ones; nothing without
    data. Returns why it was interrupted (then nothing is reported), or None."""
    config, model = run.config, run.model
    if dataset is None or not config.training.eval_iters:
        return None
    run.microbatches.update(run.state.consumed_train_samples)
    model.eval()
    interruption = _run_evaluation(run, dataset)
    model.train()
    if interruption:
        run.reporter.text(f" {name} at iteration {run.state.iteration} is left out: {interruption}")
        return interruption
    losses = collect_losses(model.exit_losses, config.exits)
    run.reporter.record("valid" if name == "validation" else name, run.state.iteration, losses.as_dict())
    run.reporter.text(evaluation_line(name, run.state.iteration, losses.as_dict()))
    return None


def _run_evaluation(run: Run, dataset: TokenDataset) -> str | None:
    """The passes of an evaluation; losses are then in `exit_losses`. Returns why it was interrupted, or None."""
    config, model = run.config, run.model
    per_replica = run.microbatches.target_global_batch_size // parallel_state.get_data_parallel_world_size()
    num_microbatches = per_replica // config.training.micro_batch_size
    iterators = _iterators(run, dataset, consumed_samples=0, is_cyclic=True)
    model.exit_losses.reset_statistics()
    with torch.no_grad():
        for index in range(config.training.eval_iters):
            if index and (interruption := run.stop.interruption()):
                return interruption
            model.exit_losses.begin_iteration(num_microbatches)
            run_schedule(
                model,
                iterators,
                Evaluation(model.exit_losses),
                num_microbatches=num_microbatches,
                micro_batch_size=config.training.micro_batch_size,
                seq_length=config.training.seq_length,
            )
    return None


def _log(run: Run, result: StepResult, window: LogWindow) -> None:
    """One line per log interval."""
    config, state, exit_losses = run.config, run.state, run.model.exit_losses
    losses = collect_losses(exit_losses, config.exits, follows_final_head=exit_losses.distils)
    check_losses(losses, state.iteration)
    seconds_per_iteration = window.seconds_per_iteration
    values: dict[str, float | int | None] = {
        "consumed_samples": state.consumed_train_samples,
        "consumed_tokens": state.consumed_train_samples * config.training.seq_length,
        "iteration_ms": seconds_per_iteration * 1000,
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "global_batch_size": run.microbatches.global_batch_size,
        **losses.as_dict(),
    }
    weights = config.exits.weights_at(state.iteration - 1)  # those of the iteration that just ended
    for layer, weight in zip(config.exits.exit_layer_nums, weights, strict=True):
        values[f"exit_weight/layer_{layer}"] = weight
    values["grad_norm"] = result.grad_norm
    values["loss_scale"] = run.optimizer.get_loss_scale().item() if config.training.fp16 else None
    values["skipped_iterations"] = state.num_skipped_iterations
    tokens = run.microbatches.global_batch_size * config.training.seq_length
    values["tokens_per_second"] = tokens / seconds_per_iteration
    if config.logging.log_throughput:
        flops = flops_per_token(config, config.description.padded_vocab_size) * tokens
        values["tflops_per_rank"] = flops / seconds_per_iteration / torch.distributed.get_world_size() / 1e12
    if run.timers is not None:
        values |= _timer_values(run.timers)
    run.reporter.record("train", state.iteration, values)
    run.reporter.text(training_line(state.iteration, config.training.train_iters, values))
    window.restart()


def _timer_values(timers: Timers) -> dict[str, float]:
    """Milliseconds since the last log line that the slowest rank spent in the parts that core times."""
    # `Timers.write` takes TensorBoard's and W&B's own objects only.
    times = timers._get_global_min_max_time(list(_TIMERS), True, False, 1.0)
    return {f"timers/{name}_ms": 1000 * slowest for name, (_, slowest) in times.items()}


def _save(run: Run) -> None:
    """Save this iteration, unless it is saved already. To be called where the window of losses is paused."""
    if run.saver is None or run.saved_iteration == run.state.iteration:
        return
    check_losses(collect_losses(run.model.exit_losses, run.config.exits), run.state.iteration)
    run.saver.save(run.model, run.optimizer, run.scheduler, run.state)
    run.saved_iteration = run.state.iteration
