"""The text-generation server as a Ray Serve deployment: each replica is one engine (TP x PP ranks) with all its APIs.

    pip install "ray[serve]"
    serve run examples/ee_inference/ray_serve/serve.yaml         # from the root of the repository

Ray starts and ends replicas, spreads requests over them, and replaces one whose engine has ended. How many ranks, and
so GPUs, a replica has is said once, in the arguments of the YAML file.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve

from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.server.app import build_app
from megatron.early_exit.server.async_engine import AsyncEngine
from megatron.early_exit.server.config import EngineConfig, RequestLimits, ServerConfig
from megatron.early_exit.server.context import ServerContext


class _AppOfReplica:
    """Hands requests to the application of the replica that it runs in: each has an engine of its own."""

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for event in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{event}.complete"})
            return
        await serve.get_replica_context().servable_object.api(scope, receive, send)


@serve.deployment
@serve.ingress(_AppOfReplica())
class TextGeneration:
    """One engine and its APIs."""

    async def __init__(self, load: str, engine: dict[str, Any], defaults: dict[str, Any], max_waiting: int) -> None:
        """load: folder of checkpoints. engine: arguments of `LLM.load`. defaults: settings of early exit for requests
        that have none. max_waiting: answers that may wait for a slot."""
        config = ServerConfig(
            EngineConfig(load, engine), defaults=GenerationParams(**defaults), limits=RequestLimits(max_waiting)
        )
        self._engine = AsyncEngine(config.engine, max_waiting)
        self.api = build_app(ServerContext(config, self._engine))
        await self._engine.start()
        self._running = asyncio.create_task(self._engine.run())

    def check_health(self) -> None:
        """Raise when the engine has ended, or was silent for too long: Ray starts a new replica then."""
        if self._running.done():
            raise RuntimeError(f"the engine has ended: {self._engine.failure}")

    async def __del__(self) -> None:
        """End the engine's processes."""
        await self._engine.close()


def build(args: dict[str, Any]) -> serve.Application:
    """The application. args: as in serve.yaml."""
    engine = dict(args.get("engine", {}))
    slots, max_waiting = engine.setdefault("max_requests", 16), int(args.get("max_waiting", 64))
    ranks = engine.get("tensor_parallel_size", 1) * engine.get("pipeline_parallel_size", 1)
    gpus = ranks if args.get("gpus", True) else 0
    autoscaling = {"target_ongoing_requests": 0.7 * slots, **args.get("replicas", {"min_replicas": 1})}
    return TextGeneration.options(
        # Ray need not know more than fit: a request beyond them gets 429 with Retry-After.
        max_ongoing_requests=slots + max_waiting + 1,
        autoscaling_config=autoscaling,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=40,
        # The engine starts its ranks as its own processes, so the GPUs of a replica are of one machine.
        placement_group_bundles=[{"CPU": args.get("cpus", 2), "GPU": gpus} if gpus else {"CPU": args.get("cpus", 2)}],
        placement_group_strategy="STRICT_PACK",
        ray_actor_options={"num_cpus": args.get("cpus", 2), "num_gpus": gpus},
    ).bind(args["load"], engine, args.get("defaults", {}), max_waiting)
