"""Watching what an op of ours does inside: to torch's dispatch modes it is one opaque call."""

from __future__ import annotations

from torch._library.custom_ops import _maybe_get_opdef
from torch.utils._python_dispatch import TorchDispatchMode


class Inside(TorchDispatchMode):
    """Calls `seen(func, args, out)` for every operation of torch, those within our ops included."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        definition = _maybe_get_opdef(func)
        if definition is not None and func.namespace == "fastpref":
            with self:
                return definition._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.seen(func, args, out)
        return out

    def seen(self, func, args, out):
        raise NotImplementedError
