"""What recipes may say changes only on purpose."""

from __future__ import annotations

from tests.support.recipe_surface import FILE, surface


def test_keys_types_and_defaults_are_those_on_record() -> None:
    """`python -m tests.support.recipe_surface` puts a meant change on record."""
    assert surface().splitlines() == FILE.read_text(encoding="utf-8").splitlines()


def test_the_record_knows_types_bounds_and_defaults() -> None:
    assert "Train.microbatch_tokens: whole number, at least 1 = `512`" in FILE.read_text(encoding="utf-8").splitlines()
