"""Certificates that TLS accepts, keys that only their owner reads, and one error for all that is wrong with them."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from fedcanary.engines.flower import certificates
from fedcanary.engines.flower.certificates import Member
from fedcanary.errors import BadInput
from fedcanary.privacy.secagg import Registry


@pytest.fixture
def issued(tmp_path: Path) -> Path:
    """An authority and a SuperLink's certificate in one folder."""
    certificates.authority(tmp_path)
    certificates.server(tmp_path, tmp_path, ["link.example", "10.0.0.7"])
    return tmp_path


def node(place: Path, client: int = 3) -> dict[int, Member]:
    state = place / "state"
    state.mkdir(parents=True)
    key, line = certificates.identity(state), certificates.flower_key(place, "node")
    members = {client: Member(name="node-003", key=key, flower=line)}
    certificates.write_registry(state / certificates.REGISTRY, members)
    certificates.authority(place)
    return members


def handshake(server: Path, authority: Path, host: str) -> None:
    """TLS in memory: raises ssl.SSLError where the client does not accept the server."""
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(server / "server.crt", server / "server.key")
    theirs = ssl.create_default_context(cafile=str(authority / "ca.crt"))
    theirs.verify_flags |= ssl.VERIFY_X509_STRICT
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    one, other = ours.wrap_bio(up, down, server_side=True), theirs.wrap_bio(down, up, server_hostname=host)
    done: set[int] = set()
    while len(done) < 2:
        for side in (other, one):
            try:
                side.do_handshake()
                done.add(id(side))
            except ssl.SSLWantReadError:
                pass


def said(call, *arguments) -> str:
    with pytest.raises(BadInput) as caught:
        call(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("host", ["link.example", "10.0.0.7"])
def test_a_client_with_the_authoritys_certificate_accepts_the_server(issued, host):
    handshake(issued, issued, host)
    certificates.check_server(issued, host)


def test_another_host_or_another_authority_is_not_accepted(issued, tmp_path):
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(issued, issued, "other.example")
    (tmp_path / "second").mkdir()
    certificates.authority(tmp_path / "second")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(issued, tmp_path / "second", "link.example")


def test_a_servers_certificate_is_no_authority(issued, tmp_path):
    """Who holds the server's key cannot make certificates for others."""
    rogue = tmp_path / "rogue"
    rogue.mkdir()
    (rogue / "ca.key").write_bytes((issued / "server.key").read_bytes())
    (rogue / "ca.key").chmod(0o600)
    (rogue / "ca.crt").write_bytes((issued / "server.crt").read_bytes())
    certificates.server(rogue, rogue, ["link.example"])
    chain = (rogue / "server.crt").read_bytes() + (issued / "server.crt").read_bytes()
    (rogue / "server.crt").write_bytes(chain)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(rogue, issued, "link.example")


def test_private_keys_are_their_owners_alone_and_never_overwritten(issued, tmp_path):
    place = tmp_path / "n"
    node(place)
    keys = [issued / "ca.key", issued / "server.key", place / "flower.key", place / "state" / "identity.pem"]
    assert [key.stat().st_mode & 0o777 for key in keys] == [0o600] * 4
    before = [key.read_bytes() for key in keys]
    assert said(certificates.authority, issued).count("exists") == 2
    assert "exists" in said(certificates.server, issued, issued, ["x"])
    assert "exists" in said(certificates.flower_key, place, "x")
    assert "exists" in said(certificates.identity, place / "state")
    assert [key.read_bytes() for key in keys] == before
    certificates.authority(issued, replace=True)
    assert keys[0].read_bytes() != before[0]


def test_everything_wrong_with_a_server_is_in_one_error(issued, tmp_path):
    (tmp_path / "second").mkdir()
    certificates.authority(tmp_path / "second")
    certificates.server(tmp_path / "second", tmp_path / "second", ["link.example"], days=0)
    for name in ("server.crt", "server.key"):
        (tmp_path / "second" / name).replace(issued / f"new-{name}")
    (issued / "new-server.crt").replace(issued / "server.crt")  # expired, another authority's, and the key is not its
    (issued / "server.key").chmod(0o640)
    text = said(certificates.check_server, issued, "elsewhere")
    for part in ("mode 640", "chmod 600", "expired on", "not the key of", "not signed by", "not for elsewhere"):
        assert part in text
    (issued / "server.key").write_text("nonsense")
    (issued / "ca.crt").unlink()
    text = said(certificates.check_server, issued, "link.example")
    assert "no private key" in text
    assert "cannot be read" in text


def test_a_nodes_keys_are_those_that_are_registered(tmp_path):
    members = node(tmp_path / "a")
    key, listed = certificates.load_node(tmp_path / "a", tmp_path / "a" / "state", 3)
    assert listed == members
    assert key.public_key().public_bytes_raw() == members[3].key
    assert Registry(keys={c: m.key for c, m in listed.items()}).keys[3] == members[3].key
    assert "does not list client 4" in said(certificates.load_node, tmp_path / "a", tmp_path / "a" / "state", 4)
    node(tmp_path / "b")
    registry = tmp_path / "b" / "state" / certificates.REGISTRY
    registry.write_bytes((tmp_path / "a" / "state" / certificates.REGISTRY).read_bytes())
    (tmp_path / "b" / "flower.pub").write_bytes((tmp_path / "a" / "flower.pub").read_bytes())
    (tmp_path / "b" / "state" / "identity.pem").chmod(0o604)
    text = said(certificates.load_node, tmp_path / "b", tmp_path / "b" / "state", 3)
    for part in ("not the identity registered", "not the Flower key registered", "not the public half", "mode 604"):
        assert part in text
    (tmp_path / "b" / "state" / "identity.pem").write_bytes((tmp_path / "a" / "ca.key").read_bytes())
    (tmp_path / "b" / "state" / "identity.pem").chmod(0o600)
    assert "not an Ed25519 key" in said(certificates.load_identity, tmp_path / "b" / "state" / "identity.pem")


def test_a_registry_with_one_key_twice_or_malformed_entries_is_refused_with_all_of_them(tmp_path):
    member = node(tmp_path / "a")[3]
    other = node(tmp_path / "b")[3]
    path = tmp_path / "registry.toml"
    certificates.write_registry(path, {0: member, 1: other})
    assert certificates.load_registry(path) == {0: member, 1: other}
    certificates.write_registry(path, {0: member, 1: member})
    text = said(certificates.load_registry, path)
    assert "entry 2: has the identity of entry 1" in text
    assert "entry 2: has the Flower key of entry 1" in text
    good = path.read_text()
    path.write_text(good + '[[member]]\nclient = 0\nname = "x"\nkey = "ab"\nflower = ""\n[[member]]\nclient = 5\n')
    text = said(certificates.load_registry, path)
    assert "entry 3: is no registered client" in text
    assert "entry 4: is no registered client" in text
    path.write_text("nonsense")
    assert "no list" in said(certificates.load_registry, path)
