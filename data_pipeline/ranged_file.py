"""A file out of a function that reads ranges: of a part of another file, or of an object in a store."""

import io
from collections.abc import Callable


class RangedFile(io.RawIOBase):
    """An unbuffered file of `size` bytes that can seek; `read_at` gives the bytes at (offset, size), or fewer."""

    def __init__(self, size: int, read_at: Callable[[int, int], bytes]):
        self.size, self._read_at, self._position = size, read_at, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if start + offset < 0:
            raise ValueError(f"negative seek position {start + offset}")
        self._position = start + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(self.size - self._position, 0)
        wanted = left if size is None or size < 0 else min(size, left)
        data = self._read_at(self._position, wanted) if wanted else b""
        self._position += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
