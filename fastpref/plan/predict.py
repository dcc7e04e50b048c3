"""The prediction for one config on one device: what `fastpref plan` shows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fastpref.config import Config, ConfigError
from fastpref.model.batch_layout import wanted_layout
from fastpref.plan import flops as speed
from fastpref.plan.activation_trace import Trace, trace
from fastpref.plan.devices import Device
from fastpref.plan.memory import Memory, Parts
from fastpref.plan.model_shapes import Shapes, empty_policy, shapes_of
from fastpref.plan.workload import Sizes, Step, steps_of

Traced = tuple[Shapes, Trace]


@dataclass(frozen=True)
class Prediction:
    """Of a rank in the first epoch; memory of its fullest micro-batch, the rest means of steps."""

    device: Device
    ranks: int
    moment: str  # of the peak
    parts: Parts
    host_bytes: int  # of checkpoints and of what is offloaded, in the machine's memory
    steps: int
    tokens: float  # of a step, over all ranks
    micro_batches: float  # of a rank's step
    flops: speed.Flops
    seconds: float  # of a step
    reference_seconds: float  # of a cached reference, once

    @property
    def fits(self) -> bool:
        return self.parts.total <= self.device.usable

    @property
    def cost(self) -> float:
        """Seconds of a step times devices."""
        return self.seconds * self.ranks

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "total_bytes": self.parts.total, "fits": self.fits}


class Predictor:
    """Predictions on one device; what is traced once serves all configs that trace alike."""

    def __init__(self, device: Device, vocabulary: int | None) -> None:
        self.device, self._vocabulary = device, vocabulary
        self._traced: dict[str, Traced] = {}

    def __call__(self, config: Config, sizes: Sizes, ranks: int) -> Prediction:
        """Raises UserError where a config cannot run at all."""
        shard = shard_size(config, ranks)
        one_by_one = self.device.is_cpu and shard == 1
        steps = steps_of(config, sizes, ranks, one_by_one)
        shapes, traced = self._trace(config, sizes, steps, shard > 1, one_by_one)
        memory = Memory(config, shapes, traced, shard, self.device.is_cpu)
        moment, parts = max(
            (memory.peak(batch, len(step) > 1) for step in steps for batch in step),
            key=lambda found: found[1].total,
        )
        flops = [speed.flops(memory, step) for step in steps]
        mean = speed.Flops(
            *(
                sum(getattr(f, n) for f in flops) / len(steps)
                for n in ("trunk", "attention", "head")
            )
        )
        once = 0.0
        if config.reference_mode == "cached":
            once = sum(speed.reference_flops(memory, step) for step in steps)
        host = 0 if self.device.is_cpu else memory.host_copy
        if memory.offloads:
            host += 2 * memory.trained_bytes + memory.optimizer_bytes
        tokens = sum(p.tokens for step in steps for batch in step for p in batch)
        return Prediction(
            self.device,
            ranks,
            moment,
            parts,
            host,
            len(steps),
            tokens * ranks / len(steps),
            sum(map(len, steps)) / len(steps),
            mean,
            speed.seconds(self.device, mean.total) + speed.update_seconds(self.device, memory),
            speed.seconds(self.device, once),
        )

    def _trace(
        self, config: Config, sizes: Sizes, steps: list[Step], sharded: bool, one_by_one: bool
    ) -> Traced:
        key = repr(
            (
                config.model,
                config.adapter,
                config.training.activation_checkpointing,
                wanted_layout(config),
                sharded,
            )
        )
        if key not in self._traced:
            policy = empty_policy(config, self._vocabulary, sharded)
            shapes = shapes_of(policy, config)
            longest = max(p.tokens for step in steps for batch in step for p in batch)
            group = sizes.group(int(sizes.padded_lengths.argmax()))
            half = [max(1, round(n * longest / sum(group) / 2)) for n in group]
            traced = trace(policy, half, wanted_layout(config), one_kernel=not one_by_one)
            self._traced[key] = shapes, traced
        return self._traced[key]


def shard_size(config: Config, ranks: int) -> int:
    """Ranks that share one copy of the base, as `fastpref.model.fsdp.make_mesh` cuts them.

    Raises ConfigError where the mesh does not make that many ranks.
    """
    replicate, shard = config.parallel.sizes(ranks)
    if replicate * shard != ranks:
        raise ConfigError(
            f"parallel: replicate {replicate} · shard {shard} needs {replicate * shard} ranks; "
            f"plan with --ranks {replicate * shard}"
        )
    return 1 if config.adapter is not None and config.adapter.quantize else shard
