"""What torch really holds: the bytes of every storage that operations have made and nobody has freed yet."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is on, every result of an operation is followed; `before`: tensors that were there already."""

    def __init__(self, before: list[torch.Tensor]) -> None:
        super().__init__()
        self.found: dict[int, tuple[StorageWeakRef, int]] = {}
        self.noted = 0  # bytes of `found`, some of which may be gone
        self.peak = 0
        for tensor in before:
            self._note(tensor)

    def _note(self, value: Any) -> None:
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            return
        storage = value.untyped_storage()
        known = self.found.get(storage._cdata)
        if known is None or known[0].expired():
            self.noted += storage.nbytes() - (known[1] if known else 0)
            self.found[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    @property
    def now(self) -> int:
        """Bytes that live at this moment."""
        self.found = {key: pair for key, pair in self.found.items() if not pair[0].expired()}
        self.noted = sum(size for _, size in self.found.values())
        return self.noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            self._note(value)
        if self.noted > self.peak:
            self.peak = max(self.peak, self.now)
        return result
