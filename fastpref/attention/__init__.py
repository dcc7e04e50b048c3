"""Causal attention over packed rows whose prompts are shared: the API is `packed_attention`.

Its implementations give the same output: `reference` is the specification, with a (P, P) mask;
`by_segment` runs one call per prompt and response, in plain PyTorch; `flash` calls flash-attn with
keys gathered for each sequence; `triton` is the kernel of `fastpref_kernels`.
"""

from fastpref.attention.api import implementation, packed_attention
from fastpref.attention.segments import Segments, rows

__all__ = ["Segments", "implementation", "packed_attention", "rows"]
