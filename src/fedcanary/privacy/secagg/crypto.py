"""Keys, pads and signatures, all by `cryptography`. Each derivation has a label and the round in its input."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedcanary.privacy.secagg.integers import Field
from fedcanary.privacy.secagg.terms import Refusal

NONCE = bytes(12)  # every sealing key seals one message
PROBE = X25519PrivateKey.from_private_bytes(bytes(range(32)))  # not secret: it finds keys that no exchange works with


def derive(secret: bytes, salt: bytes, info: bytes, size: int = 32) -> bytes:
    """HKDF-SHA256 (RFC 5869)."""
    return HKDF(SHA256(), size, salt, info).derive(secret)


def mask_secret(seed: bytes, terms_digest: bytes) -> X25519PrivateKey:
    """The masking key of a shared seed: shares are of 16 bytes, keys of 32."""
    return X25519PrivateKey.from_private_bytes(derive(seed, terms_digest, b"masking key"))


def exchange(private: X25519PrivateKey, public: bytes) -> bytes:
    """The shared secret. Raises Refusal (`bad_key`) for a wrong length and for a point of small order."""
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise Refusal("bad_key") from None


def pair_key(private: X25519PrivateKey, public: bytes, session: bytes, one: int, other: int) -> bytes:
    """Key of the pad between two clients, the same from both sides."""
    return derive(exchange(private, public), session, b"pad" + struct.pack("<II", *sorted((one, other))))


def self_key(seed: bytes, session: bytes, client: int) -> bytes:
    """Key of a client's own pad."""
    return derive(seed, session, b"own pad" + struct.pack("<I", client))


def commitment(seed: bytes, terms_digest: bytes, client: int) -> bytes:
    """To the seed of a client's own mask: 128 random bits hide it."""
    return hashlib.sha256(b"commitment" + terms_digest + struct.pack("<I", client) + seed).digest()


def add_pads(total: Field, pads: Iterable[tuple[bytes, int]]) -> None:
    """Add (1) or subtract (-1) the pad of each key, in place, wrapping around.

    AES-256 in counter mode, which the processor's AES instructions make faster than ChaCha20. A key makes one pad, so
    the counter starts at zero. One buffer serves all pads.
    """
    size = total.size * total.itemsize
    zeros, buffer = bytes(size), bytearray(size + 15)
    pad = np.frombuffer(buffer, dtype=total.dtype, count=total.size)
    for key, sign in pads:
        Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update_into(zeros, buffer)
        (np.add if sign > 0 else np.subtract)(total, pad, out=total)


@lru_cache(maxsize=1 << 14)  # a pure function; in a simulation every neighbour verifies the same signature
def verified(public: bytes, signature: bytes, content: bytes) -> bool:
    """Whether an Ed25519 signature is right."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, content)
    except (InvalidSignature, ValueError):
        return False
    return True
