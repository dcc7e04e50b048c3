"""Decoder blocks with explicit forward and backward passes, on the weights of a Hugging Face model.

`build_trunk` reads the layers of a supported architecture, or says what it does not know in them.
"""

from fastpref.trunk.linear import UnknownLayer
from fastpref.trunk.model import Trunk, build_trunk

__all__ = ["Trunk", "UnknownLayer", "build_trunk"]
