"""The behavioural-evaluation contract: every number that may leave a client, for what, at which price.

Clients pin its digest; their own code (`refusals`) says no to whatever the contract or their own policy does not allow.
"""

from fedcanary.privacy.contract.check import check
from fedcanary.privacy.contract.diff import Change, Difference, Kind, diff
from fedcanary.privacy.contract.document import Contract, Examples, Number, Slices, Update, load, numbers, parse
from fedcanary.privacy.contract.policy import (
    ClientPolicy,
    DrillDown,
    Reason,
    Refusal,
    Request,
    load_policy,
    refusals,
    tally,
)
from fedcanary.privacy.contract.words import show

__all__ = [
    "Change",
    "ClientPolicy",
    "Contract",
    "Difference",
    "DrillDown",
    "Examples",
    "Kind",
    "Number",
    "Reason",
    "Refusal",
    "Request",
    "Slices",
    "Update",
    "check",
    "diff",
    "load",
    "load_policy",
    "numbers",
    "parse",
    "refusals",
    "show",
    "tally",
]
