"""The page and the picture of the architecture are those of the imports."""

from __future__ import annotations

import pytest

from fastpref.docgen import architecture
from tests import test_layers


def test_page_and_picture_are_those_of_the_imports() -> None:
    imports = architecture.arrows()
    advice = "run: python -m fastpref.docgen.architecture"
    assert architecture.PAGE.read_text("utf-8") == architecture.page(imports), advice
    assert architecture.PICTURE.read_text("utf-8") == architecture.picture(imports), advice


def test_the_rooms_are_those_of_the_layers() -> None:
    rooms = {room for layer in test_layers.LAYERS for room in layer}
    assert set(architecture.arrows()) == rooms | {architecture.KERNELS}


def test_a_circle_is_refused_and_a_longer_way_replaces_an_arrow() -> None:
    with pytest.raises(ValueError, match="imports: a → b → a is a circle"):
        architecture.floors({"a": {"b"}, "b": {"a"}})
    imports = {"a": {"b", "c"}, "b": {"c"}, "c": set[str]()}
    assert architecture.floors(imports) == [["c"], ["b"], ["a"]]
    assert architecture.reduced(imports) == {"a": {"b"}, "b": {"c"}, "c": set()}
    assert architecture.picture(imports).count('<path d="M') == 3  # two arrows and their head


def test_pictures_are_small() -> None:
    assets = list((architecture.PICTURE.parent).iterdir())
    assert assets and all(path.stat().st_size <= 60_000 for path in assets)
