"""The device side of the engine: it runs ticks, and knows nothing about requests.

Its contract: slots are a flat range `[0, num_slots)`. A tick takes one packed packet, and returns
one result, that of the packet that entered P - 1 ticks earlier. The host keeps the sampling
parameters of a packet, and passes them in the tick in which the packet leaves.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import LlamaConfig
from llama_jax.engine.programs import GREEDY, Arrays, Choice, Programs, TickResult
from llama_jax.engine.tick_times import TickTimes
from llama_jax.ring.packet import encode_packet
from llama_jax.ring.scoring import TileScores
from llama_jax.ring.sizes import Bucket, RingSizes
from llama_jax.ring.steps import init_state
from llama_jax.ring.tick import State
from llama_jax.weights.placement import Params
from sharding.memory import allocate

TIMED_RUNS = 8  # of each program; more than a model counts for


class Executor:
    """Owns the arrays on the devices of one mesh: weights, state and history.

    Args:
      programs: what it runs.
      params: the weights on the mesh.
      fill: the initial value of the cache; tests use NaN.

    Attributes:
      programs: what it runs.
      call_seconds: host time spent in calls of the compiled programs.
    """

    def __init__(self, programs: Programs, params: Params, fill: float = 0.0):
        self.programs = programs
        self.call_seconds = 0.0
        # Several unfinished programs with collectives starve XLA:CPU's threads and hang it. If JAX
        # was initialized before `configure_jax`, a call may return before its program has ended.
        self._one_at_a_time = self.mesh.devices.flat[0].platform == "cpu"
        shapes = programs.shapes()
        state = init_state(shapes.state, self.sizes, fill)
        self._arrays = Arrays(params, state, allocate(shapes.history))

    @property
    def config(self) -> LlamaConfig:
        """The model."""
        return self.programs.config

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.programs.mesh

    @property
    def sizes(self) -> RingSizes:
        """The sizes of the ring."""
        return self.programs.sizes

    @property
    def params(self) -> Params:
        """The weights on the devices."""
        return self._arrays.params

    @property
    def state(self) -> State:
        """The state on the devices."""
        return self._arrays.state

    def reset(self, fill: float = 0.0) -> None:
        """Empties the ring, and fills the cache with a value."""
        state = init_state(self.programs.shapes().state, self.sizes, fill)
        self._arrays = self._arrays._replace(state=state)

    def run(self, bucket: Bucket, packed: np.ndarray, choice: Choice = GREEDY) -> TickResult:
        """Dispatches one tick.

        Args:
          bucket: a bucket large enough for every packet in flight, including this one.
          packed: the packet that enters, from `encode_packet`.
          choice: how the tokens of the packet that leaves are chosen, for the segments of this
            bucket.
        """
        start = time.perf_counter()
        self._arrays, result = self.programs.tick(self._call, self._arrays, bucket, packed, choice)
        _send_to_host((result.tokens, result.logprobs))
        self.call_seconds += time.perf_counter() - start
        return result

    def score(self, tile: int, targets: list[int]) -> TileScores:
        """Dispatches the log-probabilities of prompt tokens.

        Call it between the tick in which their packet leaves and the next.

        Args:
          tile: the index of a tile in the packet that left in the latest tick.
          targets: the token that follows each of its tokens; there may be fewer.
        """
        start = time.perf_counter()
        scores = self.programs.score(self._call, self._arrays, tile, targets)
        _send_to_host(scores)
        self.call_seconds += time.perf_counter() - start
        return scores

    def set_history(self, slot: int, prompt: list[int], answer: list[int]) -> None:
        """Sets the tokens before those that a slot will choose, for its penalties.

        Call it between the last tick of the slot's previous owner and the first tick that chooses a
        token for the new one.
        """
        history = self.programs.set_history(self._call, self._arrays.history, slot, prompt, answer)
        self._arrays = self._arrays._replace(history=history)

    def run_empty(self, buckets: Iterable[Bucket]) -> None:
        """Runs programs on empty packets, which changes nothing; call it while the ring is empty.

        The first run of a program sets up more than a later one, above all on GPUs.
        """
        for bucket in buckets:
            for choice in self.programs.plain_choices(bucket):
                self._run_empty(bucket, choice)

    def time_empty(self, times: TickTimes) -> None:
        """Times the largest programs on empty packets, as `run_empty`, which comes before."""
        for bucket in self.sizes.largest():
            for _ in range(TIMED_RUNS):
                start = time.perf_counter()
                self._run_empty(bucket, GREEDY)
                times.observe(bucket, 0, 0, time.perf_counter() - start)

    def _run_empty(self, bucket: Bucket, choice: Choice) -> None:
        tables = np.zeros((self.sizes.num_slots, self.sizes.pages_per_sequence), np.int32)
        packed = encode_packet(self.sizes, bucket, tables, [], [], [])
        jax.block_until_ready(self.run(bucket, packed, choice).tokens)

    def _call(self, program: Callable[..., Any], *args: Any) -> Any:
        """Runs a program; waits for it where only one may be unfinished at a time."""
        results = program(*args)
        if self._one_at_a_time:
            jax.block_until_ready(jax.tree.leaves(results)[-1])  # all are ready together
        return results


def _send_to_host(arrays: Any) -> None:
    """Begins to copy arrays to the host."""
    for array in jax.tree.leaves(arrays):
        array.copy_to_host_async()
