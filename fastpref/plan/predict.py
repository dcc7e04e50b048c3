"""The prediction for one config on one device, as `fastpref plan` shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastpref.config import Config, ConfigError, Parallel
from fastpref.data.batch_plan import Layout
from fastpref.model.batch_layout import preferred_layout
from fastpref.model.policy import Policy
from fastpref.model.recomputation import recomputed
from fastpref.ops.score_sketch import sketch_rows
from fastpref.plan import flops as speed
from fastpref.plan.activation_trace import Trace, trace
from fastpref.plan.budget import BATCHWISE_TOKENS, Budget, choose, token_ladder
from fastpref.plan.devices import Device
from fastpref.plan.head import Head, RewardHead
from fastpref.plan.memory import Memory, Parts
from fastpref.plan.model_shapes import Shapes, empty_policy, shapes_of
from fastpref.plan.workload import GroupLengths, MicroBatch, step_bounds, steps_of


@dataclass(frozen=True)
class Setup:
    """A run to predict: its config, the lengths of its data, its ranks.

    changes: of the config that the user has, as they are typed on the command line.
    chosen_layout: of a loaded model; by default the one that the config prefers.
    """

    config: Config
    lengths: GroupLengths
    ranks: int
    changes: tuple[str, ...] = ()
    chosen_layout: Layout | None = None

    @property
    def layout(self) -> Layout:
        if self.chosen_layout is not None:
            return self.chosen_layout
        return preferred_layout(self.config.training, self.config.model.attn_implementation)

    @property
    def in_4bit(self) -> bool:
        return self.config.adapter is not None and self.config.adapter.quantize is not None

    @property
    def of_rewards(self) -> bool:
        return self.config.build_loss().of_rewards


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
    budget: Budget
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
    """Predictions on one device; configs with the same model and layout share their traces."""

    def __init__(self, device: Device, vocabulary: int | None) -> None:
        self.device, self._vocabulary = device, vocabulary
        self._traces: dict[str, Trace] = {}
        self._counted: dict[str, Shapes] = {}

    def on(self, device: Device) -> Predictor:
        """Predictions on another device, from the same traces."""
        other = Predictor(device, self._vocabulary)
        other._traces, other._counted = self._traces, self._counted
        return other

    def __call__(self, setup: Setup) -> Prediction:
        """Raises UserError for a config that cannot run at all."""
        config, ranks = setup.config, setup.ranks
        budget = self.budget(setup, self.device.usable)
        memory = self.memory(setup, budget.recomputed_blocks)
        steps = steps_of(
            config.training,
            budget.micro_batch_tokens,
            setup.layout,
            setup.lengths,
            ranks,
            self._one_by_one(setup),
            of_rewards=setup.of_rewards,
        )
        moment, parts = max(
            (memory.peak(batch, len(step) > 1) for step in steps for batch in step),
            key=lambda peak: peak[1].total,
        )
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
            budget=budget,
            flops=_mean([speed.step_flops(memory, step) for step in steps]),
            seconds=sum(speed.step_seconds(self.device, memory, step) for step in steps)
            / len(steps),
            reference_seconds=speed.seconds(self.device, reference_flops),
        )

    def budget(self, setup: Setup, usable: int) -> Budget:
        """Micro-batch and recomputed blocks of the config; the automatic ones from `usable` bytes.

        Raises UserError for a config that cannot run at all.
        """
        training, one_by_one = setup.config.training, self._one_by_one(setup)
        shapes = self._shapes(setup)
        blocks = shapes.blocks
        bounds = step_bounds(
            training.batch_size,
            setup.layout,
            setup.lengths,
            setup.ranks,
            of_rewards=setup.of_rewards,
        )
        mode, tokens = training.activation_checkpointing, training.micro_batch_tokens
        block_choices: Sequence[int] = range(blocks + 1)
        if mode != "auto":
            block_choices = [sum(recomputed(mode, blocks))]
        elif not shapes.can_recompute:
            block_choices = [0]
        token_choices = [tokens] if tokens != "auto" else token_ladder(bounds)
        if tokens == "auto" and one_by_one:
            token_choices = [bounds.longest]
        if tokens == "auto" and depends_on_batch(setup.config):
            token_choices = [max(BATCHWISE_TOKENS, bounds.longest)]
        memories: dict[int, Memory] = {}

        def memory_of(count: int) -> Memory:
            if count not in memories:
                memories[count] = self.memory(setup, count)
            return memories[count]

        return choose(
            self.device, usable, bounds, memory_of, token_choices, block_choices, one_by_one
        )

    def predicted_peak(self, setup: Setup, blocks: int, batch: MicroBatch) -> int:
        """Bytes of a micro-batch of a step with others."""
        return self.memory(setup, blocks).peak(batch, accumulates=True)[1].total

    def _one_by_one(self, setup: Setup) -> bool:
        invariant = setup.config.training.batch_invariant
        return self.device.is_cpu and self._shard(setup) == 1 and invariant

    def _shard(self, setup: Setup) -> int:
        return shard_size(setup.config.parallel, setup.in_4bit, setup.ranks)

    def memory(self, setup: Setup, blocks: int) -> Memory:
        """Memory of a run that recomputes so many blocks."""
        config, shard = setup.config, self._shard(setup)
        shapes = self._shapes(setup)
        return Memory(
            shapes,
            self._trace(setup, blocks / shapes.blocks),
            RewardHead(shapes) if setup.of_rewards else self._head(config, shapes, shard > 1),
            config.optim,
            config.parallel,
            config.reference_mode,
            dpo_pg=config.update == "dpo_pg",
            checkpoints=config.training.checkpoint_every is not None,
            shard=shard,
            on_cpu=self.device.is_cpu,
            recomputed=blocks / shapes.blocks,
        )

    def _head(self, config: Config, shapes: Shapes, sharded: bool) -> Head:
        """Head of a language model."""
        calibration, score_rows = config.calibration, 0
        if calibration is not None and calibration.statistics == "batch":
            score_rows = sketch_rows(shapes.head_rows, calibration.sketch_rows)
        return Head(
            shapes,
            self.device.is_cpu,
            sharded=sharded,
            log_every=config.training.log_every,
            pair_scores=calibration is not None and calibration.statistics == "pairs",
            score_rows=score_rows,
            runs_reference=config.reference_mode in ("frozen", "adapter"),
            full_kl="kl" in getattr(config.build_loss(), "columns", ()),
        )

    def _shapes(self, setup: Setup) -> Shapes:
        key = repr(self._built(setup))
        if key not in self._counted:
            self._counted[key] = shapes_of(self._policy(setup, recomputed=False), setup.in_4bit)
        return self._counted[key]

    def _trace(self, setup: Setup, share: float) -> Trace:
        """Trace of a trunk that recomputes a share of its blocks."""
        if share in (0, 1):
            return self._traced(setup, recomputed=share == 1)
        return self._traced(setup, False).mixed(self._traced(setup, True), share)

    def _traced(self, setup: Setup, recomputed: bool) -> Trace:
        lengths, one_by_one = setup.lengths, self._one_by_one(setup)
        key = repr((*self._built(setup), recomputed, setup.layout))
        if key not in self._traces:
            group = lengths.group(int(lengths.padded_lengths.argmax()))
            half = [max(1, n // 2) for n in group]
            policy = self._policy(setup, recomputed)
            self._traces[key] = trace(policy, half, setup.layout, one_kernel=not one_by_one)
        return self._traces[key]

    def _built(self, setup: Setup) -> tuple[Any, ...]:
        """Everything that the shapes of the policy depend on."""
        config = setup.config
        return config.model, config.adapter, self._shard(setup) > 1, setup.of_rewards

    def _policy(self, setup: Setup, recomputed: bool) -> Policy:
        return empty_policy(
            setup.config.model,
            self._vocabulary,
            self._shard(setup) > 1,
            adapter=setup.config.adapter,
            recomputed=recomputed,
            of_rewards=setup.of_rewards,
        )


def depends_on_batch(config: Config) -> bool:
    """Whether the loss of a pair depends on the others of its micro-batch."""
    return not getattr(config.build_loss(), "soft_labels", True)


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
