"""Who takes part in a round. The draw, and what it means for privacy, is decided in this file alone.

With everyone in every round the draw says nothing and saves nothing. A uniform draw of `per_round` clients without
replacement is fresh in each round; it is not claimed as privacy amplification, because the server knows who was drawn.
"""

from fedcanary.rng import stream


def draw(seed: int, round: int, clients: int, per_round: int | None) -> list[int]:
    """The round's clients, in order of their number."""
    if per_round is None or per_round >= clients:
        return list(range(clients))
    return sorted(int(c) for c in stream(seed, "cohort", round).choice(clients, per_round, replace=False))
