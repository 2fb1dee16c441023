"""An engine over a checkpoint: its workers in this process, or in processes of their own, one a rank."""

from __future__ import annotations

import logging
import os
from dataclasses import fields, replace
from typing import Any, NamedTuple

from megatron.early_exit.config.checkpoint_files import iteration_of
from megatron.early_exit.data.tokenizer import Tokenizer, build_tokenizer
from megatron.early_exit.inference import checked
from megatron.early_exit.inference.certificates import Certificates, read_certificates
from megatron.early_exit.inference.engine.audit import ExitAudit
from megatron.early_exit.inference.engine.engine import Engine
from megatron.early_exit.inference.executor import distributed
from megatron.early_exit.inference.executor.base import Executor
from megatron.early_exit.inference.executor.local import LocalExecutor
from megatron.early_exit.inference.executor.messages import WorkerFactory
from megatron.early_exit.inference.executor.worker_ranks import DEFAULT_LIMITS, Limits
from megatron.early_exit.inference.exit_records import recorded_scores
from megatron.early_exit.inference.fingerprint import text_digest
from megatron.early_exit.inference.loading import InferenceCheckpoint, LoadConfig, default_fill_min_rows, load_worker
from megatron.early_exit.inference.params import EXIT_SCORES
from megatron.early_exit.inference.worker.worker import Worker
from megatron.early_exit.platform.world import check_num_ranks, check_world_size, world_size

log = logging.getLogger(__name__)


class LoadedEngine(NamedTuple):
    """An engine and what it was loaded from."""

    engine: Engine
    tokenizer: Tokenizer
    checkpoint: InferenceCheckpoint


def load_engine(
    path: str,
    *,
    max_waiting: int | None = None,
    prefill_chunk: int = 256,
    chat_template: str | None = None,
    audit_share: float = 0.0,
    join_torchrun: bool = False,
    worker_timeout: float = DEFAULT_LIMITS.hang,
    **settings: Any,
) -> LoadedEngine:
    """Load a training checkpoint of any layout and start its workers. Arguments and errors are those of `LLM.load`.

    chat_template: the one that chats are written with, if it is not the tokenizer's: certificates may depend on it.
    settings: fields of `LoadConfig`"""
    config = LoadConfig(path=str(path), **settings)
    audit = ExitAudit(audit_share)
    limits = Limits(hang=checked.number("worker_timeout", worker_timeout))
    joins_torchrun = join_torchrun and world_size() > 1
    if joins_torchrun:
        names = ("tensor_parallel_size", "pipeline_parallel_size")
        check_num_ranks({name: getattr(config, name) for name in names})
    else:
        check_world_size()
    checkpoint = InferenceCheckpoint(config, stage=0 if config.layout.num_ranks == 1 else None)
    tokenizer = build_tokenizer(checkpoint.description.tokenizer)
    template = chat_template or tokenizer.chat_template
    loaded = {score: checkpoint.exit_fingerprint(tokenizer, score) for score in EXIT_SCORES}
    recorded = {score: recorded_scores(checkpoint.folder, one) for score, one in loaded.items() if one.score == score}
    engine = Engine(
        _start_executor(checkpoint, tokenizer.vocab_size, limits, joins_torchrun),
        checkpoint.description.exits,
        ends=tokenizer.ends,
        max_waiting=max_waiting,
        prefill_chunk=prefill_chunk,
        exit_scores={score: scores for score, scores in recorded.items() if scores is not None},
        no_probes=checkpoint.no_probes,
        certificates=Certificates.of(
            read_certificates(checkpoint.folder), loaded, None if template is None else text_digest(template)
        ),
        audit=audit,
    )
    return LoadedEngine(engine, tokenizer, checkpoint)


def _start_executor(checkpoint: InferenceCheckpoint, num_ids: int, limits: Limits, joins_torchrun: bool) -> Executor:
    """The worker in this process, or workers in processes of their own."""
    if checkpoint.config.layout.num_ranks == 1:
        return LocalExecutor(Worker(checkpoint.load_decoder(num_ids)))
    # The last checkpoint may be another one when the ranks look for it.
    config = replace(checkpoint.config, iteration=iteration_of(checkpoint.folder))
    if config.pipeline_parallel_size > 1:
        log.info("pipeline stages: %s", checkpoint.stages_in_words)
        if config.fill_min_rows is None:
            here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if joins_torchrun else config.layout.num_ranks
            config = replace(config, fill_min_rows=default_fill_min_rows(here))
    settings = {one.name: getattr(config, one.name) for one in fields(config)}
    factory = WorkerFactory(f"{load_worker.__module__}:{load_worker.__name__}", {"num_ids": num_ids, **settings})
    start = distributed.join_torchrun if joins_torchrun else distributed.start_workers
    return start(factory, config.layout, limits)
