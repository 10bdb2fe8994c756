"""Attack on whole rounds through the real door: `seal`, `Gate` and the charge it writes, under every trust.

What is held against the attack is the epsilon of the charges that the gate itself wrote down. Rounds without masks
replace `secagg.aggregate`, and nothing else, by the plain sum that it is equal to (shown below). Draws are seeded, so
these tests always give the same answer, except where noise from the operating system is said: there a correct program
fails with the probability that is stated. Planted bugs must be found.
"""

from __future__ import annotations

import numpy as np
import pytest
from rounds import DELTA, EPSILON, layout, plain_sum, play, projections, terms_for

from audit import epsilon_lower_bound, one_run_lower_bound
from fedcanary.privacy import secagg
from fedcanary.privacy.release import Gate
from fedcanary.privacy.seal import READINGS, UPDATE, Message, seal
from fedcanary.rng import stream
from fedcanary.types import Coord

TRUSTS = ("secure_aggregation", "central", "local")
CLIENTS, ROUNDS, GUESSES = 16, 96, 160  # 1,536 canaries
BULK = 0.1  # a second delta of the same guarantee, where two samples bound most with few trials
SURE = 0.999
by_trust = pytest.mark.parametrize("trust", TRUSTS)


def rounds(trust, seed=1, update=False, n=ROUNDS, clients=CLIENTS, **how):
    return play(terms_for(trust, clients, seed, update), rounds=n, clients=clients, seed=seed, **how)


def one_run(seen) -> float:
    return one_run_lower_bound(seen.coins, seen.scores, GUESSES, DELTA)


def test_the_plain_sum_of_these_tests_is_what_secure_aggregation_gives(monkeypatch):
    """The very same releases and charges, noised updates and all."""
    terms, size, both = terms_for("secure_aggregation", 7, 5, update=True), layout(9), []
    for aggregate in (secagg.aggregate, plain_sum):
        monkeypatch.setattr(secagg, "aggregate", aggregate)
        charges = []
        gate = Gate(1, size, terms, charges.append, run="one")
        for client in range(9):
            said = stream(5, "said", client).uniform(-4, 4, 18)
            message = Message(readings={"probe": said[:9]}, update=np.append(said[9:], 1.0))
            gate.put(client, seal(message, size, terms, 1, client))
        both.append((charges, gate.close()))
    (charges, masked), (same, plain) = both
    assert charges == same
    for name in masked:
        np.testing.assert_array_equal(masked[name].total, plain[name].total)
        np.testing.assert_array_equal(masked[name].noise_std, plain[name].noise_std)
        assert masked[name].count == plain[name].count


# --- one run, many canaries (Steinke et al. 2023)


@by_trust
@pytest.mark.parametrize("loud", [1.0, 4.0])
def test_a_real_run_keeps_its_epsilon(trust, loud):
    """1,536 canaries in 96 rounds, seed 1; messages of the norm cap, and four times too long before they are shrunk."""
    seen = rounds(trust, loud=loud)
    assert len(seen.coins) == ROUNDS * CLIENTS
    assert seen.refused == 0
    assert seen.stated(DELTA) == pytest.approx(EPSILON, rel=1e-3)
    assert one_run(seen) <= EPSILON


@by_trust
@pytest.mark.parametrize("plant", [{"noise": 0.25}, {"metrics": True}], ids=["noise/4", "metrics leave in clear"])
def test_a_planted_bug_is_found_in_one_run(trust, plant):
    seen = rounds(trust, plant=plant)
    assert seen.stated(DELTA) == pytest.approx(EPSILON, rel=1e-3)  # the charge does not know
    assert one_run(seen) > 1.3 * EPSILON


@pytest.mark.parametrize(
    "plant", [{"silent": 15}, {"silent": 16}, {"believed": 16}], ids=["1 of 16 adds a share", "none does", "noise/4"]
)
def test_forgotten_shares_are_found_in_one_run(plant):
    """`believed`: every client draws its share as one of sixteen times as many. Fewer silent clients: see below."""
    assert one_run(rounds("secure_aggregation", plant=plant)) > 1.5 * EPSILON


