"""The sum is exact, whoever drops out; and every way in which the server could read one vector is tried.

Each attack is run twice: on the code as it is, where it must fail, and with one protection taken out, where it must
read the vector: an attack that cannot succeed shows nothing.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedcanary import rng
from fedcanary.errors import BadInput, FedcanaryError
from fedcanary.privacy import secagg, shamir
from fedcanary.privacy.secagg import Aborted, Client, Refusal, Server, Step, Terms, aggregate, crypto, decode, encode
from fedcanary.privacy.secagg import messages as wire
from fedcanary.privacy.secagg.session import COMMITTEE, open_session

LENGTH = 5


class Round:
    """One round with all parties at hand, so that a test can do to it what a hostile party would."""

    def __init__(self, n=10, client=Client, length=LENGTH, seed=0, **terms):
        random = rng.stream(seed, "secagg")
        self.registry, self.identities = secagg.register(range(n), random.bytes)
        self.terms = Terms(
            **{"round_id": "1", "contract": b"c", "registry": self.registry.digest, "length": length, **terms}
        )
        self.vectors = {i: encode(random.integers(-99, 99, length), self.terms.bits) for i in range(n)}
        self.clients = {
            i: client(i, key, self.registry, self.terms, randomness=random.bytes) for i, key in self.identities.items()
        }
        self.server = Server(self.terms, self.registry, range(n))

    def to_share(self):
        self.adverts = {i: client.advertise() for i, client in self.clients.items()}
        for i, advert in self.adverts.items():
            assert self.server.collect(i, advert)
        self.rosters = self.server.roster()
        return self.rosters

    def to_mask(self):
        self.to_share()
        self.shares = {i: self.clients[i].share(roster) for i, roster in self.rosters.items()}
        for i, message in self.shares.items():
            assert self.server.collect(i, message)
        self.deliveries = self.server.deliveries()
        return self.deliveries

    def to_agree(self, late=()):
        """Everybody masks; what the `late` send is kept from the honest part of the server."""
        self.to_mask()
        self.inputs = {i: self.clients[i].mask(d, self.vectors[i]) for i, d in self.deliveries.items()}
        for i in self.inputs.keys() - set(late):
            assert self.server.collect(i, self.inputs[i])
        self.survivors = self.server.survivor_list()
        return self.survivors

    def to_unmask(self, late=()):
        self.to_agree(late)
        for i, message in self.survivors.items():
            assert self.server.collect(i, self.clients[i].agree(message))
        self.agreements = self.server.agreements()
        return self.agreements

    def finish(self, late=()):
        self.to_unmask(late)
        self.answers = {i: self.clients[i].unmask(message) for i, message in self.agreements.items()}
        for i, message in self.answers.items():
            self.server.collect(i, message)
        return self.server.unmask()

    def plain(self, ids):
        return sum((self.vectors[i] for i in ids), np.zeros_like(self.vectors[0])) & (2**self.terms.bits - 1)

    # What a server can do with what it has been given.

    @property
    def session(self):
        return open_session(self.terms, next(iter(self.rosters.values())).ids)

    def key_seed(self, victim, answers):
        """The victim's masking key from the shares that those who think it dropped out gave."""
        near = self.session.neighbours(victim)
        shares = [(near.index(i), dict(answer.shares)[victim]) for i, answer in answers.items()]

        def right(secret):
            known = crypto.mask_secret(secret, self.terms.digest).public_key().public_bytes_raw()
            return known == self.adverts[victim].mask_key

        return shamir.recover(shares, self.session.threshold, right)[0]

    def stripped(self, victim, *, key_seed=None, own_seed=None):
        """The victim's masked vector less every mask that these seeds give."""
        vector = np.frombuffer(self.inputs[victim].values, dtype=self.terms.dtype).copy()
        pads = []
        if own_seed is not None:
            pads.append((crypto.self_key(own_seed, self.session.digest, victim), -1))
        if key_seed is not None:
            secret = crypto.mask_secret(key_seed, self.terms.digest)
            for peer in self.inputs[victim].peers:
                key = crypto.pair_key(secret, self.adverts[peer].mask_key, self.session.digest, victim, peer)
                pads.append((key, -1 if victim < peer else 1))
        crypto.add_pads(vector, pads)
        return vector


def same(a, b):
    return bool(np.array_equal(a, b))


# ------------------------------------------------------------------------------------------------------ the sum


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_sum_is_the_plain_sum_exactly_whoever_drops_out(data):
    n = data.draw(st.integers(2, 12))
    bits = data.draw(st.sampled_from([2, 7, 16, 31, 32, 33, 63, 64]))
    ids = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=n, max_size=n, unique=True))
    length = data.draw(st.integers(1, 8))
    entry = st.integers(0, 2**bits - 1)
    vectors = {i: np.array(data.draw(st.lists(entry, min_size=length, max_size=length)), dtype=np.uint64) for i in ids}
    gone = data.draw(st.lists(st.sampled_from(ids), max_size=int(0.3 * n), unique=True))
    steps = {i: data.draw(st.sampled_from(list(Step))) for i in gone}
    outcome = aggregate(vectors, bits, dropouts={s: {i for i in gone if steps[i] is s} for s in Step})
    early = {i for i in gone if steps[i] in (Step.ADVERTISE, Step.SHARE, Step.MASK)}
    assert outcome.survivors == tuple(sorted(set(ids) - early))
    plain = [sum(int(vectors[i][k]) for i in outcome.survivors) % 2**bits for k in range(length)]
    assert outcome.total.tolist() == plain
    assert outcome.signed.tolist() == [v - 2**bits if v >= 2 ** (bits - 1) else v for v in plain]
    assert not outcome.refused


