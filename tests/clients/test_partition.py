"""Who has which rows: every row at most once, splits that do not touch, the skew that was asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedcanary.clients.data import Columns, Table, read
from fedcanary.clients.partition import FilePopulation, Partition, PartitionSpec, partition
from fedcanary.clients.population import Population
from fedcanary.errors import BadInput

COLUMNS = Columns(text="text", label="label", client="user", group="group", domain="domain")
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

Row = tuple[int, int, int, int]  # label, user, group (0: none), domain


def make(folder: Path, rows: Iterable[Row]) -> Table:
    lines = [
        {
            "text": f"text {i}",
            "label": label,
            "user": f"u{user:04}",
            "group": f"g{group}" if group else None,
            "domain": f"d{domain}",
        }
        for i, (label, user, group, domain) in enumerate(rows)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read(path, COLUMNS, folder / "cache", labels=("0", "1", "2", "3"))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """12,000 rows: 4 labels (half, quarter, eighth, eighth), 50 users, 3 groups and none, 6 domains."""
    label = [0, 0, 0, 0, 1, 1, 2, 3]
    return make(
        tmp_path_factory.mktemp("table"), ((label[i % 8], i * 7 % 50, i // 8 % 4, i // 32 % 6) for i in range(12_000))
    )


def said(table: Table, spec: PartitionSpec) -> dict[str, str]:
    with pytest.raises(BadInput) as caught:
        partition(table, spec, 0)
    return {problem.where: problem.what for problem in caught.value.problems}


def mixes(plan: Partition, codes: np.ndarray, kinds: int) -> np.ndarray:
    """(clients, kinds) shares of each category."""
    return np.array(
        [np.bincount(codes[plan.rows_of(k)] + 1, minlength=kinds + 1) / plan.sizes[k] for k in range(len(plan))]
    )


specs = st.one_of(
    st.just(PartitionSpec(kind="column")),
    st.builds(
        PartitionSpec,
        kind=st.sampled_from(["dirichlet", "domain", "quantity"]),
        clients=st.integers(2, 6),
        by=st.sampled_from(["label", "group", "domain"]),
        alpha=st.sampled_from([0.0, 1e-300, 0.01, 0.5, 100.0]),
        sigma=st.sampled_from([0.0, 1.0, 10.0]),
    ),
).flatmap(
    lambda spec: st.builds(
        replace,
        st.just(spec),
        eval_fraction=st.sampled_from([0.0, 0.2, 0.5, 0.99]),
        min_examples=st.sampled_from([2, 3]),
        too_small=st.sampled_from(["refuse", "leave_out"]),
    )
)
tables = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2), st.integers(0, 4)), min_size=18, max_size=60
)


@given(rows=tables, spec=specs, seed=st.integers(0, 2**31))
@quick
def test_laws(tmp_path: Path, rows: list[Row], spec: PartitionSpec, seed: int) -> None:
    table = make(tmp_path, rows)
    try:
        plan = partition(table, spec, seed)
    except BadInput as refused:
        kinds = {problem.where.split()[0] for problem in refused.problems}
        assert kinds <= {"client", "clients", "and"}  # only what the data forced: too few examples, too few clients
        return
    assert len(plan.rows) == len(set(plan.rows.tolist())), "a row has two owners"
    assert len(plan.rows) + plan.unused == table.rows
    assert plan.rows.dtype == np.int32
    if spec.kind == "quantity" or (spec.kind == "dirichlet" and spec.alpha and spec.too_small == "refuse"):
        assert plan.unused == 0
    for client in range(len(plan)):
        own, train, kept = plan.rows_of(client), plan.train(client), plan.eval(client)
        assert sorted([*train, *kept]) == own.tolist() and not set(train) & set(kept)
        assert len(own) >= spec.min_examples and len(train) >= 1
        assert (len(kept) == 0) == (spec.eval_fraction == 0)
        assert sorted(train) == train.tolist() and sorted(kept) == kept.tolist()
    again = partition(table, spec, seed)
    assert np.array_equal(again.rows, plan.rows) and np.array_equal(again.offsets, plan.offsets)
    assert all(np.array_equal(again.eval(k), plan.eval(k)) for k in range(len(plan)))


def test_another_seed_is_another_partition(table: Table) -> None:
    for spec in (
        PartitionSpec(kind="column", clients=20),
        PartitionSpec(kind="dirichlet", clients=20),
        PartitionSpec(kind="dirichlet", clients=20, alpha=0.0),
        PartitionSpec(kind="quantity", clients=20),
    ):
        one, two = (FilePopulation(table=table, partition=partition(table, spec, seed)) for seed in (1, 2))
        assert one.digest != two.digest
        assert any(one.items(k, "train") != two.items(k, "train") for k in range(20))


def test_natural_clients(table: Table) -> None:
    plan = partition(table, PartitionSpec(kind="column"), 0)
    assert len(plan) == 50 and plan.unused == 0
    assert [plan.name(k) for k in (0, 49)] == ["u0000", "u0049"]
    assert {table.clients[code] for code in table.client[plan.rows_of(7)]} == {"u0007"}
    some = partition(table, PartitionSpec(kind="column", clients=10), 0)
    assert len(some) == 10 and some.unused == 40 * 240
    assert {table.clients[code] for code in table.client[some.rows_of(3)]} == {some.name(3)}
    for client in (50, -51):
        with pytest.raises(IndexError):
            plan.rows_of(client)


def test_a_large_alpha_is_nearly_the_mix_of_the_data(table: Table) -> None:
    plan = partition(table, PartitionSpec(kind="dirichlet", clients=20, alpha=1e6), 3)
    assert set(plan.sizes.tolist()) == {600}
    share = mixes(plan, table.label, 4)[:, 1:]
    # Binomial with n = 600: the standard deviation of a share is at most 0.0204; 0.1 is 4.9 of them, in 80 shares
    # (chance below 1e-4; the seed is fixed). The last clients have what is left over, which is a mix as well.
    assert np.abs(share - [0.5, 0.25, 0.125, 0.125]).max() < 0.1


def test_a_small_alpha_is_nearly_one_category(table: Table) -> None:
    few = partition(table, PartitionSpec(kind="dirichlet", clients=20, alpha=0.01), 3)
    some = partition(table, PartitionSpec(kind="dirichlet", clients=20, alpha=2.0), 3)
    purity = [np.median(mixes(plan, table.label, 4).max(axis=1)) for plan in (few, some)]
    assert purity[0] > 0.99 > purity[1] > 0.5
    assert few.unused == 0


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_the_draw_has_the_variance_of_its_dirichlet(table: Table, alpha: float) -> None:
    """Var(q_i) = p_i (1 - p_i) / (alpha + 1) for Dir(alpha p); read from the first clients, while all pools still last.

    200 seeds x 5 of 50 clients = 1000 draws of q_0, 240 rows each; a correct program fails with chance below 1e-6
    (the sample variance of 1000 draws from [0, 1] has a standard error below 0.006; the margin is 0.03).
    """
    drawn = []
    for seed in range(200):
        plan = partition(table, PartitionSpec(kind="dirichlet", clients=50, alpha=alpha), seed)
        drawn += [np.mean(table.label[plan.rows_of(k)] == 0) for k in range(5)]
    expected = 0.25 / (alpha + 1)
    assert abs(float(np.var(drawn)) - (expected + (0.25 - expected) / 240)) < 0.03
    assert abs(float(np.mean(drawn)) - 0.5) < 0.1


def test_one_category_each_when_alpha_is_zero(table: Table) -> None:
    plan = partition(table, PartitionSpec(kind="domain", clients=6, alpha=0.0), 0)
    population = FilePopulation(table=table, partition=plan)
    assert sorted(population.domains(k) for k in range(6)) == sorted(frozenset({f"d{k}"}) for k in range(6))
    assert plan.unused == 0
    seats = partition(table, PartitionSpec(kind="dirichlet", clients=8, alpha=0.0), 0)
    assert sorted(int(table.label[seats.rows_of(k)][0]) for k in range(8)) == [0, 0, 0, 0, 1, 1, 2, 3]  # in proportion
    assert set(seats.sizes.tolist()) == {1500}
    fewer = partition(table, PartitionSpec(kind="dirichlet", clients=2, alpha=0.0), 0)
    assert sorted(fewer.sizes.tolist()) == [3000, 6000] and fewer.unused == 3000


def test_rows_without_a_category_are_one_of_their_own(table: Table) -> None:
    plan = partition(table, PartitionSpec(kind="dirichlet", by="group", clients=4, alpha=0.0), 0)
    assert sorted(set(table.group[plan.rows_of(k)].tolist()) == {-1} for k in range(4)) == [False, False, False, True]


def test_quantity_skew(table: Table) -> None:
    def sizes(sigma: float) -> np.ndarray:
        return partition(table, PartitionSpec(kind="quantity", clients=40, sigma=sigma, min_examples=5), 1).sizes

    assert sizes(0.0).tolist() == [300] * 40
    for sigma in (1.0, 2.0, 10.0):
        assert sizes(sigma).sum() == 12_000 and sizes(sigma).min() >= 5
    assert sizes(2.0).max() > 4 * sizes(2.0).mean() > 0
    plan = partition(table, PartitionSpec(kind="quantity", clients=4, sigma=0.0), 1)
    assert np.abs(mixes(plan, table.label, 4)[:, 1] - 0.5).max() < 0.05  # standard deviation 0.009, fixed seed


def test_the_split_is_stratified_by_label(table: Table) -> None:
    plan = partition(table, PartitionSpec(kind="column", eval_fraction=0.3), 0)
    for client in range(len(plan)):
        whole, kept = (
            np.bincount(table.label[rows], minlength=4) for rows in (plan.rows_of(client), plan.eval(client))
        )
        assert kept.sum() == 72 and np.abs(kept - 0.3 * whole).max() < 1


def test_every_example_is_kept_back_equally_often(tmp_path: Path) -> None:
    """3000 seeds, 3 of 10 rows kept back: a row's count is Binomial(3000, 0.3), sd 25; 150 is 6 sd (below 1e-7)."""
    table = make(tmp_path, [(i % 3, i // 10, 0, 0) for i in range(20)])
    counts = np.zeros(20)
    for seed in range(3000):
        counts[partition(table, PartitionSpec(kind="column", eval_fraction=0.3), seed).eval(0)] += 1
    assert counts.sum() == 9000 and np.abs(counts[:10] - 900).max() < 150


def test_a_split_does_not_depend_on_the_other_clients(tmp_path: Path) -> None:
    rows = [(i % 4, i % 3, 0, 0) for i in range(90)]
    folders = [tmp_path / name for name in ("all", "without")]
    for folder in folders:
        folder.mkdir()
    whole = make(folders[0], rows)
    without = make(folders[1], [row for row in rows if row[1] != 0])  # the first client is gone, all rows have moved
    spec = PartitionSpec(kind="column")
    one, two = partition(whole, spec, 5), partition(without, spec, 5)
    for name in ("u0001", "u0002"):
        places = [
            np.searchsorted(plan.rows_of(k), plan.eval(k)).tolist()
            for plan in (one, two)
            for k in range(len(plan))
            if plan.name(k) == name
        ]
        assert places[0] == places[1]


def test_a_population_of_files(table: Table) -> None:
    population: Population = FilePopulation(table=table, partition=partition(table, PartitionSpec(kind="column"), 0))
    assert len(population) == 50 and population.name(3) == "u0003"
    train, kept = population.items(3, "train"), population.items(3, "eval")
    assert (len(train), len(kept)) == (192, 48) and not {item.prompt for item in train} & {item.prompt for item in kept}
    assert train == population.items(3, "train")
    assert population.domains(3) <= {f"d{k}" for k in range(6)}
    assert train[0].choices == ("0", "1", "2", "3") and train[0].domain in population.domains(3)


def test_a_population_without_labels_groups_or_domains(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text\n" + "".join(f"line {i}\n" for i in range(30)))
    table = read(tmp_path / "t.csv", Columns(text="text"), tmp_path / "cache")
    population = FilePopulation(
        table=table, partition=partition(table, PartitionSpec(kind="quantity", clients=3, sigma=0.0), 0)
    )
    assert population.domains(0) == frozenset() and len(population.items(0, "eval")) == 2
    assert population.name(1) == "client 1"


# --- everything that can be wrong


def test_every_problem_of_a_spec_at_once(table: Table, tmp_path: Path) -> None:
    found = said(
        table,
        PartitionSpec(kind="dirichlet", clients=1, by="lable", alpha=-1.0, min_examples=1, eval_fraction=1.0),
    )
    assert set(found) == {
        "partition.clients",
        "partition.by",
        "partition.alpha",
        "partition.min_examples",
        "partition.eval_fraction",
    }
    assert "a federation needs 2" in found["partition.clients"]
    with pytest.raises(BadInput, match="did you mean 'dirichlet'"):
        partition(table, PartitionSpec(kind="dirichlett", clients=3), 0)
    (tmp_path / "t.csv").write_text("text\na\nb\n")
    bare = read(tmp_path / "t.csv", Columns(text="text"), tmp_path / "cache")
    assert said(bare, PartitionSpec(kind="column")) == {"partition.kind": "the data names no clients"}
    for by in ("label", "group", "domain"):
        assert (
            said(bare, PartitionSpec(kind="dirichlet", by=by, clients=2))["partition.by"]
            == f"the data has no {by} column"
        )
    assert said(bare, PartitionSpec(kind="quantity", clients=3))["partition.clients"] == "3 clients asked of 2 rows"
    assert "partition.min_examples" in said(bare, PartitionSpec(kind="quantity", clients=2))
    assert "partition.sigma" in said(table, PartitionSpec(kind="quantity", clients=2, sigma=float("nan")))
    assert "partition.alpha" in said(table, PartitionSpec(kind="domain", clients=2, alpha=float("nan")))
    assert said(table, PartitionSpec(kind="dirichlet"))["partition.clients"] == "not given"
    assert said(table, PartitionSpec(kind="column", clients=51))["partition.clients"] == "51 of 50 clients"
    assert "partition.too_small" in said(table, PartitionSpec(kind="column", too_small="skip"))


def test_small_clients_are_named_or_left_out(tmp_path: Path) -> None:
    rows = [(0, 0, 0, 0)] * 5 + [(1, 1, 0, 0)] * 5 + [(0, 2 + k, 0, 0) for k in range(30)]
    table = make(tmp_path, rows)
    with pytest.raises(BadInput) as caught:
        partition(table, PartitionSpec(kind="column"), 0)
    found = caught.value.problems
    assert found[0].where == "client 'u0002'" and found[0].what == "has 1 examples where at least 2 are asked"
    assert "too_small" in found[0].remedy
    assert len(found) == 21 and "10 more of the same kind" in found[-1].what
    plan = partition(table, PartitionSpec(kind="column", too_small="leave_out"), 0)
    assert [plan.name(k) for k in range(len(plan))] == ["u0000", "u0001"] and plan.unused == 30
    assert (
        "a federation needs 2"
        in said(table, PartitionSpec(kind="column", too_small="leave_out", min_examples=6))["clients"]
    )
    lone = make(tmp_path, rows[:5])
    assert "1 clients have 2 examples or more" in said(lone, PartitionSpec(kind="column"))["clients"]


# --- real data


def test_hatecheck_by_target(tmp_path: Path) -> None:
    if not (home := os.environ.get("FEDCANARY_DATA")):
        pytest.skip("FEDCANARY_DATA is not set: point it at a folder that holds hatecheck/test_suite_cases.csv")
    source = Path(home) / "hatecheck" / "test_suite_cases.csv"
    columns = Columns(text="test_case", label="label_gold", group="target_ident", domain="functionality")
    table = read(source, columns, tmp_path)
    skewed = partition(table, PartitionSpec(kind="dirichlet", by="group", alpha=0.3, clients=40), 7)
    level = partition(table, PartitionSpec(kind="dirichlet", by="group", alpha=1000.0, clients=40), 7)
    assert skewed.unused == level.unused == 0
    purity = [np.median(mixes(plan, table.group, 7).max(axis=1)) for plan in (skewed, level)]
    assert purity[0] > 0.6 > 0.3 > purity[1]
    as_client = replace(columns, client="target_ident")
    with pytest.raises(BadInput, match="no client"):  # 292 cases aim at nobody
        read(source, as_client, tmp_path)
    one_each = partition(table, PartitionSpec(kind="dirichlet", by="group", alpha=0.0, clients=8), 7)
    targets = {frozenset(item.group for item in table.items(one_each.rows_of(k))) for k in range(8)}
    assert targets == {frozenset({group}) for group in (*table.groups, None)}
