"""What tests of preparations share: photos, interruptions, and what was written."""

from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.shards import Bar, Job, quiet


def write_photos(root: Path, count: int = 22, size: tuple[int, int] = (16, 18)) -> Path:
    """Images of noise of (height, width) in two classes."""
    generator = np.random.default_rng(0)
    for number in range(count):
        path = root / "ab"[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).save(path)
    return root


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class Interrupt(Exception):
    pass


def stopping_after(samples: int) -> Job:
    """A job that fails after so many samples of the training split, as if by Ctrl-C."""

    class Bomb:
        left = samples

        def update(self, n: int, /) -> None:
            self.left -= n
            if self.left < 0:
                raise Interrupt

        def close(self) -> None: ...

    def progress(split: str, total: int, done: int) -> Bar:
        return Bomb() if split == "train" else quiet(split, total, done)

    return Job(progress=progress)