@pytest.mark.parametrize("step", Step)
@pytest.mark.parametrize("n", [10, 70])
def test_thirty_percent_may_drop_out_at_any_step(n, step):
    # With 70 clients the graph is sparse and the draw could be unlucky (1 in shamir.FAILURE); the seed fixes it.
    draw = rng.stream(3, "dropouts", str(step))
    vectors = {i: draw.integers(-1000, 1000, 7) for i in range(n)}
    gone = set(draw.choice(n, size=3 * n // 10, replace=False).tolist())
    outcome = aggregate(vectors, dropouts={step: gone}, randomness=draw.bytes)
    left = set(range(n)) - (gone if step in (Step.ADVERTISE, Step.SHARE, Step.MASK) else set())
    assert set(outcome.survivors) == left
    assert outcome.signed.tolist() == sum(vectors[i] for i in left).tolist()


@pytest.mark.parametrize("step", Step)
def test_below_the_threshold_nothing_is_released(step):
    vectors = {i: np.arange(3) for i in range(10)}
    charged = []
    with pytest.raises(Aborted, match=step) as caught:
        aggregate(vectors, dropouts={step: {1, 4, 5, 8}}, before_unmasking=charged.append)
    assert (caught.value.step, caught.value.answered, caught.value.needed) == (step, 6, 7)
    assert len(charged) == (step in (Step.AGREE, Step.UNMASK))


@pytest.mark.parametrize(
    ("tolerated", "gone", "finishes"), [(0.0, 0, True), (0.34, 0, None), (0.1, 1, True), (0.1, 2, False)]
)
def test_the_tolerated_share_is_the_callers(tolerated, gone, finishes):
    # 10 clients: at 0.1 one may drop out, but never must more than 2/3 plus one answer (7 of 10)
    vectors = {i: np.arange(3) for i in range(3 if gone == 2 else 10)}

    def work():
        return aggregate(vectors, dropouts={Step.MASK: set(range(gone))}, tolerated=tolerated)

    if finishes:
        assert work().signed.tolist() == [0, 10 - gone, 2 * (10 - gone)]
    else:
        with pytest.raises(BadInput if finishes is None else Aborted):
            work()


def test_one_registration_serves_every_round():
    registry, identities = secagg.register(range(20))
    for t in range(2):
        cohort = range(10 * t, 10 * t + 10)
        outcome = aggregate(
            {i: np.array([i]) for i in cohort}, 64, round_id=str(t), registry=registry, identities=identities
        )
        assert outcome.signed.tolist() == [sum(cohort)]
    with pytest.raises(BadInput, match="clients \\[20\\] have none"):
        aggregate({i: np.array([i]) for i in (1, 2, 20)}, registry=registry, identities=identities)
    with pytest.raises(BadInput, match="without this client"):
        aggregate({20: np.array([1])}, registry=registry, identities={20: identities[0]})
    with pytest.raises(BadInput, match="or neither"):
        aggregate({1: np.array([1])}, registry=registry)


def test_one_key_cannot_be_registered_twice():
    key = secagg.register([1])[0].keys[1]
    with pytest.raises(BadInput, match="the same key"):
        secagg.Registry(keys={1: key, 2: key})


def test_an_identity_that_is_not_the_registered_one_is_left_out():
    registry, identities = secagg.register(range(10))
    stolen = {**identities, 3: Ed25519PrivateKey.generate()}
    outcome = aggregate({i: np.array([1]) for i in range(10)}, registry=registry, identities=stolen)
    assert (outcome.total.tolist(), outcome.refused) == ([9], {"bad_signature": 1})


def test_an_aborted_server_answers_nothing_more():
    round = Round()
    round.to_unmask()
    for i in range(6):
        round.server.collect(i, round.clients[i].unmask(round.agreements[i]))
    with pytest.raises(Aborted):
        round.server.unmask()
    assert not round.server.collect(6, round.clients[6].unmask(round.agreements[6]))
    with pytest.raises(FedcanaryError, match="cannot be closed"):
        round.server.unmask()


def test_the_survivors_are_known_before_anything_is_unmasked():
    seen = []
    outcome = aggregate(
        {i: np.ones(2, dtype=int) for i in range(10)}, dropouts={Step.MASK: {3}}, before_unmasking=seen.append
    )
    assert seen == [outcome.survivors] == [(0, 1, 2, 4, 5, 6, 7, 8, 9)]
    with pytest.raises(FedcanaryError, match="not known"):
        _ = Round().server.survivors


def test_a_seeded_source_makes_a_round_repeatable_and_the_default_does_not():
    def masked(seed):
        round = Round(4, seed=seed)
        round.to_agree()
        return round.inputs[0]

    assert masked(1) == masked(1) != masked(2)
    fresh = [Client(0, r.identities[0], r.registry, r.terms).advertise() for r in (Round(4), Round(4))]
    assert fresh[0].mask_key != fresh[1].mask_key


# ------------------------------------------------------------------------------------------------------ integers


def test_capacity_is_exactly_where_the_signed_sum_would_wrap():
    secagg.check_capacity(127, 1, 8)
    with pytest.raises(BadInput, match="at least 9 bits"):
        secagg.check_capacity(128, 1, 8)
    sums = {n: aggregate({i: np.array([-1, 1]) for i in range(n)}, 3).signed.tolist() for n in (3, 4)}
    assert sums == {3: [-3, 3], 4: [-4, -4]}  # 4 * 1 does not pass the check, and wraps


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(6, 64), st.data())
def test_nothing_overflows_up_to_the_largest_bound_that_passes(n, bits, data):
    """Every client at its limit, all of one sign: the sum is right, and one more in the bound is refused."""
    bound = (2 ** (bits - 1) - 1) // n
    sign = data.draw(st.sampled_from([-1, 1]))
    vectors = {i: np.array([sign * bound, 0]) for i in range(n)}
    assert aggregate(vectors, bits, bound=bound).signed.tolist() == [sign * bound * n, 0]
    if (bound + 1) * n >= 2 ** (bits - 1):
        with pytest.raises(BadInput, match="overflow"):
            aggregate(vectors, bits, bound=bound + 1)


def test_a_client_keeps_to_the_bound_itself():
    round = Round(5, bits=16, bound=100)
    round.to_mask()
    for i, entry in enumerate((101, -101)):
        with pytest.raises(BadInput, match="terms"):
            round.clients[i].mask(round.deliveries[i], encode(np.full(LENGTH, entry), 16))
    round.clients[2].mask(round.deliveries[2], encode(np.full(LENGTH, -100), 16))
    tight = Round(5, bits=16, bound=6000)  # 6 clients would overflow; the server is not the one that is asked
    roster = wire.Roster(session=tight.terms.digest, ids=wire.pack_ids(range(6)), adverts=())
    wide, identities = secagg.register(range(6))
    terms = dataclasses.replace(tight.terms, registry=wide.digest)
    client = Client(0, identities[0], wide, terms)
    client.advertise()
    with pytest.raises(Refusal, match="overflow"):
        client.share(dataclasses.replace(roster, session=terms.digest))


@given(st.integers(2, 64), st.data())
def test_encoding_is_undone_by_decoding(bits, data):
    values = np.array(data.draw(st.lists(st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), min_size=1)))
    assert secagg.decode_signed(encode(values, bits), bits).tolist() == values.tolist()


