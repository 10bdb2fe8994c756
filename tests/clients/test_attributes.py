"""What a client is, by attribute: what the data says of all its rows, and what the generated world gives it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fedcanary.clients.data import Columns, Table, read
from fedcanary.clients.generated import DEVICES, REGIONS, Federation
from fedcanary.clients.partition import FilePopulation, PartitionSpec, partition
from fedcanary.errors import BadInput
from fedcanary.types import Mode

ROWS = {
    "ann": [("north", "kitchen"), ("north", "kitchen"), ("north", "garden")],
    "bob": [("south", "garden"), ("north", "garden"), ("south", "garden")],  # moved: he is of no region
    "cid": [("west", "kitchen"), ("", "garden"), ("west", "")],  # one row does not say
    "dee": [("south", "garden")] * 3,
}


def write(path: Path, regions: bool = True) -> Path:
    rows = [
        {"text": f"{name} {i}", "user": name, "place": domain, **({"region": region} if regions else {})}
        for name, own in ROWS.items()
        for i, (region, domain) in enumerate(own)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(folder: Path, **columns) -> Table:
    named = Columns(**{"text": "text", "client": "user", "domain": "place", **columns})
    return read(write(folder / "rows.jsonl"), named, folder / "cache")


def population(found: Table) -> FilePopulation:
    return FilePopulation(table=found, partition=partition(found, PartitionSpec(kind="column"), 1))


def test_a_client_is_what_all_its_rows_say(tmp_path):
    found = population(table(tmp_path, slices=("region",)))
    assert [found.name(c) for c in range(len(found))] == list(ROWS)
    assert [dict(found.attributes(c)) for c in range(len(found))] == [
        {"domain": "kitchen", "region": "north"},
        {"domain": "garden"},
        {},  # no domain has more than half of its rows
        {"domain": "garden", "region": "south"},
    ]


def test_without_attribute_columns_nothing_about_the_data_changes(tmp_path):
    plain, sliced = table(tmp_path), table(tmp_path, slices=("region",))
    assert plain.attributes == {} and list(sliced.attributes) == ["region"]
    assert plain.digest != sliced.digest  # another region at a client is another population
    assert [plain.item(i) for i in range(plain.rows)] == [sliced.item(i) for i in range(sliced.rows)]
    without = read(
        write(tmp_path / "no.jsonl", regions=False),
        Columns(text="text", client="user", domain="place"),
        tmp_path / "cache",
    )
    assert without.digest == plain.digest
    assert dict(population(plain).attributes(0)) == {"domain": "kitchen"}


def test_a_table_is_the_same_when_it_is_opened_again(tmp_path):
    first = table(tmp_path, slices=("region", "place"))
    again = Table.open(first.path)
    assert again.columns == first.columns and again.columns.slices == ("region", "place")
    for name, (values, codes) in first.attributes.items():
        assert again.attributes[name][0] == values
        assert np.array_equal(again.attributes[name][1], codes)
    assert dict(population(again).attributes(3)) == {"domain": "garden", "region": "south", "place": "garden"}


@pytest.mark.parametrize("names", [("region", "region"), ("a=b",), ("domain",), ("",), ("x\n",)])
def test_names_that_cannot_be_told_apart_are_refused(tmp_path, names):
    with pytest.raises(BadInput) as caught:
        table(tmp_path, slices=names)
    assert any("attribute" in p.what for p in caught.value.problems)


def test_a_column_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BadInput, match="no column 'regoin'") as caught:
        table(tmp_path, slices=("regoin",))
    assert "did you mean 'region'?" in str(caught.value)


def test_the_generated_federation_has_four_regions_and_the_planted_minority_is_one_of_them():
    planted = Federation(clients=400, seed=1, plants=((Mode.FAIRNESS_COLLAPSE, 1.0),))
    own = [planted.attributes(c) for c in range(400)]
    assert Counter(a["region"] for a in own) == dict.fromkeys(REGIONS, 100)
    assert {a["region"] for c, a in enumerate(own) if planted.in_minority(c)} == {"west"}
    assert all(planted.in_minority(c) == (a["region"] == "west") for c, a in enumerate(own))
    assert {a["device"] for a in own} == set(DEVICES)
    for region in REGIONS:  # neither tells of the other
        devices = Counter(a["device"] for a in own if a["region"] == region)
        assert all(abs(count - 50) <= 5 for count in devices.values())
    assert own == [Federation(clients=400, seed=9).attributes(c) for c in range(400)]
    assert all(a["domain"] in planted.domains(c) for c, a in enumerate(own))
