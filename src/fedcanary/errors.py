"""Every error a user can meet, and the exit code it ends the program with.

FedcanaryError                 exit 1 (our bug, unless a subclass says otherwise)
  BadInput                     exit 2: carries every `Problem` found, each with its remedy
    ClientFailed               exit 2: one client's training or data went wrong (names the client)
  Refused                      exit 4: a ledger, a contract or a policy said no
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import ClassVar, Final

EXIT_OK: Final = 0
EXIT_BUG: Final = 1
EXIT_BAD_INPUT: Final = 2
EXIT_ALARM: Final = 3
EXIT_REFUSED: Final = 4
EXIT_INTERRUPTED: Final = 130


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing wrong with what the user gave: where it is, what it is, how to mend it."""

    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}\n    remedy: {self.remedy}"


class FedcanaryError(Exception):
    """Root of every error this package raises on purpose."""

    exit_code: ClassVar[int] = EXIT_BUG


class BadInput(FedcanaryError):
    """The input cannot be used; `problems` lists everything found, not only the first."""

    exit_code = EXIT_BAD_INPUT

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    @classmethod
    def of(cls, where: str, what: str, remedy: str) -> BadInput:
        """A `BadInput` with a single problem."""
        return cls([Problem(where, what, remedy)])


class ClientFailed(BadInput):
    """A client could not finish its local work (for example its loss became NaN)."""


class Refused(FedcanaryError):
    """A privacy ledger, a contract or a policy refused."""

    exit_code = EXIT_REFUSED


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A remedy for an unknown word: the closest known one, else all of them.

    >>> did_you_mean("fedavgg", ["fedavg", "ditto"])
    "did you mean 'fedavg'?"
    >>> did_you_mean("x", ["fedavg", "ditto"])
    'choose one of: ditto, fedavg'
    """
    options = sorted(known)
    close = get_close_matches(word, options, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose one of: {', '.join(options)}"
