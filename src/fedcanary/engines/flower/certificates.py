"""Keys and certificates of a deployment: a private authority, the SuperLink's certificate, each node's two keys.

A node holds an ECDSA P-384 key, by which Flower knows it, and an Ed25519 identity, by which the other clients know it
in secure aggregation. `registry.toml` is the list of all clients' public keys that everybody holds a copy of.
"""

from __future__ import annotations

import datetime as dates
import ipaddress
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedcanary.errors import BadInput, Problem

AUTHORITY, SERVER, FLOWER = ("ca.key", "ca.crt"), ("server.key", "server.crt"), ("flower.key", "flower.pub")
IDENTITY, REGISTRY = "identity.pem", "registry.toml"
DAY = dates.timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A registered client: its Ed25519 public key (32 raw bytes), and its Flower key as a line of OpenSSH."""

    name: str
    key: bytes
    flower: str


def write_private(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a new file with these permissions from its first moment; replaces one by the same name at once."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
    draft.replace(path)


def authority(folder: Path, *, days: int = 3650, replace: bool = False) -> None:
    """Make a certificate authority: `ca.key` and `ca.crt`. Raises BadInput if there is one and `replace` is not set."""
    _free(folder, AUTHORITY, replace)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedcanary deployment")])
    usage = _usage(key_cert_sign=True, crl_sign=True)
    built = (
        _certificate(name, name, key.public_key(), key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
    )
    _write_pair(folder, AUTHORITY, key, built.sign(key, hashes.SHA256()))


def server(folder: Path, issuer: Path, hosts: Sequence[str], *, days: int = 825, replace: bool = False) -> None:
    """Make the SuperLink's key and certificate, for names and IP addresses, signed by the authority in `issuer`.

    Raises:
        BadInput: there is one and `replace` is not set, or the authority cannot be used.
    """
    _free(folder, SERVER, replace)
    signer, root = load_authority(issuer)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    built = (
        _certificate(name, root.subject, key.public_key(), signer.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
    )
    _write_pair(folder, SERVER, key, built.sign(signer, hashes.SHA256()))


def flower_key(folder: Path, comment: str, *, replace: bool = False) -> str:
    """Make `flower.key` (OpenSSH, ECDSA P-384) and `flower.pub`; returns the public line, to be registered."""
    _free(folder, FLOWER, replace)
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    line = _public_line(key) + f" {comment}"
    write_private(folder / FLOWER[0], private)
    write_private(folder / FLOWER[1], line.encode() + b"\n", 0o644)
    return line


def identity(folder: Path, *, replace: bool = False) -> bytes:
    """Make `identity.pem` (Ed25519); returns the public key, 32 raw bytes."""
    _free(folder, (IDENTITY,), replace)
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_private(folder / IDENTITY, private)
    return key.public_key().public_bytes_raw()


def registry_text(members: Mapping[int, Member]) -> str:
    """The list of clients' public keys as TOML."""
    rows = [
        {"client": client, "name": m.name, "key": m.key.hex(), "flower": m.flower}
        for client, m in sorted(members.items())
    ]
    return tomli_w.dumps({"member": rows}, multiline_strings=False)


def write_registry(path: Path, members: Mapping[int, Member]) -> None:
    """Write that list."""
    write_private(path, registry_text(members).encode(), 0o644)


def load_registry(path: Path) -> dict[int, Member]:
    """Read the list. Raises BadInput with every entry that is malformed or shares a number or key with another."""
    try:
        rows = tomllib.loads(path.read_text("utf-8"))["member"]
    except (OSError, ValueError, KeyError) as error:
        raise BadInput.of(str(path), "is no list of registered clients", "copy it again from the server") from error
    members: dict[int, Member] = {}
    problems, seen = [], dict[Any, int]()
    for place, row in enumerate(rows if isinstance(rows, list) else [None], start=1):
        where = f"{path}: entry {place}"
        try:
            client, member = (
                row["client"],
                Member(name=row["name"], key=bytes.fromhex(row["key"]), flower=row["flower"]),
            )
            sound = type(client) is int and 0 <= client < 2**32 and len(member.key) == 32
            sound = sound and isinstance(member.name, str) and len(member.flower.split()) >= 2
        except (TypeError, KeyError, ValueError, AttributeError):
            sound = False
        if not sound:
            problems.append(Problem(where, "is no registered client", "give client, name, key (64 hex), flower"))
            continue
        for what, value in (
            ("client number", client),
            ("identity", member.key),
            ("Flower key", tuple(member.flower.split()[:2])),
        ):
            if (other := seen.setdefault((what, value), place)) != place:
                problems.append(Problem(where, f"has the {what} of entry {other}", "register each node once"))
        members[client] = member
    if problems:
        raise BadInput(problems)
    return members


