"""Who has which rows, and which of them are kept back for evaluation.

    kind       a client is                                     source
    column     whoever a column of the data says               -
    dirichlet  equal shares of rows, its mix of categories q   Hsu, Qi & Brown 2019 (arXiv 1909.06335), section 3
               drawn from Dir(alpha p), p the mix of the data
    domain     the same with the domain as the category        -
    quantity   unequal shares of rows, all with the data's mix Li et al. 2020 (FedProx, arXiv 1812.06127): the
               sizes are log-normal above a common floor       generator of its synthetic data

`alpha` is the total concentration: near 0 a client has one category, at 100 nearly the mix of the data. `alpha=0` is
the limit itself: every client has exactly one category.

Laws: every row belongs to at most one client; a client's train and eval rows are disjoint and together are all its
rows; the split of a client depends on the seed, its name and its own rows, not on the other clients.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from heapq import heapify, heapreplace
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from fedcanary.clients.data import Table
from fedcanary.clients.population import DOMAIN, Split
from fedcanary.clients.sources import Problems
from fedcanary.errors import did_you_mean
from fedcanary.rng import stream
from fedcanary.types import Item

Kind = Literal["column", "dirichlet", "domain", "quantity"]
Category = Literal["label", "group", "domain"]
Rows = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]

MIN_CLIENTS: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionSpec:
    """How rows become clients. `clients` is needed unless the data names them; there it draws that many of them."""

    kind: Kind
    clients: int | None = None
    by: Category = "label"  # the category that `dirichlet` skews
    alpha: float = 0.5  # its concentration
    sigma: float = 2.0  # standard deviation of the log of the sizes that `quantity` draws
    min_examples: int = 2  # of a client, train and eval together
    eval_fraction: float = 0.2  # of a client's rows; at least one, and at least one is left to train on
    too_small: Literal["refuse", "leave_out"] = "refuse"  # what happens to a client below `min_examples`


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Partition:
    """Clients as slices of one array: client k has `rows[offsets[k]:offsets[k + 1]]`, ascending."""

    table: Table
    spec: PartitionSpec
    seed: int
    rows: Rows
    offsets: Counts
    names: Sequence[str] | None = None  # None: numbered

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def unused(self) -> int:
        """Rows of the table that no client has."""
        return self.table.rows - len(self.rows)

    @property
    def sizes(self) -> Counts:
        """(clients,) rows of each client."""
        return np.diff(self.offsets)

    def name(self, client: int) -> str:
        """The client's name in the data, or its number. Raises IndexError if there is no such client."""
        client = range(len(self))[client]
        return f"client {client}" if self.names is None else self.names[client]

    def rows_of(self, client: int) -> Rows:
        """All rows of a client, ascending. Raises IndexError if there is no such client."""
        client = range(len(self))[client]
        return self.rows[self.offsets[client] : self.offsets[client + 1]]

    def train(self, client: int) -> Rows:
        """Rows the client trains on, ascending."""
        return self.rows_of(client)[~self._kept_back(client)]

    def eval(self, client: int) -> Rows:
        """Rows the client keeps back for evaluation, ascending; empty if `eval_fraction` is 0."""
        return self.rows_of(client)[self._kept_back(client)]

    def _kept_back(self, client: int) -> npt.NDArray[np.bool_]:
        """Shuffle within each label, then keep back evenly spaced places: each label within one of its share."""
        rows = self.rows_of(client)
        n = len(rows)
        kept = 0 if self.spec.eval_fraction == 0 else min(max(round(n * self.spec.eval_fraction), 1), n - 1)
        rng = stream(self.seed, "split", self.name(client))
        order = rng.permutation(n)
        order = order[np.argsort(self.table.label[rows][order], kind="stable")]
        steps = (np.arange(n + 1) * kept + rng.integers(n)) // n  # rises by one at exactly `kept` places
        mask = np.zeros(n, np.bool_)
        mask[order[np.diff(steps) > 0]] = True
        return mask


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePopulation:
    """A population (see `population.Population`) whose clients' data was read from files."""

    table: Table
    partition: Partition
    favourable: int | None = None  # the class that is good for the person it is about

    @property
    def digest(self) -> str:
        """Identifies the rows, who has which, and the split."""
        plan = self.partition
        said = (self.table.digest, plan.seed, astuple(plan.spec), self.favourable)
        digest = hashlib.blake2b(repr(said).encode(), digest_size=16)
        digest.update(plan.offsets.astype("<i8").tobytes())
        digest.update(plan.rows.astype("<i4").tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.partition)

    def name(self, client: int) -> str:
        """The client's name in the data, or its number."""
        return self.partition.name(client)

    def items(self, client: int, split: Split) -> tuple[Item, ...]:
        """The client's examples of one split, in the order of the data."""
        rows = self.partition.train(client) if split == "train" else self.partition.eval(client)
        items = self.table.items(rows)
        return items if self.favourable is None else tuple(replace(i, positive=self.favourable) for i in items)

    def domains(self, client: int) -> frozenset[str]:
        """The domains that the client's rows come from."""
        codes = np.unique(self.table.domain[self.partition.rows_of(client)])
        return frozenset(self.table.domains[code] for code in codes if code >= 0)

    def attributes(self, client: int) -> Mapping[str, str]:
        """The domain that most of the client's rows come from, and every attribute column whose value is the same in
        all of them; a client whose rows do not agree has none.
        """
        rows, found = self.partition.rows_of(client), {}
        codes, counts = np.unique(self.table.domain[rows], return_counts=True)
        most = codes[counts > len(rows) / 2]
        if len(most) and most[0] >= 0:
            found[DOMAIN] = self.table.domains[most[0]]
        for name, (values, of) in self.table.attributes.items():
            own = np.unique(of[rows])
            if len(own) == 1 and own[0] >= 0:
                found[name] = values[own[0]]
        return found