@pytest.mark.parametrize(
    "vector",
    [np.array([0.5]), np.array([[1]]), np.array([8]), np.array([-9]), np.array([16], dtype=np.uint8), np.array([True])],
)
def test_what_is_no_vector_of_the_field_is_refused(vector):
    with pytest.raises(BadInput):
        encode(vector, 4)


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(LENGTH + 1, dtype=np.uint32),
        np.zeros(LENGTH, dtype=np.uint64),
        np.zeros(LENGTH),
        np.full(LENGTH, 2**20, dtype=np.uint32),
    ],
)
def test_a_client_masks_only_what_fits_the_terms(vector):
    round = Round(3, bits=20)
    round.to_mask()
    with pytest.raises(BadInput, match="terms"):
        round.clients[0].mask(round.deliveries[0], vector)


def test_terms_name_every_problem():
    with pytest.raises(BadInput) as caught:
        Terms(
            round_id="1",
            contract=b"",
            registry=b"",
            length=0,
            bits=65,
            degree=31,
            tolerated=math.nan,
            minimum=1,
            bound=0,
        )
    assert [p.where for p in caught.value.problems] == ["length", "bits", "degree", "tolerated", "minimum", "bound"]


# ------------------------------------------------------------------------------------------------------ the graph


def session_of(n, degree=30):
    terms = Terms(round_id="g", contract=b"", registry=b"", length=1, degree=degree)
    return open_session(terms, np.arange(5, 5 + n, dtype="<u4").tobytes())


def graph_of(session):
    return {i: set(session.neighbours(i)) for i in session.ids.tolist()}


@pytest.mark.parametrize(("n", "degree"), [(64, 63), (65, 30), (66, 30), (100, 30), (101, 30), (1000, 30)])
def test_the_graph_is_regular_symmetric_and_connected(n, degree):
    graph = graph_of(session_of(n))
    assert {len(near) for near in graph.values()} == {degree}
    assert all(i in graph[j] and i != j for i, near in graph.items() for j in near)
    reached, edge = {5}, {5}
    while edge := set().union(*(graph[i] for i in edge)) - reached:
        reached |= edge
    assert len(reached) == n


def test_the_graph_is_another_one_for_another_round_or_roster():
    assert graph_of(session_of(100)) == graph_of(session_of(100))
    assert graph_of(session_of(100))[5] != graph_of(session_of(101))[5]


def smallest_cut(session, limit):
    """Clients to declare dropped so that a few are cut off, each still with as many neighbours as it insists on."""
    graph = graph_of(session)
    inside = {5}
    while len(inside) < limit:
        border = set().union(*(graph[i] for i in inside)) - inside
        if all(1 + len(graph[i] & inside) >= session.threshold for i in inside):
            return len(border)
        inside.add(min(border, key=lambda j: (len(graph[j] - inside - border), -len(graph[j] & inside), j)))
    return len(border)


