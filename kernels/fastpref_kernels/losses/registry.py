"""The objectives that have a kernel: their functions by name, and the inputs that they need.

A hyperparameter has the name of the function's argument, which is that of the plain-PyTorch
objective's field. Objectives whose loss of a pair depends on other pairs, on groups, or on more
than summed log-probs have no kernel.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fastpref_kernels.losses import anchored, margin, normalized, pointwise

# Arguments of a function that are data; the others are hyperparameters, or derived from them in
# fp64 because a hyperparameter rounded to fp32 would lose the difference.
DATA = frozenset(["zw", "zl", "rw", "rl", "nw", "nl", "z", "t", "desirable", "point"])
DERIVED: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "alpha_less_1": lambda parameters: parameters["alpha"] - 1,
}


class Objective(NamedTuple):
    """A function on blocks of pairs or responses, and the inputs it needs besides log-probs.

    reference: whether it needs a reference, or the hyperparameter that needs one if it is > 0.
    choices: accepted values of each of its last arguments.
    """

    function: Any
    reference: bool | str = True
    point: bool = False
    choices: tuple[tuple[Any, ...], ...] = ()

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the function's arguments after the data: numbers first, then choices."""
        return tuple(name for name in self.function.arg_names if name not in DATA)

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        """The names of its hyperparameters."""
        return tuple(name for name in self.arguments if name not in DERIVED)

    def needs_reference(self, parameters: Mapping[str, Any]) -> bool:
        """Whether log-probs of a reference policy enter the loss."""
        if isinstance(self.reference, str):
            return bool(parameters[self.reference] > 0)
        return self.reference

    def split(self, parameters: Mapping[str, Any]) -> tuple[list[float], list[Any]]:
        """Numbers and choices, in the order of the function.

        Raises ValueError where a hyperparameter is missing, unknown or of the wrong type.
        """
        names = self.hyperparameters
        if set(parameters) != set(names):
            raise ValueError(
                f"parameters: expected {', '.join(names) or 'none'}, got "
                f"{', '.join(parameters) or 'none'}: pass every hyperparameter and no other"
            )
        count = len(self.arguments) - len(self.choices)
        numbers, picked = self.arguments[:count], self.arguments[count:]
        for name, options in zip(picked, self.choices, strict=True):
            if parameters[name] not in options:
                raise ValueError(
                    f"parameters: {name} must be one of {', '.join(map(repr, options))}, "
                    f"got {parameters[name]!r}"
                )
        for name in set(numbers) - set(DERIVED):
            number = parameters[name]
            if not isinstance(number, int | float) or not math.isfinite(number):
                raise ValueError(f"parameters: {name} must be a finite number, got {number!r}")
        values = [DERIVED[n](parameters) if n in DERIVED else parameters[n] for n in numbers]
        return [float(value) for value in values], [parameters[name] for name in picked]


PAIR_OBJECTIVES: dict[str, Objective] = {
    "dpo": Objective(margin.dpo),
    "cdpo": Objective(margin.cdpo),
    "robust": Objective(margin.robust),
    "ipo": Objective(margin.ipo),
    "hinge": Objective(margin.hinge),
    "exo_pair": Objective(margin.exo_pair),
    "discopop": Objective(margin.discopop),
    "r_dpo": Objective(margin.r_dpo),
    "pmo": Objective(margin.pmo, reference="beta"),
    "h_dpo": Objective(margin.h_dpo),
    "bpo": Objective(margin.bpo),
    "f_dpo": Objective(margin.f_dpo, choices=(("reverse_kl", "forward_kl", "js", "alpha"),)),
    "chi_po": Objective(margin.chi_po),
    "ipo_avg": Objective(normalized.ipo_avg),
    "dpo_norm": Objective(normalized.dpo_norm),
    "simpo": Objective(normalized.simpo, reference=False),
    "slic_hf": Objective(normalized.slic_hf, reference=False),
    "rrhf": Objective(normalized.rrhf, reference=False, choices=((True, False),)),
    "cpo": Objective(normalized.cpo, reference=False),
    "cpo_simpo": Objective(normalized.cpo_simpo, reference=False),
    "orpo": Objective(normalized.orpo, reference=False),
    "simper": Objective(normalized.simper, reference=False),
    "stapo": Objective(normalized.stapo, reference=False),
    "stapo_ref": Objective(normalized.stapo_ref),
    "sft": Objective(normalized.sft, reference=False, choices=(("chosen", "both"), (True, False))),
    "dpop": Objective(anchored.dpop),
    "cal_dpo": Objective(anchored.cal_dpo),
    "nca_pair": Objective(anchored.nca_pair),
    "bco_pair": Objective(anchored.bco_pair),
    "sppo_hard": Objective(anchored.sppo_hard),
    "apo_zero": Objective(anchored.apo_zero),
    "apo_down": Objective(anchored.apo_down),
    "ddro": Objective(anchored.ddro),
    "dil_bce": Objective(anchored.dil_bce),
    "dil_ukl": Objective(anchored.dil_ukl),
    "dil_lsif": Objective(anchored.dil_lsif),
    "pro_p": Objective(anchored.pro_p),
}
RESPONSE_OBJECTIVES: dict[str, Objective] = {
    "kto": Objective(pointwise.kto, point=True),
    "kto_simple": Objective(pointwise.kto_simple),
    "bco": Objective(pointwise.bco, point=True),
    "ddro_unpaired": Objective(pointwise.ddro_unpaired),
    "pro_b": Objective(pointwise.pro_b),
}


def find(table: Mapping[str, Objective], name: str) -> Objective:
    """The objective called `name`."""
    if name not in table:
        raise ValueError(f"name: there is no kernel for {name!r}, only for {', '.join(table)}")
    return table[name]
