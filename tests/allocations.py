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
        self.peak = 0
        for tensor in before:
            self._note(tensor)

    def _note(self, value: Any) -> bool:
        """Whether the tensor has a storage that was not there before."""
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            return False
        storage = value.untyped_storage()
        known = self.found.get(storage._cdata)
        if known is not None and not known[0].expired():
            return False
        self.found[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return True

    @property
    def now(self) -> int:
        """Bytes that live at this moment."""
        self.found = {key: pair for key, pair in self.found.items() if not pair[0].expired()}
        return sum(size for _, size in self.found.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any([self._note(value) for value in tree_leaves(result)]):
            self.peak = max(self.peak, self.now)
        return result
