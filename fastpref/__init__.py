"""fastpref: fast, memory-efficient preference training of language models.

`fastpref.ops` has the fused operations, `fastpref.losses` the objectives, and `fastpref train`
runs the trainer built on both. Heavy modules are imported on first use.
"""

from fastpref.utils.version import __version__

__all__ = ["__version__"]
