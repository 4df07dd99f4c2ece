"""A stand-in for CUDA graphs on a CPU: records a step's operations with their tensors, and repeats exactly those.

What a real graph would freeze is frozen here too: numbers, shapes, addresses, Python's decisions. Reading a value back
to the host while recording is an error, as it is while a graph is captured.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::item")
# On a CPU only: the range of the rotary table and the check for logits that are not finite.
CPU_READS = 2


class Recorder(TorchDispatchMode):
    """Keeps (operation, arguments, results) of everything done inside."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.name() in READS:
            self.reads += 1
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if not func.is_view:
            self.done.append((func, args, kwargs, [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]))
        return out

    def replay(self) -> None:
        for func, args, kwargs, outputs in self.done:
            again = [x for x in tree_flatten(func(*args, **kwargs))[0] if isinstance(x, Tensor)]
            for old, new in zip(outputs, again, strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def recording(made: list[Recorder]) -> Callable[..., Callable[[], None]]:
    """What to put in place of `graphs.capture`: the step is recorded and its effect undone, as if it had not run."""

    def capture(step: Callable[[], None], device: torch.device, pool: object) -> Callable[[], None]:
        recorder = Recorder()
        state = step.args[0]
        saved = [x.clone() for x in state._all]
        with recorder:
            step()
        for x, old in zip(state._all, saved, strict=True):
            x.copy_(old)
        assert recorder.reads == CPU_READS, "a step read a value back to the host"
        made.append(recorder)
        return recorder.replay

    return capture