def test_an_unclipped_client_is_found_and_where_the_server_sees_it_its_message_is_dropped():
    for trust in ("secure_aggregation", "local"):
        assert one_run(rounds(trust, loud=4.0, plant={"unclipped": True})) > 1.5 * EPSILON
    seen = rounds("central", loud=4.0, plant={"unclipped": True})
    assert len(seen.coins) == 0  # nothing was opened: too few were left
    assert 0.4 < seen.refused / (ROUNDS * CLIENTS) < 0.6  # who was out said nothing too long


def test_real_masks_real_noise_and_clients_that_drop_out():
    """96 canaries: 8 rounds of 16 clients, 4 of whom vanish, the whole protocol, noise from the operating system.

    A bound above EPSILON takes 61 right of 64 guesses. With the real noise each is right with probability below 0.65,
    so a correct program fails with P < 1e-7. Without the clients' shares all are right.
    """
    away = {secagg.Step.MASK: range(0, 16, 4)}
    for plant, found in ({}, False), ({"silent": 16}, True):
        terms = terms_for("secure_aggregation", 12, None)
        seen = play(terms, rounds=8, clients=16, seed=3, masks=True, dropouts=away, plant=plant)
        assert len(seen.coins) == 96
        assert (one_run_lower_bound(seen.coins, seen.scores, 64, DELTA) > EPSILON) == found


def test_noise_from_the_operating_system():
    """1,536 canaries, shares drawn by OpenDP. A bound above EPSILON takes 148 right of 160 guesses.

    With the real noise each is right with probability below 0.75, so a correct program fails with P < 1e-7; with an
    eighth of it above 0.99, and fewer are right with P < 1e-7.
    """
    terms = terms_for("secure_aggregation", CLIENTS, None)
    real, eighth = (play(terms, rounds=ROUNDS, clients=CLIENTS, seed=2, plant={"noise": f}) for f in (1.0, 0.125))
    assert one_run(real) <= EPSILON < one_run(eighth)


# --- noised updates


@by_trust
def test_noised_updates_and_readings_together_keep_their_epsilon(trust):
    """Each canary's change is twenty times the clip before it is clipped; both parts together cost EPSILON."""
    seen = rounds(trust, update=True)
    assert [charge.purpose for charge in seen.charges] == [READINGS, UPDATE]
    assert seen.stated(DELTA) == pytest.approx(EPSILON, rel=1e-3)
    assert one_run(seen) <= EPSILON
    alone = rounds(trust, update=True, look=[UPDATE])
    assert one_run(alone) <= alone.stated(DELTA, UPDATE) < EPSILON


@by_trust
def test_planted_bugs_in_updates_are_found(trust):
    for plant in {"update noise": 0.25}, {"unclipped update": 4.0}:
        seen = rounds(trust, update=True, look=[UPDATE], plant=plant)
        if trust == "central" and "unclipped update" in plant:
            assert len(seen.coins) == 0 < seen.refused  # the server saw it and dropped it
        else:
            assert one_run(seen) > 1.2 * seen.stated(DELTA, UPDATE)
    assert one_run(rounds(trust, update=True, plant={"metrics": True})) > EPSILON


# --- two inputs, many rounds (Clopper-Pearson)


def exceeds(seen, deltas=(DELTA, 0.02, BULK), sure=SURE) -> bool:
    return any(epsilon_lower_bound(*seen.sides, delta, sure) > seen.stated(delta) for delta in deltas)


def test_three_quarters_of_the_shares_forgotten_are_found():
    """6,400 canaries, each present or zeroed, seed 1. Half forgotten takes many more: see the last but one."""
    assert not exceeds(rounds("secure_aggregation", n=800, clients=8))
    assert exceeds(rounds("secure_aggregation", n=800, clients=8, plant={"silent": 6}))


