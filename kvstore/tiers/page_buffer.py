"""Page-aligned memory for O_DIRECT."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray


def page_aligned(nbytes: int) -> NDArray[np.uint8]:
    """A zeroed buffer that starts on a page; freed with the array."""
    return np.frombuffer(mmap.mmap(-1, nbytes), dtype=np.uint8)
