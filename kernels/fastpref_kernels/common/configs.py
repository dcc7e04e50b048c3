"""The tile shapes of every kernel, as plain data.

The first row of a table is used; the others are candidates that the compile command also checks
and that a tuning run may promote. The choice is pinned, not timed at run time: two kernels or two
processes with different tiles would differ in the last bit, and a policy must equal its reference
to the last bit before the first step.
"""

from typing import NamedTuple


class GemmConfig(NamedTuple):
    """One program's tile of the logits, (block_t, block_v), and how it walks the hidden size."""

    block_t: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    tma: bool  # operands through the bulk copy engine
    panel_v: int = 2048  # columns of the vocabulary that one program walks

    @property
    def blocks(self) -> dict[str, list[int]]:
        """Shapes of the blocks that the copy engine moves."""
        return {
            "hidden": [self.block_t, self.block_d],
            "weight": [self.block_v, self.block_d],
            "ref_hidden": [self.block_t, self.block_d],
            "ref_weight": [self.block_v, self.block_d],
        }

    @property
    def panel_tiles(self) -> int:
        """Number of tiles of the vocabulary that one program walks.

        It is fixed, so that the order of summation, hence every bit of the result, does not depend
        on the number of tokens.
        """
        return self.panel_v // self.block_v


class RowConfig(NamedTuple):
    """One program's rows (or columns) in a kernel without a GEMM."""

    block_t: int
    num_warps: int


