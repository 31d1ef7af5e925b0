"""Kill long work with SIGKILL at random moments, resume it, and compare with an uninterrupted run.

    python scripts/kill_tests.py labels --kills 50
    python scripts/kill_tests.py t2q --kills 20
    python scripts/kill_tests.py q2b --kills 20

Each run is a process of its own, forked from this one so that it need not import torch again; it is
killed at a moment drawn uniformly over the time that an uninterrupted run takes, and run again until it
finishes. Prints a table, and exits 1 where a result differs or a file was seen half-written. A kind of
work is a function that prepares its inputs and gives the command; add it to `KINDS`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import diffusers  # noqa: F401 (before any fork)
import matplotlib.figure  # noqa: F401
import numpy as np
import torch
import transformers  # noqa: F401
from PIL import Image
from safetensors import safe_open

from qlip_plugins import cli
from qlip_plugins.embeddings import EncodedPrompts, PromptEmbeddings
from qlip_plugins.labels import Labels
from qlip_plugins.recipe import Recipe

Command = Callable[[Path], list[str]]
"""The arguments of `qlip-plugins` that write their result to a path; the work folder is beside it."""


def labels(folder: Path) -> Command:
    """The label verb on the demo: eight prompts, two pictures each, a step a picture, two at a time."""
    draw = np.random.default_rng(0)
    references = folder / "references"
    references.mkdir()
    rows = [{"file_name": f"{number}.png", "concept": f"concept {number % 4}"} for number in range(16)]
    for row in rows:
        pixels = draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(references / row["file_name"])
    (references / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = [{"prompt": f"picture {number}", "concept": f"concept {number % 4}"} for number in range(8)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    return lambda out: [
        *("label", "demo-w4a8", "--prompts", str(folder / "prompts.jsonl"), "--out", str(out)),
        *("--steps", "1", "--guidance", "1", "--batch-size", "2", "--metric", "knn-giqa", "--set", "k=5"),
        *("--set", "features=demo", "--set", f"references={references}"),
    ]


def golden_labels(folder: Path) -> Path:
    """Labels of the golden pipeline's prompts, which rise with one direction of their embeddings."""
    recipe = Recipe.load("golden-w4a8")
    assert recipe.model.prompt_embeddings is not None
    table = PromptEmbeddings.load(recipe.model.prompt_embeddings)
    prompts = EncodedPrompts.from_table(table, [f"row {row}" for row in range(48)])
    scores = prompts.embeddings @ torch.randn(
        prompts.embeddings.shape[1], 2, generator=torch.Generator().manual_seed(0)
    )
    path = folder / "labels.safetensors"
    Labels(prompts.prompts, prompts.embeddings, scores, {"metric": "of a test", "pooling": "mean"}).save(path)
    return path


def t2q(folder: Path) -> Command:
    """T2Q on labels of the golden pipeline: 4,000 steps, its state kept every hundred."""
    made = golden_labels(folder)
    return lambda out: [
        *("train", "t2q", "golden-w4a8", "--labels", str(made), "--out", str(out)),
        *("--hidden", "32", "--train-steps", "4000"),
    ]


def q2b(folder: Path) -> Command:
    """Q2B on the golden base: twelve trajectories of two prompts, its state kept after each."""
    run(t2q(folder)(folder / "t2q"))
    made = golden_labels(folder)
    return lambda out: [
        *(
            "train",
            "q2b",
            "golden-w4a8",
            "--t2q",
            str(folder / "t2q"),
            "--prompts",
            str(made),
            "--out",
            str(out),
        ),
        *(
            "--steps",
            "3",
            "--guidance",
            "2",
            "--batch-size",
            "2",
            "--bit-weight",
            "1e-3",
            "--trajectories",
            "12",
        ),
    ]


def run(command: list[str]) -> None:
    """Run `qlip-plugins` here, silently."""
    with redirect_stdout(io.StringIO()):
        if cli.main(command):
            raise SystemExit(f"failed: {' '.join(command)}")


KINDS: dict[str, Callable[[Path], Command]] = {"labels": labels, "t2q": t2q, "q2b": q2b}


def start(command: list[str]) -> int:
    """Run `qlip-plugins` in a forked process; returns its id."""
    process = os.fork()
    if process:
        return process
    torch.set_num_threads(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, sys.stdout.fileno())
    code = 1
    try:
        code = cli.main(command)
    finally:
        os._exit(code)


def finished(process: int, until: float | None) -> bool:
    """Wait for a process; it is killed at the time `until`. Whether it ended by itself, and well."""
    while until is None or time.monotonic() < until:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            if os.waitstatus_to_exitcode(status):
                raise SystemExit(f"a run failed with exit code {os.waitstatus_to_exitcode(status)}")
            return True
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return False


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files."""
    found = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        found.update((file.name if path.is_dir() else "").encode() + file.read_bytes())
    return found.hexdigest()


def broken(out: Path) -> list[Path]:
    """Files under a final name, in the work folder or as the result, that a reader could not read."""
    work = out.with_name(f"{out.name}.work")
    made = sorted(out.iterdir()) if out.is_dir() else [out]
    found = [
        path for path in [*made, *sorted(work.glob("[!.]*"))] if path.is_file() and path.suffix != ".png"
    ]
    return [path for path in found if not readable(path)]


def readable(path: Path) -> bool:
    """Whether a file of tensors or JSON is whole."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        else:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (no dict)
                    opened.get_tensor(name)
    except Exception:  # any way of being unreadable counts
        return False
    return True


def moment(out: Path) -> str:
    """Where a kill met the work."""
    work = out.with_name(f"{out.name}.work")
    if out.exists():
        return "after the result"
    if not work.is_dir():
        return "before the first file"
    return "with parts finished" if any(work.glob("*.safetensors")) else "before the first part"


def main() -> None:
    """Run one kind, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = KINDS[options.kind](folder)
        suffix = ".safetensors" if options.kind == "labels" else ""
        whole = folder / f"whole{suffix}"
        began = time.monotonic()
        finished(start(command(whole)), None)
        duration, expected = time.monotonic() - began, digest(whole)
        kills = runs = equal = damaged = 0
        moments: Counter[str] = Counter()
        while kills < options.kills:
            runs += 1
            out = folder / f"run-{runs}{suffix}"
            while True:
                limit = time.monotonic() + draw.uniform(0, duration) if kills < options.kills else None
                if finished(start(command(out)), limit):
                    break
                kills += 1
                moments[moment(out)] += 1
                damaged += len(broken(out))
            equal += digest(out) == expected
    print(f"{options.kind}: an uninterrupted run takes {duration:.1f} s")
    print("kills | runs resumed until they finished | results equal | files seen half-written")
    print(f"{kills} | {runs} | {equal} of {runs} | {damaged}")
    print("kills " + ", ".join(f"{where}: {count}" for where, count in sorted(moments.items())))
    if equal < runs or damaged:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
