"""The bytes that a client's state is kept in between two steps, when each of its messages is another process's work.

Write before you answer: a step's answer may leave only when the state after it has replaced the one before it on the
disk (a new file, fsync, rename, fsync of the folder). A client that is put back to before a step it has answered can
be made to answer it again, and two answers give away what one does not:

    share    sealed twice under one key and nonce: their difference, and the means to forge further ones
    mask     with one neighbour fewer: the difference is that pair's pad; with another vector: that of the two vectors
    agree    two lists of survivors can both get a quorum
    unmask   shares of both seeds of one client, which unmask its vector

Nothing in the bytes can tell that there have been later ones, so no copy may be restored: keep them out of backups.
An answer that was lost on its way must be kept to be sent again, written together with the state or after it. A client
that has the state and not the answer has dropped out, which costs nobody anything.

What a later step does not need is not kept: from `share` on no sealing key, from `mask` on not the masking key's seed.
Whoever reads the disk after `mask`, with all that the server has, cannot take the pairwise masks off. After the last
step or a refusal no secret is left. A round that was given up is forgotten by deleting its file.

The bytes are authenticated, not encrypted: they lie on the same disk as the identity, whose key would decrypt them.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Mapping, Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedcanary.privacy.secagg.crypto import derive
from fedcanary.privacy.secagg.terms import Refusal, Registry, Terms

FORMAT = 1
TAG = 32  # bytes of HMAC-SHA256


def _tag(body: bytes, identity: Ed25519PrivateKey, registry: Registry, terms: Terms) -> bytes:
    info = b"kept state" + bytes([FORMAT]) + registry.digest
    return hmac.digest(derive(identity.private_bytes_raw(), terms.digest, info), body, "sha256")


def seal(parts: Sequence[bytes], identity: Ed25519PrivateKey, registry: Registry, terms: Terms) -> bytes:
    """A tag under a key of this client and round, then the parts, each after its length (4 bytes, little-endian)."""
    body = b"".join(struct.pack("<I", len(part)) + part for part in parts)
    return _tag(body, identity, registry, terms) + body


def unseal(data: bytes, identity: Ed25519PrivateKey, registry: Registry, terms: Terms) -> list[bytes]:
    """The parts that `seal` was given. Raises Refusal (`bad_state`) for anything but its bytes, all of them."""
    tag, body = data[:TAG], data[TAG:]
    if not hmac.compare_digest(tag, _tag(body, identity, registry, terms)):
        raise Refusal("bad_state", "cut, altered, or of another client, round, registration list or version")
    parts, at = [], 0
    while at < len(body):
        (size,) = struct.unpack_from("<I", body, at)
        parts.append(body[at + 4 : at + 4 + size])
        at += 4 + size
    return parts


def pack_rows(rows: Mapping[int, bytes]) -> bytes:
    """Ids (uint32, increasing), each followed by what concerns it; all of one size."""
    return b"".join(struct.pack("<I", client) + rows[client] for client in sorted(rows))


def unpack_rows(data: bytes, size: int) -> dict[int, bytes]:
    """The rows that `pack_rows` wrote, of so many bytes each."""
    return dict(struct.iter_unpack(f"<I{size}s", data))