class AttentionConfig(NamedTuple):
    """Tiles of one kernel of attention: block_q queries by block_k keys.

    A program owns a tile of queries and walks blocks of keys, or the reverse for gradients of keys.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


class AttentionConfigs(NamedTuple):
    """Tiles of the kernels of attention for one head size.

    dv: tiles of a launch for the gradients of values alone, where sums for keys and values do not
        fit into the registers together; dkv is then for those of keys. The scores are computed once
        more.
    """

    fwd: AttentionConfig
    dq: AttentionConfig
    dkv: AttentionConfig
    dv: AttentionConfig | None = None


IGNORE_INDEX = -100
# FMA contraction is off: the compiler may contract one variant of a kernel and not another, which
# changes the last bit.
FP_FUSION = False
GROUP_T = 16  # row blocks that share a panel of the weight while it is in the L2 cache

# Keyed by the architecture that the table was written for: 80 stands for Ampere, Ada and consumer
# Blackwell (its first row fits their 99 KiB of shared memory), 90 for Hopper, 100 for Blackwell.
HALF_GEMM: dict[int, tuple[GemmConfig, ...]] = {
    80: (GemmConfig(128, 128, 64, 8, 3, tma=False), GemmConfig(64, 128, 64, 4, 3, tma=False)),
    90: (
        GemmConfig(128, 256, 64, 8, 3, tma=True, panel_v=256),
        GemmConfig(128, 256, 64, 8, 4, tma=True, panel_v=256),
        GemmConfig(128, 128, 64, 8, 4, tma=True, panel_v=256),
    ),
    100: (GemmConfig(128, 256, 64, 8, 3, tma=True), GemmConfig(128, 128, 128, 8, 3, tma=True)),
}
FLOAT_GEMM: dict[int, tuple[GemmConfig, ...]] = {
    80: (GemmConfig(64, 64, 32, 4, 3, tma=False),),
    90: (GemmConfig(64, 64, 32, 4, 3, tma=True),),
    100: (GemmConfig(128, 64, 32, 4, 3, tma=True),),
}
# Two accumulators at once, for kernels that read two heads.
HALF_PAIR: dict[int, tuple[GemmConfig, ...]] = {
    80: (GemmConfig(64, 128, 64, 8, 3, tma=False),),
    90: (GemmConfig(128, 128, 64, 8, 3, tma=True),),
    100: (GemmConfig(128, 128, 64, 8, 3, tma=True),),
}
FLOAT_PAIR: dict[int, tuple[GemmConfig, ...]] = {
    **FLOAT_GEMM,
    100: (GemmConfig(128, 64, 32, 8, 3, tma=True),),
}
INTERPRETER_GEMM = GemmConfig(16, 32, 16, 1, 1, tma=True, panel_v=64)

MERGE = RowConfig(16, 4)
MERGE_PANELS = 64  # partials of a row that are read at once
REDO_PANELS = 16  # panels that one program of REDO walks; nearly all of them have no row to redo
MERGE_KL = RowConfig(128, 4)
DLOGITS_OF_KL = RowConfig(2048, 4)  # columns of one row
LABEL_LOGITS = RowConfig(1024, 4)  # columns of one row
SCORE_FOLD = RowConfig(1024, 4)  # columns of one row

# Rows of a norm in one program, by the largest width that a row of the table serves. A program's
# columns are the width's next power of two, so a thread holds up to 32 numbers of each operand.
NORM = {
    64: RowConfig(32, 4),
    128: RowConfig(16, 4),
    256: RowConfig(8, 4),
    512: RowConfig(4, 4),
    1024: RowConfig(2, 4),
    2048: RowConfig(1, 4),
    4096: RowConfig(1, 8),
    8192: RowConfig(1, 16),
    16384: RowConfig(1, 16),
}
NORM_PROGRAMS = 256  # rows of partial sums of a weight's gradient
COLUMN_SUMS = RowConfig(32, 4)
SUMMED_COLUMNS = 128  # columns of one program that adds partial sums
ROTARY = RowConfig(16, 4)  # heads of one token
GATED = RowConfig(1024, 4)  # columns of one row

# By the largest head size that a row serves. A tile of 64 rows wastes less of a short segment than
# one of 128, and several programs share a multiprocessor, so one multiplies while another computes
# exponentials.
HALF_ATTENTION: dict[int, dict[int, AttentionConfigs]] = {
    80: {
        64: AttentionConfigs(
            AttentionConfig(64, 64, 4, 3), AttentionConfig(64, 64, 4, 2),
            AttentionConfig(32, 64, 4, 2),
        ),
        128: AttentionConfigs(
            AttentionConfig(64, 64, 4, 2), AttentionConfig(64, 32, 4, 2),
            AttentionConfig(32, 64, 4, 2),
        ),
        256: AttentionConfigs(
            AttentionConfig(64, 64, 8, 1), AttentionConfig(64, 32, 8, 1),
            AttentionConfig(32, 32, 8, 2),
        ),
    },
    90: {
        64: AttentionConfigs(
            AttentionConfig(64, 64, 4, 3), AttentionConfig(64, 64, 4, 2),
            AttentionConfig(64, 64, 4, 2),
        ),
        128: AttentionConfigs(
            AttentionConfig(64, 64, 4, 2), AttentionConfig(64, 64, 4, 2),
            AttentionConfig(32, 64, 4, 2),
        ),
        256: AttentionConfigs(
            AttentionConfig(128, 32, 8, 2), AttentionConfig(64, 32, 8, 2),
            AttentionConfig(32, 64, 8, 2), AttentionConfig(32, 64, 8, 2),
        ),
    },
    100: {
        64: AttentionConfigs(
            AttentionConfig(64, 64, 4, 3), AttentionConfig(64, 64, 4, 2),
            AttentionConfig(64, 64, 8, 2),
        ),
        96: AttentionConfigs(
            AttentionConfig(64, 64, 4, 2), AttentionConfig(64, 64, 4, 2),
            AttentionConfig(32, 64, 8, 2),
        ),
        128: AttentionConfigs(
            AttentionConfig(64, 64, 4, 2), AttentionConfig(64, 64, 4, 2),
            AttentionConfig(64, 64, 8, 2),
        ),
        256: AttentionConfigs(
            AttentionConfig(64, 64, 8, 2), AttentionConfig(64, 32, 8, 2),
            AttentionConfig(16, 64, 8, 1), AttentionConfig(32, 64, 8, 1),
        ),
    },
}  # fmt: skip
# Instead of the above with a soft cap, whose slope takes registers.
SOFTCAP_ATTENTION: dict[int, dict[int, AttentionConfigs]] = {
    80: {128: HALF_ATTENTION[80][128]._replace(dkv=AttentionConfig(32, 64, 8, 2))},
    90: {
        128: HALF_ATTENTION[90][128]._replace(
            dq=AttentionConfig(64, 32, 4, 2), dkv=AttentionConfig(32, 128, 8, 2)
        ),
    },
    100: {128: HALF_ATTENTION[100][128]._replace(dq=AttentionConfig(64, 32, 4, 2))},
}
FLOAT_ATTENTION = {
    64: AttentionConfigs(
        AttentionConfig(32, 32, 4, 1), AttentionConfig(16, 32, 4, 1), AttentionConfig(32, 16, 4, 1)
    ),
    256: AttentionConfigs(
        AttentionConfig(16, 16, 4, 1), AttentionConfig(16, 16, 4, 1), AttentionConfig(16, 16, 4, 1)
    ),
}
INTERPRETER_ATTENTION = AttentionConfigs(
    AttentionConfig(16, 16, 1, 1), AttentionConfig(16, 16, 1, 1), AttentionConfig(16, 16, 1, 1)
)
ATTENTION_DELTA = RowConfig(64, 4)

SHARED_MEMORY_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a thread block may use


def table_arch(capability: tuple[int, int]) -> int:
    """The architecture whose table serves a device of this compute capability."""
    return {9: 90, 10: 100}.get(capability[0], 80)


def gemm_configs(arch: int, element_size: int) -> tuple[GemmConfig, ...]:
    """The candidates for one architecture and input size in bytes; the first is used."""
    return (FLOAT_GEMM if element_size == 4 else HALF_GEMM)[arch]


def pair_configs(arch: int, element_size: int) -> tuple[GemmConfig, ...]:
    """The candidates for kernels with two accumulators; the first is used."""
    return (FLOAT_PAIR if element_size == 4 else HALF_PAIR)[arch]


def attention_configs(
    arch: int, element_size: int, head_size: int, softcap: bool
) -> AttentionConfigs:
    """The tiles of attention for one architecture, input size in bytes and head size."""
    table = FLOAT_ATTENTION if element_size == 4 else HALF_ATTENTION[arch]
    size = min(size for size in table if size >= head_size)
    if softcap and element_size != 4:
        return SOFTCAP_ATTENTION.get(arch, {}).get(size, table[size])
    return table[size]