def partition(table: Table, spec: PartitionSpec, seed: int) -> Partition:
    """Give the table's rows to clients. The same table, spec and seed give the same partition.

    Raises:
        BadInput: with every problem of the spec; else with the clients that are too small, by name.
    """
    problems = Problems()
    _check(table, spec, problems)
    problems.raise_any()
    names: Sequence[str] | None = None
    if spec.kind == "column":
        rows, offsets, names = _by_column(table, spec, seed)
    else:
        clients = spec.clients or 0
        if spec.kind == "quantity":
            order = stream(seed, "partition", "rows").permutation(table.rows)
            offsets = _offsets(_sizes(table.rows, clients, spec, seed))
        else:
            categories = _categories(table, "domain" if spec.kind == "domain" else spec.by)
            share = _one_each if spec.alpha == 0 else _dirichlet
            order, offsets = share(categories, clients, spec.alpha, seed)
        owner = np.repeat(np.arange(clients), np.diff(offsets))
        rows = order[np.lexsort((order, owner))].astype(np.int32)  # ascending within a client
        if spec.too_small == "leave_out":
            rows, offsets = _take(rows, offsets, np.flatnonzero(np.diff(offsets) >= spec.min_examples))
    plan = Partition(table=table, spec=spec, seed=seed, rows=rows, offsets=offsets, names=names)
    remedy = "lower `min_examples`, ask for fewer clients, or leave small clients out (`too_small`)"
    for client in np.flatnonzero(plan.sizes < spec.min_examples):
        what = f"has {plan.sizes[client]} examples where at least {spec.min_examples} are asked"
        problems.add("clients with too few examples", f"client {plan.name(int(client))!r}", what, remedy)
    if len(plan) < MIN_CLIENTS:
        what = f"{len(plan)} clients have {spec.min_examples} examples or more; a federation needs {MIN_CLIENTS}"
        problems.add("too few clients", "clients", what, "name another client column, or lower `min_examples`")
    problems.raise_any()
    return plan


def _check(table: Table, spec: PartitionSpec, problems: Problems) -> None:
    def refuse(wrong: bool, where: str, what: str, remedy: str) -> None:
        if wrong:
            problems.add(where, f"partition.{where}", what, remedy)

    if spec.kind not in get_args(Kind):
        refuse(True, "kind", f"no kind {spec.kind!r}", did_you_mean(str(spec.kind), get_args(Kind)))
    elif spec.kind == "column":
        refuse(not table.clients, "kind", "the data names no clients", "name the client column, or another kind")
        known = len(table.clients)
        refuse((spec.clients or 0) > known > 0, "clients", f"{spec.clients} of {known} clients", "ask for fewer")
    else:
        refuse(spec.clients is None, "clients", "not given", "say how many clients there are")
        what = f"{spec.clients} clients asked of {table.rows} rows"
        refuse((spec.clients or 0) > table.rows, "clients", what, "ask for fewer clients, or bring more data")
    if spec.kind in ("dirichlet", "domain"):
        by = "domain" if spec.kind == "domain" else spec.by
        if by not in get_args(Category):
            refuse(True, "by", f"no category {by!r}", did_you_mean(str(by), get_args(Category)))
        else:
            refuse(not getattr(table, f"{by}s"), "by", f"the data has no {by} column", "name it, or skew another")
        bad = not (math.isfinite(spec.alpha) and spec.alpha >= 0)
        refuse(bad, "alpha", f"{spec.alpha} is no concentration", "give a number, 0 or more")
    if spec.kind == "quantity":
        bad = not 0 <= spec.sigma <= 10
        refuse(bad, "sigma", f"{spec.sigma} is no usable spread of log sizes", "give a number from 0 to 10")
        if spec.clients and spec.clients <= table.rows:
            what = f"{spec.clients} clients of {spec.min_examples} examples need more than {table.rows} rows"
            short = spec.clients * spec.min_examples > table.rows
            refuse(short, "min_examples", what, "ask for fewer clients, or lower `min_examples`")
    few = spec.clients is not None and spec.clients < MIN_CLIENTS
    refuse(few, "clients", f"{spec.clients} clients: a federation needs {MIN_CLIENTS}", "ask for two or more")
    bad = not 0 <= spec.eval_fraction < 1
    refuse(bad, "eval_fraction", f"{spec.eval_fraction} is no share to keep back", "give a number from 0 to below 1")
    least = 1 if spec.eval_fraction == 0 else 2
    what = f"{spec.min_examples} cannot be split into train and eval" if least == 2 else f"{spec.min_examples} is none"
    refuse(spec.min_examples < least, "min_examples", what, f"give {least} or more")
    bad = spec.too_small not in ("refuse", "leave_out")
    refuse(bad, "too_small", f"{spec.too_small!r} is no choice", "say 'refuse' or 'leave_out'")


