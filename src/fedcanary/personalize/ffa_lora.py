"""FFA-LoRA: A stays at its random start for ever, only B is trained and averaged.

Shared: B (and a classifier's head). Private: nothing a client learned; A is the same frozen draw at every client,
known from the study's seed, so it is neither sent nor changed. Averaging B alone makes the average of the products
the product of the averages, and halves the traffic.

Sun et al. 2024 (arXiv 2403.12313), section 4.
"""

from fedcanary.personalize.base import OneAdapter


class FfaLora(OneAdapter):
    """Freeze A, average B."""

    name = "ffa_lora"

    def shares(self, name: str) -> bool:
        """All but A."""
        return not name.endswith(".lora_A")

    def trains(self, name: str) -> bool:
        """All but A."""
        return self.shares(name)