def test_no_small_group_can_be_cut_off_within_the_tolerated_dropouts():
    session = session_of(400)
    assert smallest_cut(session, 60) > 0.3 * 400
    ring = dataclasses.replace(session, offsets=np.array([*range(1, 16), *range(-15, 0)]))
    assert smallest_cut(ring, 60) == 30  # the planted bug: neighbours next to each other on the ring


def test_a_cube_of_offsets_cannot_be_cut_off():
    """32 clients whose neighbours outside are all declared dropped: each has five left, which recover a secret."""
    session = session_of(10_000)
    steps = [session.offsets[session.offsets > 0][:-1][i] for i in range(5)]
    places = {int(sum(chosen)) % 10_000 for k in range(6) for chosen in itertools.combinations(steps, k)}
    cube = set(session.ids[session.order[sorted(places)]].tolist())
    near = {i: set(session.neighbours(i)) for i in cube}
    border = set().union(*near.values()) - cube
    left = min(len(near[i] & cube) for i in cube)
    assert (len(cube), len(border) <= 0.3 * 10_000) == (32, True)
    assert session.threshold - 1 <= left < session.near  # the first alone would let it happen


def test_a_client_with_fewer_than_half_of_its_neighbours_goes_no_further():
    round = Round(70)
    round.to_agree()
    near = round.session.neighbours(0)
    for lost, signs in ((15, True), (16, False)):
        client = copy.copy(round.clients[0])
        told = wire.pack_ids(sorted(set(range(70)) - set(near[:lost])))
        message = dataclasses.replace(round.survivors[0], ids=told)
        assert 1 + 30 - lost >= round.session.threshold
        if signs:
            client.agree(message)
        else:
            with pytest.raises(Refusal, match="too_few_survivors"):
                client.agree(message)


