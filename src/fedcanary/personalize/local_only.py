"""Local training only: every client keeps its own adapter and nothing is ever averaged.

Shared: nothing. Private: the whole adapter. The yardstick any federation must beat for each of its clients.
"""

from fedcanary.personalize.base import OneAdapter


class LocalOnly(OneAdapter):
    """No federation."""

    name = "local_only"

    def shares(self, name: str) -> bool:
        """Nothing is shared."""
        return False
