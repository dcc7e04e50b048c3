"""TRL's trainers without logits.

    FusedDPOTrainer = fused(DPOTrainer)

`fused` puts the mixin of a trainer before it: `FusedDPOMixin`, `FusedKTOMixin`, `FusedCPOMixin` or
`FusedORPOMixin`. Nothing of TRL is patched.
"""

from __future__ import annotations

from typing import Any

from fastpref.fused.trl.cpo import FusedCPOMixin, FusedORPOMixin
from fastpref.fused.trl.dpo import FusedDPOMixin
from fastpref.fused.trl.kto import FusedKTOMixin
from fastpref.fused.trl.trainers import FusedHeadMixin

__all__ = ["FusedCPOMixin", "FusedDPOMixin", "FusedKTOMixin", "FusedORPOMixin", "fused"]

_MIXINS = {
    "DPOTrainer": FusedDPOMixin,
    "KTOTrainer": FusedKTOMixin,
    "CPOTrainer": FusedCPOMixin,
    "ORPOTrainer": FusedORPOMixin,
}


def fused(trainer: type[Any]) -> type[Any]:
    """Subclass of a trainer of TRL, or of a subclass of one, with the mixin that is for it.

    Raises ValueError for a class that none of the mixins is for.
    """
    if isinstance(trainer, type) and issubclass(trainer, FusedHeadMixin):
        return trainer
    for base in getattr(trainer, "__mro__", ()):
        mixin = _MIXINS.get(base.__name__)
        if mixin is not None and base.__module__.split(".")[0] == "trl":
            module = {"__module__": trainer.__module__, "__doc__": trainer.__doc__}
            return type(f"Fused{trainer.__name__}", (mixin, trainer), module)
    name = getattr(trainer, "__name__", repr(trainer))
    raise ValueError(f"trainer: expected {', '.join(_MIXINS)} of TRL or a subclass, got {name}")
