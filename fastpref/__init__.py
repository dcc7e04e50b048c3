"""fastpref: preference training of language models, fast and in little memory.

`fastpref.ops` holds the fused operations, `fastpref.losses` the objectives, and `fastpref train`
the trainer built on both. Nothing heavy is imported until it is used.
"""

from fastpref.utils.version import __version__

__all__ = ["__version__"]
