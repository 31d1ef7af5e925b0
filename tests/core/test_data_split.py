"""The record of what the embedded demo was trained on: data/emoji_64/split.json."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

SPLIT = Path(__file__).parents[2] / "data" / "emoji_64" / "split.json"
PICTURES = 5164
CONCEPTS = 1419


@pytest.fixture(scope="module")
def split() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(SPLIT.read_text(encoding="utf-8"))
    return found


def concept(picture: str) -> str:
    """`1f431 fluent-3d` -> `1f431`."""
    return picture.partition(" ")[0]


def test_no_concept_is_both_trained_and_held_out(split: dict[str, Any]) -> None:
    count = Counter([*split["trained_concepts"], *split["held_out_concepts"]])
    assert [name for name, times in count.items() if times > 1] == []
    # A concept can be left with no picture of its own: all of them are copies.
    copied = {concept(picture) for picture in split["copies"]}
    assert len({*count, *copied}) == CONCEPTS
    assert 0.08 <= len(split["held_out_concepts"]) / CONCEPTS <= 0.12


def test_no_family_straddles(split: dict[str, Any]) -> None:
    held, trained = set(split["held_out_concepts"]), set(split["trained_concepts"])
    families = split["families"]
    assert [key for key, members in families.items() if held & set(members) and trained & set(members)] == []
    assert max(Counter(chain(*families.values())).values()) == 1
    assert all(len(members) > 1 and key in members for key, members in families.items())
    assert any(held & set(members) for members in families.values())


def test_copies_point_at_kept_pictures_of_their_family(split: dict[str, Any]) -> None:
    copies, held = split["copies"], set(split["held_out_concepts"])
    family = {name: key for key, members in split["families"].items() for name in members}
    for picture, kept in copies.items():
        assert kept not in copies, picture
        ours, theirs = concept(picture), concept(kept)
        assert ours == theirs or family[ours] == family[theirs], picture
        assert theirs in held or theirs in split["trained_concepts"], kept


def test_the_pictures_add_up(split: dict[str, Any]) -> None:
    counted = split["pictures"]
    assert sum(counted.values()) == PICTURES
    assert counted["copies_dropped"] == len(split["copies"])