def _offsets(sizes: npt.ArrayLike) -> Counts:
    return np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))


def _take(rows: Rows, offsets: Counts, clients: Counts) -> tuple[Rows, Counts]:
    """Only these clients, in this order."""
    kept = np.zeros(len(offsets) - 1, np.bool_)
    kept[clients] = True
    return rows[np.repeat(kept, np.diff(offsets))], _offsets(np.diff(offsets)[clients])


def _by_column(table: Table, spec: PartitionSpec, seed: int) -> tuple[Rows, Counts, Sequence[str]]:
    """Clients in the order of their names; a draw of `spec.clients` of them if fewer are asked than there are."""
    rows = np.argsort(table.client, kind="stable").astype(np.int32)
    offsets = _offsets(np.bincount(table.client, minlength=len(table.clients)))
    chosen = np.arange(len(table.clients))
    if spec.too_small == "leave_out":
        chosen = np.flatnonzero(np.diff(offsets) >= spec.min_examples)
    if spec.clients is not None and spec.clients < len(chosen):
        chosen = np.sort(stream(seed, "partition", "clients").choice(chosen, spec.clients, replace=False))
    if len(chosen) == len(table.clients):
        return rows, offsets, table.clients
    return *_take(rows, offsets, chosen), [table.clients[client] for client in chosen]


def _categories(table: Table, by: Category) -> list[Counts]:
    """Rows of each category that occurs; rows without one are a category of their own."""
    codes = {"label": table.label, "group": table.group, "domain": table.domain}[by]
    order = np.argsort(codes, kind="stable")
    return [rows for rows in np.split(order, np.cumsum(np.bincount(codes + 1))) if len(rows)]


def _dirichlet(categories: list[Counts], clients: int, alpha: float, seed: int) -> tuple[Counts, Counts]:
    """Equal sizes; a client draws its rows one by one from its own mix, and from what is left once a category is empty.

    All rows are used, so the last clients take what the others left.
    """
    shuffle, mix = stream(seed, "partition", "rows"), stream(seed, "partition", "mix")
    pools = [shuffle.permutation(rows) for rows in categories]
    left = np.array([len(pool) for pool in pools])
    prior = left / left.sum()
    total = int(left.sum())
    sizes = np.full(clients, total // clients)
    sizes[: total % clients] += 1
    order = np.empty(total, np.int64)
    at = 0
    for size in sizes:
        q = mix.dirichlet(np.maximum(alpha * prior, np.finfo(float).tiny))
        need = int(size)
        while need:
            open_q = np.where(left > 0, q, 0.0)
            if not open_q.sum() > 1e-200:  # its own categories are all gone
                open_q = left.astype(float)
            drawn = np.minimum(mix.multinomial(need, open_q / open_q.sum()), left)
            for category in np.flatnonzero(drawn):
                stop, count = left[category], drawn[category]
                order[at : at + count] = pools[category][stop - count : stop]
                at += count
            left -= drawn
            need -= int(drawn.sum())
    return order, _offsets(sizes)


def _one_each(categories: list[Counts], clients: int, alpha: float, seed: int) -> tuple[Counts, Counts]:
    """One category per client: clients go to categories in proportion to their rows (D'Hondt), at least one each.

    With fewer clients than categories the smallest categories are nobody's.
    """
    shuffle = stream(seed, "partition", "rows")
    pools = sorted((shuffle.permutation(rows) for rows in categories), key=len, reverse=True)[:clients]
    seats = [1] * len(pools)
    averages = [(-len(pool) / 2, place) for place, pool in enumerate(pools)]
    heapify(averages)
    for _ in range(clients - len(pools)):
        place = averages[0][1]
        seats[place] += 1
        heapreplace(averages, (-len(pools[place]) / (seats[place] + 1), place))
    parts = [part for pool, count in zip(pools, seats, strict=True) for part in np.array_split(pool, count)]
    return np.concatenate(parts), _offsets([len(part) for part in parts])


def _sizes(rows: int, clients: int, spec: PartitionSpec, seed: int) -> Counts:
    """Log-normal sizes above `min_examples` that add up to all rows (largest remainders rounded up)."""
    weight = stream(seed, "partition", "sizes").lognormal(0.0, spec.sigma, clients)
    share = weight / weight.sum() * (rows - clients * spec.min_examples)
    sizes = np.floor(share).astype(np.int64)
    sizes[np.argsort(sizes - share, kind="stable")[: rows - clients * spec.min_examples - sizes.sum()]] += 1
    return np.asarray(sizes + spec.min_examples)