@pytest.mark.parametrize("n", [*range(2, 140), 200, 1000, 20_000])
def test_two_sets_of_survivors_cannot_both_get_a_quorum(n):
    dropped = int(0.3 * n)
    members = min(n, COMMITTEE)
    quorum = shamir.threshold(n, members, dropped)
    assert members < 2 * quorum <= 2 * members
    if n <= COMMITTEE:
        assert quorum == shamir.threshold(n, n, dropped) == min(2 * n // 3 + 1, n - dropped)


def test_the_threshold_is_the_largest_that_dropouts_allow():
    for population, holders, trials in ((99, 30, 100), (199, 30, 200), (9999, 30, 10_000), (999, 60, 1000)):
        dropped = int(0.3 * population)
        t = shamir.threshold(population, holders, dropped, trials)
        left = stats.hypergeom(population, population - dropped, holders)
        assert trials * left.cdf(t - 1) <= 1 / shamir.FAILURE < trials * left.cdf(t)


# ------------------------------------------------------------------------------------------------ one masked vector


def test_a_masked_vector_says_nothing_of_its_input():
    """Chi-square of 200,000 bytes against uniform: a correct program fails with probability 1e-6 for a fresh seed."""
    inputs = []
    for seed in (1, 2):
        round = Round(3, length=50_000, seed=seed)
        round.vectors[0] = np.zeros(50_000, dtype=np.uint32)  # whatever is seen in the output is the mask's
        round.to_agree()
        inputs.append(np.frombuffer(round.inputs[0].values, dtype=np.uint8))
    for seen in (*inputs, inputs[0] - inputs[1]):
        assert stats.chisquare(np.bincount(seen, minlength=256)).pvalue > 1e-6
    assert np.mean(inputs[0] == inputs[1]) < 0.006  # 1 in 256 by chance


class NoOwnMask(Client):
    """Planted bug: no mask of its own."""

    def _pads(self):
        return itertools.islice(super()._pads(), 1, None)


class OnlyOwnMask(Client):
    """Planted bug: no masks with its neighbours."""

    def _pads(self):
        return itertools.islice(super()._pads(), 1)


@pytest.mark.parametrize(("client", "read"), [(Client, False), (NoOwnMask, True)])
def test_a_late_message_is_protected_by_the_own_mask(client, read):
    """The server has the victim's input, says it came too late, and is given the key of the victim's pairwise masks."""
    round = Round(10, client=client)
    round.finish(late=[3])
    assert 3 not in round.server.survivors
    seed = round.key_seed(3, round.answers)
    assert seed is not None
    assert same(round.stripped(3, key_seed=seed), round.vectors[3]) is read


@pytest.mark.parametrize(("client", "read"), [(Client, False), (OnlyOwnMask, True)])
def test_the_pairwise_masks_protect_who_is_in_the_sum(client, read):
    """Every survivor's own seed is given to the server."""
    round = Round(10, client=client)
    round.finish()
    assert same(round.stripped(3, own_seed=round.answers[3].seed), round.vectors[3]) is read


def test_a_client_without_one_kind_of_mask_breaks_the_sum():
    for client in (NoOwnMask, OnlyOwnMask):
        round = Round(6)
        round.clients[2] = client(2, round.identities[2], round.registry, round.terms)
        assert not same(round.finish(), round.plain(range(6)))


class Trusting(Client):
    """Planted bug: believes that the others were told of the same survivors."""

    def _check_quorum(self, signatures):
        pass


@pytest.mark.parametrize(("client", "read"), [(Client, False), (Trusting, True)])
def test_no_server_gets_both_kinds_of_share_by_telling_of_two_sets_of_survivors(client, read):
    """Seven are told that the victim dropped out, it and two others that it did not; all who will, unmask."""
    victim = 9
    round = Round(10, client=client)
    round.to_agree()
    ids = [wire.pack_ids(range(9 if i < 7 else 10)) for i in range(10)]
    told = {i: dataclasses.replace(round.survivors[i], ids=ids[i]) for i in range(10)}
    signed = {i: round.clients[i].agree(message).signature for i, message in told.items()}
    answers, refusals = {}, {}
    for i in range(10):
        mine = tuple((j, s) for j, s in signed.items() if ids[j] == ids[i])
        try:
            answers[i] = round.clients[i].unmask(wire.Agreements(session=round.session.digest, signatures=mine))
        except Refusal as refusal:
            refusals[i] = refusal.reason
    key_seed = round.key_seed(victim, {i: answers[i] for i in range(7)})
    own_seed = answers[victim].seed if victim in answers else None
    assert refusals == ({} if read else dict.fromkeys((7, 8, 9), "no_agreement"))
    assert same(round.stripped(victim, key_seed=key_seed, own_seed=own_seed), round.vectors[victim]) is read


class Credulous(Client):
    """Planted bug: believes that whoever it masked with has masked with it."""

    def _masked_with_me(self, near, acks):
        return near


@pytest.mark.parametrize(("client", "read"), [(Client, False), (Credulous, True)])
def test_no_server_makes_a_victim_mask_only_with_those_who_will_be_declared_dropped(client, read):
    """No client colludes. The victim is told of 15 neighbours, the others of all, and then that those 15 dropped out.

    The others have a mask with the victim, so nothing they see is wrong, and its own mask's seed is theirs to give.
    """
    round, victim = Round(70, client=client), 7
    round.to_mask()
    dropped = set(round.session.neighbours(victim)[:15])
    told = tuple(row for row in round.deliveries[victim].sealed if row[0] in dropped)
    round.deliveries[victim] = dataclasses.replace(round.deliveries[victim], sealed=told)
    round.inputs = {i: round.clients[i].mask(d, round.vectors[i]) for i, d in round.deliveries.items()}
    left = sorted(round.inputs.keys() - dropped)
    ids, signed = wire.pack_ids(left), {}
    for i in left:
        acks = tuple((j, dict(round.inputs[j].acks)[i]) for j in left if i in round.inputs[j].peers)
        with contextlib.suppress(Refusal):  # some have lost too many neighbours; the victim sees that it was lied to
            signed[i] = round.clients[i].agree(wire.Survivors(session=round.session.digest, ids=ids, acks=acks))
    assert len(signed) >= round.session.quorum and victim not in signed
    rows = tuple((i, message.signature) for i, message in signed.items())
    agreements = wire.Agreements(session=round.session.digest, signatures=rows)
    answers = {i: dict(round.clients[i].unmask(agreements).shares) for i in signed}

    def secret_of(i, right):
        near = round.session.neighbours(i)
        shares = [(near.index(j), answers[j][i]) for j in near if i in answers.get(j, ())]
        return shamir.recover(shares, round.session.threshold, right)[0]

    own = secret_of(
        victim, lambda s: crypto.commitment(s, round.terms.digest, victim) == round.adverts[victim].commitment
    )
    vector = np.frombuffer(round.inputs[victim].values, dtype=round.terms.dtype).copy()
    pads = [] if own is None else [(crypto.self_key(own, round.session.digest, victim), -1)]
    for i in dropped:
        public = round.adverts[i].mask_key
        seed = secret_of(
            i, lambda s, i=i, p=public: crypto.mask_secret(s, round.terms.digest).public_key().public_bytes_raw() == p
        )
        secret = crypto.mask_secret(seed, round.terms.digest)
        key = crypto.pair_key(secret, round.adverts[victim].mask_key, round.session.digest, i, victim)
        pads.append((key, -1 if victim < i else 1))
    crypto.add_pads(vector, pads)
    assert (own is not None) is same(vector, round.vectors[victim]) is read


def test_a_client_gives_one_kind_of_share_once():
    round = Round(10)
    round.finish(late=[3])
    with pytest.raises(Refusal, match="wrong_step"):
        round.clients[0].unmask(round.agreements[0])
    with pytest.raises(Refusal, match="wrong_step"):
        round.clients[0].agree(dataclasses.replace(round.survivors[0], ids=wire.pack_ids(range(10))))
    both = {peer: len(share) for peer, share in round.answers[0].shares}
    assert both == {peer: shamir.SEED for peer in range(1, 10)}  # one share for each, never two


@pytest.mark.parametrize(("threshold", "holders"), [(1, 1), (2, 3), (7, 30), (43, 64), (3, 300)])
def test_shares_are_those_of_the_library(monkeypatch, threshold, holders):
    draw = rng.stream(8, "shamir", str(holders))
    stream, secret = draw.bytes(16 * (threshold - 1)), draw.bytes(16)
    parts = iter([stream[i : i + 16] for i in range(0, len(stream), 16)])
    monkeypatch.setattr(shamir.os, "urandom", lambda size: stream)
    monkeypatch.setattr("Crypto.Protocol.SecretSharing.rng", lambda size: next(parts))
    expected = [piece for _, piece in shamir.Shamir.split(threshold, holders, secret)]
    assert shamir.share(secret, threshold, holders) == expected


def test_shares_below_the_threshold_recover_nothing():
    secret = bytes(range(16))
    shares = list(enumerate(shamir.share(secret, 4, 6)))
    for chosen in itertools.combinations(shares, 4):
        assert shamir.recover(chosen, 4, lambda s: s == secret) == (secret, 0)
    for chosen in itertools.combinations(shares, 3):
        assert shamir.recover(chosen, 4, lambda s: True) == (None, 0)
        assert shamir.recover(chosen, 3, lambda s: s == secret)[0] is None


# ------------------------------------------------------------------------------------------------------ registration


def made_up(round, victim):
    """The server in the place of everybody but the victim: made-up signing keys, its own masking keys."""
    keys = {i: Ed25519PrivateKey.generate() for i in round.clients if i != victim}
    for i, key in keys.items():
        round.clients[i] = Client(i, key, round.registry, round.terms)
        round.vectors[i] = np.zeros_like(round.vectors[i])


def test_keys_made_by_the_server_are_refused():
    round = Round(6)
    made_up(round, victim=2)
    adverts = {i: client.advertise() for i, client in round.clients.items()}
    assert round.server.collect(2, adverts[2])
    assert not round.server.collect(0, adverts[0])  # the honest part of the server would not take them either
    assert round.server.refused == {"bad_signature": 1}
    near = tuple((i, adverts[i].to_bytes()) for i in range(6) if i != 2)
    roster = wire.Roster(session=round.terms.digest, ids=wire.pack_ids(range(6)), adverts=near)
    with pytest.raises(Refusal, match="not signed by its registered key"):
        round.clients[2].share(roster)


def test_without_that_check_the_server_reads_the_vector(monkeypatch):
    for side in ("client", "server"):
        monkeypatch.setattr(f"fedcanary.privacy.secagg.{side}.verified", lambda *_: True)
    round = Round(6)
    made_up(round, victim=2)
    assert same(round.finish(), round.vectors[2])


def roster_with(round, ids=None, adverts=None):
    real = round.rosters[0]
    return dataclasses.replace(
        real,
        ids=real.ids if ids is None else np.array(ids, dtype="<u4").tobytes(),
        adverts=real.adverts if adverts is None else tuple(adverts),
    )


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda r, a: roster_with(r, ids=[*range(10), 77]), "bad_roster"),  # not registered
        (lambda r, a: roster_with(r, ids=[0, 0, *range(1, 10)]), "bad_roster"),  # twice
        (lambda r, a: roster_with(r, ids=range(1, 10)), "bad_roster"),  # without the receiver
        (lambda r, a: roster_with(r, ids=[0], adverts=[]), "bad_roster"),  # alone
        (lambda r, a: roster_with(r, adverts=a[:3]), "bad_roster"),  # fewer neighbours than the roster gives it
        (lambda r, a: roster_with(r, ids=range(3), adverts=a[:2]), "bad_roster"),  # fewer than the contract's floor
        (lambda r, a: roster_with(r, adverts=[a[0], *a[:-1]]), "bad_roster"),  # one twice
        (lambda r, a: roster_with(r, adverts=[(1, a[1][1]), *a[1:]]), "bad_advert"),  # another's advert
        (lambda r, a: roster_with(r, adverts=[(1, other_round(r)), *a[1:]]), "bad_advert"),
        (lambda r, a: roster_with(r, adverts=[(1, swapped_key(r)), *a[1:]]), "bad_signature"),
        (lambda r, a: roster_with(r, adverts=[(1, a[0][1][:-1]), *a[1:]]), "malformed"),
        (lambda r, a: dataclasses.replace(r.rosters[0], session=bytes(32)), "wrong_round"),
    ],
)
def test_a_client_refuses_a_wrong_roster_and_then_everything(spoil, reason):
    round = Round(minimum=5)
    round.to_share()
    with pytest.raises(Refusal) as caught:
        round.clients[0].share(spoil(round, round.rosters[0].adverts))
    assert caught.value.reason == reason
    with pytest.raises(Refusal, match="wrong_step"):
        round.clients[0].share(round.rosters[0])


