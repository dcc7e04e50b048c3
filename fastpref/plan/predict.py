"""The prediction for one config on one device, as `fastpref plan` shows it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fastpref.config import Config, ConfigError, Parallel
from fastpref.data.batch_plan import Layout
from fastpref.model.batch_layout import preferred_layout
from fastpref.ops.score_sketch import sketch_rows
from fastpref.plan import flops as speed
from fastpref.plan.activation_trace import Trace, trace
from fastpref.plan.devices import Device
from fastpref.plan.head import Head
from fastpref.plan.memory import Memory, Parts
from fastpref.plan.model_shapes import Shapes, empty_policy, shapes_of
from fastpref.plan.workload import GroupLengths, Step, steps_of


@dataclass(frozen=True)
class Setup:
    """A run to predict: its config, the lengths of its data, its ranks.

    changes: of the config that the user has, as they are typed on the command line.
    """

    config: Config
    lengths: GroupLengths
    ranks: int
    changes: tuple[str, ...] = ()

    @property
    def layout(self) -> Layout:
        return preferred_layout(self.config.training, self.config.model.attn_implementation)

    @property
    def in_4bit(self) -> bool:
        return self.config.adapter is not None and self.config.adapter.quantize is not None


@dataclass(frozen=True)
class Prediction:
    """Memory of a rank's fullest micro-batch, and means over the steps of the first epoch."""

    device: Device
    ranks: int
    moment: str  # of the peak
    parts: Parts
    host_bytes: int  # of checkpoints and of offloaded tensors, in host memory
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
        """The prediction for JSON."""
        return {**asdict(self), "total_bytes": self.parts.total, "fits": self.fits}


class Predictor:
    """Predictions on one device; configs with the same model and layout share one trace."""

    def __init__(self, device: Device, vocabulary: int | None) -> None:
        self.device, self._vocabulary = device, vocabulary
        self._traces: dict[str, tuple[Shapes, Trace]] = {}

    def __call__(self, setup: Setup) -> Prediction:
        """Raises UserError for a config that cannot run at all."""
        config, ranks = setup.config, setup.ranks
        shard = shard_size(config.parallel, setup.in_4bit, ranks)
        one_by_one = self.device.is_cpu and shard == 1
        steps = steps_of(config.training, setup.layout, setup.lengths, ranks, one_by_one)
        memory = self._memory(setup, steps, shard, one_by_one)
        moment, parts = max(
            (memory.peak(batch, len(step) > 1) for step in steps for batch in step),
            key=lambda peak: peak[1].total,
        )
        checkpointing = config.training.activation_checkpointing
        flops = _mean([speed.step_flops(memory, step, checkpointing) for step in steps])
        reference_flops = 0.0
        if config.reference_mode == "cached":
            reference_flops = sum(speed.reference_flops(memory, step) for step in steps)
        host = 0 if self.device.is_cpu else memory.host_copy
        if memory.offloads:
            host += 2 * memory.trained_bytes + memory.optimizer_bytes
        tokens = sum(p.tokens for step in steps for batch in step for p in batch)
        return Prediction(
            device=self.device,
            ranks=ranks,
            moment=moment,
            parts=parts,
            host_bytes=host,
            steps=len(steps),
            tokens=tokens * ranks / len(steps),
            micro_batches=sum(map(len, steps)) / len(steps),
            flops=flops,
            seconds=speed.seconds(self.device, flops.total)
            + speed.update_seconds(self.device, memory),
            reference_seconds=speed.seconds(self.device, reference_flops),
        )

    def _memory(self, setup: Setup, steps: list[Step], shard: int, one_by_one: bool) -> Memory:
        config = setup.config
        shapes, traced = self._trace(setup, steps, shard > 1, one_by_one)
        calibration, score_rows = config.calibration, 0
        if calibration is not None and calibration.statistics == "batch":
            score_rows = sketch_rows(shapes.vocabulary, calibration.sketch_rows)
        head = Head(
            shapes,
            self.device.is_cpu,
            sharded=shard > 1,
            log_every=config.training.log_every,
            pair_scores=calibration is not None and calibration.statistics == "pairs",
            score_rows=score_rows,
            runs_reference=config.reference_mode in ("frozen", "adapter"),
            full_kl="kl" in getattr(config.build_loss(), "columns", ()),
        )
        return Memory(
            shapes,
            traced,
            head,
            config.optim,
            config.parallel,
            config.reference_mode,
            dpo_pg=config.update == "dpo_pg",
            checkpoints=config.training.checkpoint_every is not None,
            shard=shard,
            on_cpu=self.device.is_cpu,
        )

    def _trace(
        self, setup: Setup, steps: list[Step], sharded: bool, one_by_one: bool
    ) -> tuple[Shapes, Trace]:
        config, lengths = setup.config, setup.lengths
        checkpointing = config.training.activation_checkpointing
        key = repr((config.model, config.adapter, checkpointing, setup.layout, sharded))
        if key not in self._traces:
            policy = empty_policy(
                config.model,
                self._vocabulary,
                sharded,
                adapter=config.adapter,
                activation_checkpointing=checkpointing,
            )
            shapes = shapes_of(policy, setup.in_4bit)
            longest = max(p.tokens for step in steps for batch in step for p in batch)
            group = lengths.group(int(lengths.padded_lengths.argmax()))
            half = [max(1, round(n * longest / sum(group) / 2)) for n in group]
            traced = trace(policy, half, setup.layout, one_kernel=not one_by_one)
            self._traces[key] = shapes, traced
        return self._traces[key]


def _mean(flops: list[speed.Flops]) -> speed.Flops:
    return speed.Flops(
        trunk=sum(f.trunk for f in flops) / len(flops),
        attention=sum(f.attention for f in flops) / len(flops),
        head=sum(f.head for f in flops) / len(flops),
    )


def shard_size(parallel: Parallel, in_4bit: bool, ranks: int) -> int:
    """Ranks that share one copy of the base, as in `fastpref.model.fsdp.make_mesh`.

    Raises ConfigError if `parallel` needs another number of ranks.
    """
    replicate, shard = parallel.sizes(ranks)
    if replicate * shard != ranks:
        raise ConfigError(
            f"parallel: replicate {replicate} · shard {shard} needs {replicate * shard} ranks; "
            f"plan with --ranks {replicate * shard}"
        )
    return 1 if in_4bit else shard
