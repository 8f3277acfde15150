"""Numbers of variable length, as protocol buffers, Riegeli and OCDBT have them: 7 bits a byte, the lowest
first, and the highest bit set in all bytes but a number's last."""

import numpy as np

MAX_BYTES = 10  # of a number of 64 bits


class Reader:
    """Bytes that are read from the beginning. Raises EOFError where they end too early."""

    def __init__(self, content: bytes):
        self._content, self._at = content, 0

    def rest(self) -> bytes:
        """Returns what is not read yet."""
        return self._content[self._at :]

    def take(self, number: int) -> bytes:
        """Returns the next bytes."""
        found = self._content[self._at : self._at + number]
        self._at += number
        if len(found) < number:
            raise EOFError("it is cut off")
        return found

    def byte(self) -> int:
        """Returns a number of one byte."""
        return self.take(1)[0]

    def number(self) -> int:
        """Returns a number of variable length."""
        return int(self.numbers(1)[0])

    def numbers(self, count: int) -> np.ndarray:
        """Returns numbers of variable length, uint64 (count,). Raises ValueError for one that is too long."""
        if not count:
            return np.zeros(0, np.uint64)
        array = np.frombuffer(self._content[self._at : self._at + MAX_BYTES * count], np.uint8)
        ends = np.flatnonzero(array < 128)[:count] + 1
        if len(ends) < count:
            raise EOFError("it is cut off")
        starts = np.append(0, ends[:-1])
        if (lengths := ends - starts).max() > MAX_BYTES:
            raise ValueError(f"a number has more than {MAX_BYTES} bytes")
        shifts = 7 * (np.arange(ends[-1]) - np.repeat(starts, lengths))
        self._at += int(ends[-1])
        bits = (array[: ends[-1]] & 127).astype(np.uint64) << shifts.astype(np.uint64)
        return np.add.reduceat(bits, starts)