def other_round(round):
    terms = dataclasses.replace(round.terms, round_id="2")
    return Client(1, round.identities[1], round.registry, terms).advertise().to_bytes()


def swapped_key(round):
    return dataclasses.replace(round.adverts[1], mask_key=round.adverts[2].mask_key).to_bytes()


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (range(1, 10), "bad_survivors"),  # without the receiver
        ([*range(10), 11], "bad_survivors"),  # not on the roster
        ([*range(9), 8], "bad_survivors"),  # twice
        (range(6), "too_few_survivors"),
    ],
)
def test_a_client_signs_no_impossible_survivors(ids, reason):
    round = Round(10)
    round.to_agree()
    with pytest.raises(Refusal) as caught:
        round.clients[0].agree(dataclasses.replace(round.survivors[0], ids=np.array(list(ids), dtype="<u4").tobytes()))
    assert caught.value.reason == reason


def test_a_client_signs_no_survivor_that_it_has_no_mask_with():
    round = Round(10)
    round.to_mask()
    fewer = dataclasses.replace(round.deliveries[0], sealed=round.deliveries[0].sealed[1:])
    round.clients[0].mask(fewer, round.vectors[0])
    everybody = wire.Survivors(session=round.session.digest, ids=wire.pack_ids(range(10)), acks=())
    with pytest.raises(Refusal, match="bad_survivors"):
        round.clients[0].agree(everybody)


