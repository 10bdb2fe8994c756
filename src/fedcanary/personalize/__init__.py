"""Personalization methods, one file each, by name."""

from fedcanary.errors import BadInput, did_you_mean
from fedcanary.personalize.base import Held, Method, Trained
from fedcanary.personalize.ditto import Ditto
from fedcanary.personalize.dual import Dual
from fedcanary.personalize.fedavg import FedAvg
from fedcanary.personalize.fedprox import FedProx
from fedcanary.personalize.fedsa_lora import FedSaLora
from fedcanary.personalize.ffa_lora import FfaLora
from fedcanary.personalize.local_only import LocalOnly

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (LocalOnly, FedAvg, FedProx, FfaLora, FedSaLora, Ditto, Dual)
}


def method(name: str, mu: float = 0.1) -> Method:
    """The method of that name. Raises BadInput for an unknown one."""
    if name not in METHODS:
        raise BadInput.of("personalize.method", f"unknown method {name!r}", did_you_mean(name, METHODS))
    return METHODS[name](mu)


__all__ = ["METHODS", "Held", "Method", "Trained", "method"]
