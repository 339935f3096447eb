"""The engine in this process: a transformers decoder on the CPU or one GPU, computing in blocks in place.

    Step -> embedded_batch (index tensors) -> model with embedded_attention (in place) -> embedded_sampling -> Token

Steps run on one thread of their own, so that the event loop goes on meanwhile. torch and transformers (the extra
`torch`) are imported when an engine is made, not when this module is.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Self, TypeVar, TypeVarTuple

from penstock.blocks import Region
from penstock.engine.api import EngineInfo, Scored, SequencesFailed, Step
from penstock.engine.embedded_options import Options
from penstock.errors import EngineFailed, MissingExtra
from penstock.request import Token

if TYPE_CHECKING:
    from penstock.engine.embedded_attention import Pool
    from penstock.engine.embedded_model import Checkpoint, LoadedModel

T = TypeVar("T")
Args = TypeVarTuple("Args")


class EmbeddedEngine:
    """Implements `api.ScoringEngine`."""

    def __init__(self, options: Options) -> None:
        """Reads the model's configuration. Raises SetupError of some kind."""
        self._threads = options.threads
        self._checkpoint = _read(options)
        self._pools: dict[tuple[str, int], Pool] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._model: LoadedModel | None = None
        self._kv_room_bytes = 0

    @property
    def info(self) -> EngineInfo:
        return replace(self._checkpoint.info, kv_room_bytes=self._kv_room_bytes)

    async def __aenter__(self) -> Self:
        from penstock.engine.embedded_model import load

        self._thread = ThreadPoolExecutor(1, "engine")
        try:
            self._model = await self._in_thread(load, self._checkpoint, self._threads)
            self._kv_room_bytes = await self._in_thread(self._model.kv_room_bytes)
        except BaseException:
            self._thread.shutdown(wait=False)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Waits for the step that runs, if one does, and frees the model."""
        await self._in_thread(self._free)
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def attach(self, region: Region) -> None:
        from penstock.engine.embedded_model import map_region

        if region.key not in self._pools:
            pool = self._pools[region.key] = map_region(region, self._checkpoint.geometry)
            if self._model is not None:
                self._model.prepare(pool)

    def detach(self, key: tuple[str, int]) -> None:
        self._pools.pop(key, None)

    async def step(self, step: Step) -> list[Token | None]:
        return await self._in_thread(self._work, step, lambda model, pool: model.compute(step.slices, pool))

    async def score(self, step: Step) -> list[Scored]:
        return await self._in_thread(self._work, step, lambda model, pool: model.score(step.slices, pool))

    def _work(self, step: Step, compute: Callable[[LoadedModel, Pool], T]) -> T:
        if self._model is None or step.region.key not in self._pools:
            raise EngineFailed(f"the engine is not attached to region {step.region.key}")
        try:
            return compute(self._model, self._pools[step.region.key])
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold views of the region, which may be unmapped
            if isinstance(error, SequencesFailed):
                raise
            what = f"{type(error).__name__}: {error}"
            raise EngineFailed(f"a step of {step.tokens} tokens raised {what}") from error

    def _free(self) -> None:
        self._model = None
        self._pools.clear()

    async def _in_thread(self, work: Callable[[*Args], T], *args: *Args) -> T:
        if self._thread is None:
            raise EngineFailed("the engine computes inside `async with` only")
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)


ENGINE = EmbeddedEngine


def _read(options: Options) -> Checkpoint:
    for package in ("torch", "transformers"):
        if find_spec(package) is None:
            raise MissingExtra(f"the embedded engine needs {package}: pip install 'penstock[torch]'")
    from penstock.engine.embedded_model import read

    return read(options)