def test_a_client_masks_nothing_with_fewer_neighbours_than_the_threshold():
    round = Round(10)
    round.to_mask()
    fewer = dataclasses.replace(round.deliveries[0], sealed=round.deliveries[0].sealed[:5])
    with pytest.raises(Refusal, match="too_few_neighbours"):
        round.clients[0].mask(fewer, round.vectors[0])


# ------------------------------------------------------------------------------------------------------ hostile input


def every_message():
    round = Round(5)
    round.finish()
    down = [table[0] for table in (round.rosters, round.deliveries, round.survivors, round.agreements)]
    signed = wire.Agreement(session=round.session.digest, client=0, signature=bytes(64))
    return [round.adverts[0], round.shares[0], round.inputs[0], signed, round.answers[0], *down]


MESSAGES = every_message()


def test_every_message_survives_bytes():
    assert {type(m) for m in MESSAGES} == set(wire.MESSAGES)
    for message in MESSAGES:
        assert decode(message.to_bytes()) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_cut_or_longer_bytes_are_malformed(message):
    data = message.to_bytes()
    for bad in (*(data[:k] for k in range(0, len(data), 7)), data + b"\0", b"\x02" + data[1:], data[:1] + b"\x09"):
        with pytest.raises(Refusal, match="malformed"):
            decode(bad)


@given(st.binary(max_size=60), st.integers(0, 8))
def test_no_bytes_make_decoding_fail_otherwise(data, tag):
    for content in (data, bytes([secagg.terms.VERSION, tag]) + data):
        try:
            assert decode(content).to_bytes() == content
        except Refusal as refusal:
            assert refusal.reason == "malformed"


def masked(round, **changes):
    return dataclasses.replace(round.inputs[0], **changes)


@pytest.mark.parametrize(
    ("sender", "spoil", "reason"),
    [
        (0, lambda r: masked(r, values=bytes(4 * LENGTH - 4)), "wrong_length"),
        (0, lambda r: masked(r, values=bytes(8 * LENGTH)), "wrong_length"),  # uint64 where uint32 was agreed
        (0, lambda r: masked(r, values=b"\xff" * 4 * LENGTH), "outside_field"),
        (0, lambda r: masked(r, session=bytes(32)), "wrong_round"),
        (0, lambda r: masked(r, acks=((0, bytes(16)),)), "bad_peers"),
        (0, lambda r: masked(r, acks=((1, bytes(16)), (99, bytes(16)))), "bad_peers"),
        (0, lambda r: masked(r, acks=r.inputs[0].acks + r.inputs[0].acks[:1]), "bad_peers"),
        (0, lambda r: masked(r, acks=((1, bytes(17)),)), "wrong_length"),
        (0, lambda r: r.inputs[1], "wrong_sender"),
        (0, lambda r: r.shares[0], "wrong_step"),
        (0, lambda r: r.deliveries[0], "wrong_step"),
        (0, lambda r: r.inputs[0].to_bytes()[:-3], "malformed"),
        (77, lambda r: masked(r, client=77), "unknown_client"),
        (1, lambda r: r.inputs[1], "duplicate"),
    ],
)
def test_hostile_inputs_are_dropped_and_counted_and_the_round_goes_on(sender, spoil, reason):
    round = Round(10, bits=20)
    round.to_mask()
    round.inputs = {i: round.clients[i].mask(d, round.vectors[i]) for i, d in round.deliveries.items()}
    for i in range(1, 10):
        assert round.server.collect(i, round.inputs[i].to_bytes())
    assert not round.server.collect(sender, spoil(round))
    assert round.server.refused == {reason: 1}
    survivors = round.server.survivor_list()
    assert round.server.survivors == tuple(range(1, 10))
    for i in survivors:
        round.server.collect(i, round.clients[i].agree(survivors[i]))
    for i, message in round.server.agreements().items():
        round.server.collect(i, round.clients[i].unmask(message))
    assert same(round.server.unmask(), round.plain(range(1, 10)))


def test_hostile_adverts_and_shares_are_dropped_and_counted():
    round = Round(10)
    adverts = {i: client.advertise() for i, client in round.clients.items()}
    replayed = decode(other_round(round))
    low_order = dataclasses.replace(adverts[2], mask_key=bytes(32))
    low_order = dataclasses.replace(low_order, signature=round.identities[2].sign(low_order.signed()))
    for i, advert in ((1, replayed), (2, low_order)):
        assert not round.server.collect(i, advert)
    for i in (0, *range(3, 10)):
        assert round.server.collect(i, adverts[i])
    rosters = round.server.roster()
    message = round.clients[0].share(rosters[0])
    overlong = tuple((peer, sealed + bytes(10_000)) for peer, sealed in message.sealed)
    assert not round.server.collect(0, dataclasses.replace(message, sealed=message.sealed[1:]))
    assert not round.server.collect(0, dataclasses.replace(message, sealed=overlong))
    assert round.server.refused == {"wrong_round": 1, "bad_key": 1, "wrong_recipients": 1, "wrong_length": 1}


