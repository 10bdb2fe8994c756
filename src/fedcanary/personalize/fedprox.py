"""FedProx: federated averaging with a pull towards the round's average during local training.

Shared: the whole adapter. Private: nothing. Local objective: loss + mu / 2 |w - w_t|^2 over the adapter's tensors.

Li et al. 2020 (arXiv 1812.06127), equation 2.
"""

from fedcanary.personalize.base import OneAdapter


class FedProx(OneAdapter):
    """Average everything; stay near the average while training."""

    name = "fedprox"
    proximal = True
