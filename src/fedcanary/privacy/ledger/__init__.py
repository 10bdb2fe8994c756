"""The privacy ledger: what was spent, on disk for good before anything is released.

`ledger` decides what a window can pay, by a rule of `charges`; `chain` and `anchor` keep the file.
"""

from fedcanary.privacy.ledger.anchor import Damaged, Head
from fedcanary.privacy.ledger.charges import Budget, Charge, Fits, Outcome, Row, Spent, by_addition
from fedcanary.privacy.ledger.ledger import Ledger, OverBudget, Receipt

__all__ = [
    "Budget",
    "Charge",
    "Damaged",
    "Fits",
    "Head",
    "Ledger",
    "Outcome",
    "OverBudget",
    "Receipt",
    "Row",
    "Spent",
    "by_addition",
]
