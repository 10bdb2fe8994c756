"""Who takes part in a round. The draw, and what it means for privacy, is decided in this file alone.

rotating    The clients are put in an order once a window, from the seed, and a round takes the next ones that are
            available: a client takes part at most once. The panels of a window are disjoint and do not depend on
            anybody's data, so the window costs a client what its one panel costs (parallel composition). When too few
            are left, nobody is drawn and the round's modes are unknown; the guarantee is never weakened instead.
same        With everyone in every round the draw says nothing and saves nothing. A uniform draw of `per_round` clients
            without replacement is fresh in each round; a client pays for all rounds, as if always drawn. It is not
            claimed as privacy amplification, because the server knows who was drawn.

Besides, a round may have clients who train and say nothing of it but their update: drawn anew in each round, uniformly
from those who do not answer in it, and as often as it falls to them. They spend no part of the readings' budget.

Who is away in a round is not drawn for it, and keeps its turn. Being away must not depend on private data either: who
is on line, not who has what.
"""

from collections.abc import Callable, Collection

from fedcanary.rng import stream


def available(seed: int, round: int, clients: int, share: float) -> Callable[[int], bool]:
    """Whether a client is there in a round: each with probability `share`, independently, from the seed."""
    if share >= 1:
        return lambda client: True
    there = stream(seed, "available", round).random(clients) < share
    return lambda client: bool(there[client])


def draw(
    seed: int, round: int, clients: int, per_round: int | None, there: Callable[[int], bool] = lambda client: True
) -> list[int]:
    """The round's clients under `same`, in order of their number."""
    found = [client for client in range(clients) if there(client)]
    if per_round is None or per_round >= len(found):
        return found
    return sorted(found[int(c)] for c in stream(seed, "cohort", round).choice(len(found), per_round, replace=False))


def rotate(
    seed: int, clients: int, size: int, used: Collection[int], there: Callable[[int], bool] = lambda client: True
) -> list[int]:
    """The round's clients under `rotating`: the next `size` that are there and not `used` in the window."""
    taken = set(used)
    order = stream(seed, "panel").permutation(clients).tolist()
    return sorted([client for client in order if client not in taken and there(client)][:size])


def others(
    seed: int, round: int, clients: int, panel: Collection[int], count: int, there: Callable[[int], bool]
) -> tuple[int, ...]:
    """The round's `count` clients who only train, in order of their number: of those there and not in its panel."""
    if not count:
        return ()
    answering = set(panel)
    found = [client for client in range(clients) if client not in answering and there(client)]
    chosen = stream(seed, "trainers", round).choice(len(found), min(count, len(found)), replace=False)
    return tuple(sorted(found[int(at)] for at in chosen))
