"""Garbage is collected by hand while a run takes its steps."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from fastpref.utils.garbage import manual_collection


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """The collector as the other tests have it."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    yield
    gc.enable()
    gc.unfreeze()
    if frozen:
        gc.freeze()


def test_nothing_is_collected_automatically_and_what_exists_is_frozen() -> None:
    with manual_collection():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_objects_that_the_program_has_frozen_stay_frozen() -> None:
    gc.freeze()
    with manual_collection():
        pass
    assert gc.get_freeze_count() > 0


def test_a_program_without_automatic_collections_has_none_after_an_error() -> None:
    gc.disable()
    with pytest.raises(ZeroDivisionError), manual_collection():
        _ = 1 / 0
    assert not gc.isenabled()
