"""Integers modulo 2^bits, and when their signed sum cannot wrap around."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedcanary.errors import BadInput

Field = npt.NDArray[np.unsignedinteger[Any]]  # (length,) integers modulo 2^bits: uint32 up to 32 bits, else uint64


def check_capacity(clients: int, bound: int, bits: int) -> None:
    """Raise BadInput unless the signed sum of `clients` vectors with entries in [-bound, bound] fits modulo 2^bits.

    The sum lies in [-clients * bound, clients * bound], so clients * bound < 2^(bits-1) is enough.
    """
    if clients * bound >= 2 ** (bits - 1):
        least = (clients * bound).bit_length() + 1
        raise BadInput.of(
            "bits", f"{clients} clients with entries up to {bound} overflow {bits} bits", f"use at least {least} bits"
        )


def encode(values: npt.NDArray[Any], bits: int) -> Field:
    """Integers modulo 2^bits: signed ones from [-2^(bits-1), 2^(bits-1)), unsigned ones from [0, 2^bits).

    Raises:
        BadInput: not a vector of integers, or an entry outside the field.
    """
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise BadInput.of("vector", f"shape {values.shape} of {values.dtype}", "give a vector of integers")
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if np.issubdtype(values.dtype, np.signedinteger) else (0, 2**bits)
    if values.size and not (low <= int(values.min()) and int(values.max()) < high):
        raise BadInput.of("vector", f"an entry outside [{low}, {high})", "clip it, or use more bits")
    wide = values.astype(np.uint64) & np.uint64(2**bits - 1)
    return wide.astype(np.uint32 if bits <= 32 else np.uint64)


def decode_signed(total: Field, bits: int) -> npt.NDArray[np.int64]:
    """The signed sum, (length,); right whenever `check_capacity` passed."""
    up = np.uint64(64 - bits)
    return np.asarray((total.astype(np.uint64) << up).view(np.int64) >> np.int64(64 - bits))