SIZE = {
    "safety": (
        Coord(name="delta", low=-0.25, high=0.25, purpose="x", scale=0.4),
        Coord(name="tail", low=0, high=1, purpose="x", scale=1.5, up=True),
        Coord(name="detail", low=-1, high=1, purpose="x"),
    ),
    "utility": (Coord(name="score", low=0.0, high=1.0, purpose="x", scale=0.3, zero=0.5),),
}


def everyday(client: int, present: bool) -> Message:
    """Clients like any others; client 0 is far off in everything, or says nothing (readings at their zeros)."""
    if client == 0 and not present:
        return Message(readings={"safety": np.zeros(3), "utility": np.array([0.5])}, update=np.array([0.0, 0.0, 1.0]))
    own = stream(9, "everyday", client).uniform(-1, 1, 3)
    if client == 0:
        return Message(
            readings={"safety": np.array([-0.25, 1.0, 0.7]), "utility": np.array([0.0])},
            update=np.array([3.0, -3.0, 1.0]),
        )
    return Message(
        readings={"safety": np.array([own[0] / 4, 0.0, own[1]]), "utility": np.array([0.5 + own[2] / 4])},
        update=np.append(own[:2] / 10, 1.0),
    )


def opposed(client: int, present: bool) -> Message:
    """The same, but client 0 says the opposite where it is not present."""
    if client != 0 or present:
        return everyday(client, present)
    return Message(
        readings={"safety": np.array([0.25, 0.0, 0.7]), "utility": np.array([1.0])}, update=np.array([-3.0, 3.0, 1.0])
    )


def two_inputs_exceed(trust, runs, plant=None, deltas=(DELTA, 0.05)) -> bool:
    """Whether a bound from so many rounds on each of two neighbouring inputs exceeds what was charged."""
    message = opposed if trust == "local" else everyday
    sides, seen = projections(terms_for(trust, 4, 11, update=True), SIZE, message, 4, runs, plant or {})
    return any(epsilon_lower_bound(*sides, delta, SURE) > seen.stated(delta) for delta in deltas)


@by_trust
def test_a_whole_round_with_and_without_one_client(trust):
    """120 rounds of 4 clients on each input: readings beyond the norm cap, and an update beyond its clip.

    What one client can do is all in these rounds, so that a forgotten bound shows whatever it bounds.
    """
    assert not two_inputs_exceed(trust, 120)
    assert two_inputs_exceed(trust, 120, {"noise": 0.125})
    if trust != "central":  # whose server drops it: above
        assert two_inputs_exceed(trust, 120, {"unclipped update": 8.0})


@pytest.mark.statistical
@by_trust
def test_a_whole_round_with_and_without_one_client_many_times(trust):
    """20,000 rounds on each input, seed 11, at confidence 0.999 for each of two deltas: a correct program fails for at
    most one seed in 500. Half the noise must be found."""
    assert not two_inputs_exceed(trust, 20_000)
    assert two_inputs_exceed(trust, 20_000, {"noise": 0.5})


@pytest.mark.statistical
def test_half_of_the_shares_forgotten_are_found():
    """64,000 canaries in 8,000 rounds, seed 1, at confidence 0.999 for each of three deltas: a correct program fails
    for at most one seed in 300. The noise is 1/sqrt(2) of what is stated (epsilon 2.93 for 2), which 20,000 canaries
    showed with each of seeds 1 to 3; 64,000 leave room."""
    assert not exceeds(rounds("secure_aggregation", n=8_000, clients=8))
    assert exceeds(rounds("secure_aggregation", n=8_000, clients=8, plant={"silent": 4}))


@pytest.mark.statistical
@by_trust
def test_one_run_over_many_seeds(trust):
    """100 seeds, each at confidence 0.95: P(more than 17 of a correct program exceed) < 1e-5, as Binomial(100, 0.05)
    bounds them. Every run with a quarter of the noise is found."""
    over = {
        f: sum(one_run(rounds(trust, seed, plant={"noise": f})) > EPSILON for seed in range(100)) for f in (1, 0.25)
    }
    assert over[1] <= 17
    assert over[0.25] == 100
