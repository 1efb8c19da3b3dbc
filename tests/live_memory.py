"""Bytes of tensors that are alive, counted operator by operator."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """``peak``: the most bytes held at once by tensors that were made inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), known)
        return result

    def _add(self, storage, known):
        key = storage._cdata
        if key in self._seen or key in known:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key, size):
        self._seen.discard(key)
        self._live -= size