def load_authority(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """The authority's key and certificate. Raises BadInput with all that is wrong with them."""
    found = _Findings()
    key, certificate = found.pair(folder, AUTHORITY)
    found.end()
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate is None:
        raise BadInput.of(str(folder), "is no authority of ours", "make it again")
    return key, certificate


def check_server(folder: Path, host: str) -> None:
    """Whether a SuperLink can start with `server.key`, `server.crt` and `ca.crt` under this host name or address.

    Raises:
        BadInput: everything that is wrong: unreadable, expired or not yet valid, the key of another certificate, not
            signed by the authority, another host, or a key that others can read.
    """
    found = _Findings()
    _, certificate = found.pair(folder, SERVER)
    root = found.certificate(folder / AUTHORITY[1])
    if certificate is not None and root is not None:
        try:
            certificate.verify_directly_issued_by(root)
        except (ValueError, TypeError, InvalidSignature):
            found.add(folder / SERVER[1], "was not signed by ca.crt", "make it with this authority's key")
    if certificate is not None and _general_name(host) not in _names(certificate):
        found.add(folder / SERVER[1], f"is not for {host}", "make it for the name that nodes connect to")
    found.end()


def load_node(folder: Path, state: Path, client: int) -> tuple[Ed25519PrivateKey, dict[int, Member]]:
    """A node's identity and its copy of the registry; checks `flower.key`, `flower.pub` and `ca.crt` in `folder` too.

    Raises:
        BadInput: everything that is wrong, a client that is not registered with these keys included.
    """
    found, members, registered = _Findings(), dict[int, Member](), None
    own = found.identity(state / IDENTITY)
    line = found.flower(folder)
    found.certificate(folder / AUTHORITY[1])
    try:
        members = load_registry(state / REGISTRY)
        registered = members.get(client)
        if registered is None:
            found.add(state / REGISTRY, f"does not list client {client}", "copy it again from the server")
    except BadInput as error:
        found.problems += error.problems
    if registered is not None:
        again = "register this node's keys, or restore the registered ones"
        if own is not None and own.public_key().public_bytes_raw() != registered.key:
            found.add(state / IDENTITY, f"is not the identity registered for client {client}", again)
        if line is not None and line.split()[:2] != registered.flower.split()[:2]:
            found.add(folder / FLOWER[0], f"is not the Flower key registered for client {client}", again)
    found.end()
    assert own is not None  # noqa: S101  # else there was a problem, and `end` raised it
    return own, members


def load_identity(path: Path) -> Ed25519PrivateKey:
    """One identity. Raises BadInput: unreadable, not Ed25519, or readable by others."""
    found = _Findings()
    key = found.identity(path)
    if key is None or found.problems:
        raise BadInput(found.problems)
    return key


class _Findings:
    """Reads keys and certificates, and collects what is wrong with them."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def add(self, path: Path, what: str, remedy: str) -> None:
        self.problems.append(Problem(str(path), what, remedy))

    def end(self) -> None:
        if self.problems:
            raise BadInput(self.problems)

    def _read(self, path: Path, *, secret: bool) -> bytes | None:
        try:
            if secret and path.stat().st_mode & 0o077:
                self.add(path, f"can be read by others (mode {path.stat().st_mode & 0o777:o})", f"chmod 600 {path}")
            return path.read_bytes()
        except OSError as error:
            self.add(path, f"cannot be read ({error.strerror})", "restore it, or make it again")
            return None

    def _key(self, path: Path, *, openssh: bool = False) -> Any:
        data = self._read(path, secret=True)
        try:
            load = serialization.load_ssh_private_key if openssh else serialization.load_pem_private_key
            return None if data is None else load(data, None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            self.add(path, "is no private key without a passphrase", "restore it, or make it again")
            return None

    def certificate(self, path: Path) -> x509.Certificate | None:
        data = self._read(path, secret=False)
        if data is None:
            return None
        try:
            found = x509.load_pem_x509_certificate(data)
        except ValueError:
            self.add(path, "is no certificate in PEM", "restore it, or make it again")
            return None
        now = dates.datetime.now(dates.UTC)
        if now >= found.not_valid_after_utc:
            self.add(path, f"expired on {found.not_valid_after_utc:%Y-%m-%d}", "make a new one")
        if now < found.not_valid_before_utc:
            self.add(path, f"is valid only from {found.not_valid_before_utc:%Y-%m-%d}", "set this machine's clock")
        return found

    def pair(self, folder: Path, names: tuple[str, str]) -> tuple[Any, x509.Certificate | None]:
        key, found = self._key(folder / names[0]), self.certificate(folder / names[1])
        if key is not None and found is not None and key.public_key() != found.public_key():
            self.add(folder / names[0], f"is not the key of {names[1]}", "restore the pair, or make it again")
        return key, found

    def identity(self, path: Path) -> Ed25519PrivateKey | None:
        key = self._key(path)
        if key is None or isinstance(key, Ed25519PrivateKey):
            return key
        self.add(path, "is not an Ed25519 key", "restore it, or make it again")
        return None

    def flower(self, folder: Path) -> str | None:
        """The public line of `flower.key`."""
        key = self._key(folder / FLOWER[0], openssh=True)
        if key is not None and not (isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp384r1"):
            self.add(folder / FLOWER[0], "is not an ECDSA P-384 key", "restore it, or make it again")
            return None
        line = None if key is None else _public_line(key)
        public = self._read(folder / FLOWER[1], secret=False)
        if line is not None and public is not None and public.split()[:2] != line.encode().split():
            self.add(folder / FLOWER[1], f"is not the public half of {FLOWER[0]}", "restore the pair")
        return line


def _free(folder: Path, names: Iterable[str], replace: bool) -> None:
    there = [folder / name for name in names if (folder / name).exists()]
    if there and not replace:
        raise BadInput(Problem(str(path), "exists", "keep it, or say that it is to be replaced") for path in there)


def _certificate(subject: x509.Name, issuer: x509.Name, key: Any, signer: Any, days: int) -> x509.CertificateBuilder:
    now = dates.datetime.now(dates.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - DAY / 24)  # the nodes' clocks may be a little behind
        .not_valid_after(now + days * DAY)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _usage(**said: bool) -> x509.KeyUsage:
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    rest = ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**{name: said.get(name, False) for name in (*names, *rest)})


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _names(certificate: x509.Certificate) -> list[x509.GeneralName]:
    try:
        return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []


def _public_line(key: ec.EllipticCurvePrivateKey) -> str:
    form = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return key.public_key().public_bytes(*form).decode()


def _write_pair(
    folder: Path, names: tuple[str, str], key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate
) -> None:
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_private(folder / names[0], private)
    write_private(folder / names[1], certificate.public_bytes(serialization.Encoding.PEM), 0o644)
