"""fedcanary on Flower: its own study as Flower apps, and what attaches it to an app that exists. Needs `flower`.

Two lines attach it, and one file, `study.toml`, beside them (engines/flower/attach.py has its keys):

    from fedcanary.flower import ClientApp         # in place of flwr.clientapp's
    from fedcanary.flower import FedAvg            # in place of flwr.serverapp.strategy's: any of its strategies

Or with the study named: `ClientApp(study=...)`, or `ClientApp(mods=[probe_mod("study.toml")])` where no secure sum is
made; and `CanaryStrategy(any_strategy, study="study.toml")` around any strategy, an own one too. Nothing of Flower is
loaded before one of the names is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedcanary.flower.mod import ClientApp, probe_mod
    from fedcanary.flower.strategy import CanaryStrategy

__all__ = ["CanaryStrategy", "ClientApp", "probe_mod"]


def __getattr__(name: str) -> Any:
    if name in ("ClientApp", "probe_mod"):
        return getattr(importlib.import_module("fedcanary.flower.mod"), name)
    if not name[0].isupper():  # a module of ours, which the import looks for here first
        raise AttributeError(name)
    strategy = importlib.import_module("fedcanary.flower.strategy")
    return strategy.CanaryStrategy if name == "CanaryStrategy" else strategy.around(name)
