"""How many bytes of tensors are alive at a time: counted, not guessed from the process's memory."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages that operations make inside the `with` and that are still referred to by some tensor."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._users: dict[int, int] = {}  # of each storage, by its address

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                key = storage._cdata
                if key in self._users or key not in known:
                    self._add(t, key, storage.nbytes())
        return out

    def _add(self, t, key, size):
        if key not in self._users:
            self._users[key] = 0
            self.now += size
            self.peak = max(self.peak, self.now)
        self._users[key] += 1
        weakref.finalize(t, self._drop, key, size)

    def _drop(self, key, size):
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.now -= size
