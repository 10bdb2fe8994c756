"""FedSA-LoRA: both matrices are trained, only A is averaged; B holds what is specific to the client and stays there.

Shared: A (and a classifier's head). Private: B.

Guo et al. 2025 (arXiv 2410.01463), section 4: A learns general, B client-specific knowledge.
"""

from fedcanary.personalize.base import OneAdapter


class FedSaLora(OneAdapter):
    """Share A, keep B."""

    name = "fedsa_lora"

    def shares(self, name: str) -> bool:
        """All but B."""
        return not name.endswith(".lora_B")
