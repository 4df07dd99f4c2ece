"""Decode steps as CUDA graphs: one launch for some hundred kernels, captured once per shape and kept for a stage."""

from collections.abc import Callable, Hashable

import torch

from cai_fast.engine.cache import round_up

Step = Callable[[], None]

BURST = 8  # decode steps queued between two looks at the flags: at most that many twice over are wasted on a row
CONTEXT = 512  # positions of the smallest context bucket: one split of the paged attention


def batch_bucket(count: int, limit: int) -> int:
    """Rows of the graph that serves `count` rows: few shapes, and never much more than is needed."""
    size = 1 << (count - 1).bit_length() if count <= 16 else round_up(count, 16 if count <= 128 else 64)
    return min(size, limit)


def context_bucket(width: int, limit: int) -> int:
    """Cached positions that the graph for `width` positions reads at most; a row's own length ends its reading."""
    return min(CONTEXT << max(0, (-(-width // CONTEXT) - 1).bit_length()), limit)


def capture(step: Step, device: torch.device, pool: object) -> Step:
    """A step that does what `step` did, on the same addresses. A CPU has no graphs: there it is the step itself."""
    if device.type == "cpu":
        return step
    graph = torch.cuda.CUDAGraph()
    # Other threads (a collective's watchdog) may go on calling CUDA meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        step()
    return graph.replay


class Graphs:
    """Captured steps by shape, in one memory pool, until `version` changes (weights or buffers that moved)."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._version, self._pool = device, None, None
        self._warm: set[Hashable] = set()
        self._replays: dict[Hashable, Step] = {}

    def run(self, shape: Hashable, version: Hashable, step: Step) -> None:
        """Do `step`: the first time of a shape as it is, which compiles kernels and sets up libraries; the second time
        it is captured, which does nothing else yet; from then on it is replayed."""
        if version != self._version:
            self._warm, self._replays, self._version = set(), {}, version
            self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        if shape not in self._warm:
            self._warm.add(shape)
            step()
            return
        if shape not in self._replays:
            self._replays[shape] = capture(step, self.device, self._pool)
        self._replays[shape]()