def test_tampered_shares_cost_the_client_that_sent_them():
    round = Round(10)
    round.to_share()
    for i, roster in round.rosters.items():
        message = round.clients[i].share(roster)
        if i == 4:
            spoiled = tuple((p, s[:-1] + bytes([s[-1] ^ 1])) for p, s in message.sealed)
            message = dataclasses.replace(message, sealed=spoiled)
        round.server.collect(i, message)
    for i, delivery in round.server.deliveries().items():
        round.server.collect(i, round.clients[i].mask(delivery, round.vectors[i]))
    survivors = round.server.survivor_list()
    rest = [i for i in range(10) if i != 4]
    assert round.server.survivors == tuple(rest)
    assert all(round.clients[i].refused == {"tampered": 1} for i in rest)
    for i in rest:
        round.server.collect(i, round.clients[i].agree(survivors[i]))
    for i, message in round.server.agreements().items():
        round.server.collect(i, round.clients[i].unmask(message))
    assert same(round.server.unmask(), round.plain(rest))
    assert round.server.refused == {"one_sided_mask": 1}


def with_false_acks(stays):
    """Client 4 shows nobody that it masked with them."""
    round = Round(10)
    round.to_mask()
    for i, delivery in round.deliveries.items():
        message = round.clients[i].mask(delivery, round.vectors[i])
        lie = dataclasses.replace(message, acks=tuple((peer, bytes(16)) for peer, _ in message.acks))
        assert round.server.collect(i, lie if i == 4 else message)
    for i, message in round.server.survivor_list().items():
        round.server.collect(i, round.clients[i].agree(message))
    for i, message in round.server.agreements().items():
        if stays or i != 4:
            assert round.server.collect(i, round.clients[i].unmask(message))
    assert all(client.refused == ({} if i == 4 else {"no_mutual_mask": 1}) for i, client in round.clients.items())
    return round


def test_false_acks_are_counted_and_the_round_goes_on():
    round = with_false_acks(stays=True)
    assert same(round.server.unmask(), round.plain(range(10)))
    with pytest.raises(Aborted, match="0 shares of a client's secret"):
        with_false_acks(stays=False).server.unmask()


def test_a_share_of_another_sender_or_round_does_not_open():
    round, other = Round(10), Round(10, round_id="2")
    round.to_mask()
    other.to_mask()
    rows = dict(round.deliveries[0].sealed)
    rows[1], rows[2], rows[3] = rows[2], dict(other.deliveries[0].sealed)[2], b""
    extra = ((4, rows[4]), (77, rows[4]))
    delivery = dataclasses.replace(round.deliveries[0], sealed=(*rows.items(), *extra))
    answer = round.clients[0].mask(delivery, round.vectors[0])
    assert round.clients[0].refused == {"tampered": 3, "duplicate": 1, "unknown_client": 1}
    assert answer.peers == {4, 5, 6, 7, 8, 9}


def with_false_shares(late, liars):
    round = Round(10)
    round.to_unmask(late)
    for i, message in round.agreements.items():
        answer = round.clients[i].unmask(message)
        if i in liars:
            answer = dataclasses.replace(answer, shares=tuple((peer, bytes(16)) for peer, _ in answer.shares))
        assert round.server.collect(i, answer)
    return round


def test_a_false_share_is_found_and_done_without():
    round = with_false_shares(late=[9], liars=[4])
    assert same(round.server.unmask(), round.plain(range(9)))
    assert round.server.refused == {"false_share": 1}


def test_more_false_shares_than_can_be_done_without_stop_the_round():
    with pytest.raises(Aborted, match="shares of a client's secret"):
        with_false_shares(late=[9], liars=[1, 4, 7]).server.unmask()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seed": bytes(16)}, "bad_seed"),
        ({"shares": ((0, bytes(16)),)}, "bad_shares"),
        ({"shares": ((1, bytes(16)), (1, bytes(16)))}, "bad_shares"),
        ({"shares": tuple((i, b"short") for i in range(1, 10))}, "bad_shares"),
    ],
)
def test_wrong_answers_at_the_last_step_are_dropped(changes, reason):
    round = Round(10)
    round.to_unmask()
    for i, message in round.agreements.items():
        answer = round.clients[i].unmask(message)
        round.server.collect(i, dataclasses.replace(answer, **changes) if i == 0 else answer)
    assert round.server.refused == {reason: 1}
    assert same(round.server.unmask(), round.plain(range(10)))  # its shares are with the others


def test_false_signatures_do_not_make_a_quorum():
    round = Round(10)
    round.to_agree()
    for i in range(7):
        assert round.server.collect(i, round.clients[i].agree(round.survivors[i]))
    forged = wire.Agreement(session=round.session.digest, client=7, signature=bytes(64))
    assert not round.server.collect(7, forged)
    rows = round.server.agreements()[0].signatures
    spoiled = (*rows[:-1], (9, rows[0][1]), (77, rows[0][1]), rows[0])
    with pytest.raises(Refusal, match="no_agreement"):
        round.clients[0].unmask(wire.Agreements(session=round.session.digest, signatures=spoiled))
    assert round.clients[0].refused == {"bad_signature": 2}
