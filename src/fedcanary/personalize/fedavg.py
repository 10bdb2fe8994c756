"""Federated averaging of LoRA adapters.

Shared: the whole adapter (A, B and a classifier's head). Private: nothing; a client's personalized model is what its
local training makes of the round's average.

McMahan et al. 2017 (arXiv 1602.05629), algorithm 1; with LoRA as in FedIT, Zhang et al. 2023 (arXiv 2305.05644),
section 3: A and B are averaged separately, so the average of the products is not the product of the averages.
"""

from fedcanary.personalize.base import OneAdapter


class FedAvg(OneAdapter):
    """Average everything."""

    name = "fedavg"
