"""Folders of pictures: what is read, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qlip_plugins.errors import ArtefactError
from qlip_plugins.pictures import PictureFolder


def picture(seed: int, side: int = 6) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side + 2, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("c.png", "a.PNG", "b.webp")):
        picture(seed).save(tmp_path / name, lossless=True)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def describe(folder: Path, *rows: Mapping[str, object]) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def test_pictures_come_by_name_with_their_tags(folder: Path) -> None:
    describe(folder, *({"file_name": name, "concept": name[0]} for name in ("c.png", "b.webp", "a.PNG")))
    found = PictureFolder(folder)
    assert (len(found), found.names, found.size) == (3, ("a.PNG", "b.webp", "c.png"), (6, 8))
    assert found.tags == {"concept": ("a", "b", "c")}
    batches = list(found.batches(2))
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 6, 8), (1, 3, 6, 8)]
    expected = torch.stack([torch.from_numpy(np.array(picture(seed))) for seed in (1, 2, 0)])
    assert torch.equal((torch.cat(batches) * 255).round().byte(), expected.permute(0, 3, 1, 2))


def test_the_digest_tells_names_and_contents(folder: Path) -> None:
    first = PictureFolder(folder).digest()
    (folder / "notes.txt").unlink()
    assert PictureFolder(folder).digest() == first
    (folder / "c.png").rename(folder / "d.png")
    second = PictureFolder(folder).digest()
    picture(7).save(folder / "d.png")
    assert len({first, second, PictureFolder(folder).digest()}) == 3


def test_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no such folder"):
        PictureFolder(tmp_path / "none")
    with pytest.raises(ArtefactError, match="holds no picture"):
        PictureFolder(tmp_path)


def test_unusable_pictures_are_refused(folder: Path) -> None:
    picture(0, side=9).save(folder / "b2.png")
    with pytest.raises(ArtefactError, match=r"b2\.png: 11 x 9 pixels, a\.PNG has 8 x 6"):
        PictureFolder(folder)
    picture(0).convert("RGBA").save(folder / "b2.png")
    with pytest.raises(ArtefactError, match="mode RGBA with transparency"):
        PictureFolder(folder)
    (folder / "b2.png").write_bytes(b"no picture at all")
    with pytest.raises(ArtefactError, match=r"b2\.png: no readable picture"):
        PictureFolder(folder)
    content = (folder / "c.png").read_bytes()
    (folder / "b2.png").write_bytes(content[:-60])
    with pytest.raises(ArtefactError, match=r"b2\.png: broken picture"):
        list(PictureFolder(folder).batches(2))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file_name": "x.png"}], r"line 1: no picture 'x\.png'"),
        ([{"file_name": "c.png"}, {"file_name": "c.png"}], "line 2: 'c.png' is described twice"),
        ([{"file_name": "c.png"}], r"says nothing of 'a\.PNG' \(2 such"),
        ([{"file_name": "c.png", "level": 3}], "'level' is 3, expected a string"),
        ([{"name": "c.png"}], 'expected an object with "file_name"'),
        (
            [{"file_name": "a.PNG", "k": ""}, {"file_name": "b.webp"}, {"file_name": "c.png", "k": ""}],
            "'b.webp' has other keys than 'a.PNG': k",
        ),
    ],
)
def test_metadata_that_do_not_fit_are_refused(
    folder: Path, rows: list[Mapping[str, object]], message: str
) -> None:
    describe(folder, *rows)
    with pytest.raises(ArtefactError, match=message):
        PictureFolder(folder)
