"""benchmarks/engine_attempts: its verdict word, and that what it compares says the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_attempts.__main__ import PARTS
from engine_attempts.arithmetic import cross_entropy, one_table
from engine_attempts.measuring import MISSED, REPEATS, gain
from engine_attempts.page import THINGS, Row, page

from fedcanary.models import stacked


def test_a_planted_difference_has_its_word_and_none_has_none():
    noise = np.exp(np.linspace(-0.1, 0.1, REPEATS))
    shared = np.array([1.0, 3.0] * REPEATS)[:REPEATS]  # what else the machine does falls on both
    assert gain(shared * noise, shared).verdict == "within noise"
    assert gain(shared * noise * 1.1, shared).verdict == "faster"
    assert gain(shared * noise / 1.1, shared).verdict == "slower"
    found = gain(shared * noise * 2, shared)
    assert found.middle == pytest.approx(2)
    assert found.low < 2 < found.high
    one_slow = np.where(np.arange(REPEATS) == 0, 100.0, 1.0)
    assert gain(one_slow, np.ones(REPEATS)).verdict == "within noise"  # one disturbance proves nothing


def test_the_interval_misses_the_median_as_rarely_as_it_says():
    """2,000 trials, seed 4: with a chance of .0117 a trial, a correct program is above .02 with probability < .002."""
    random = np.random.default_rng(4)
    ratios = np.exp(random.standard_cauchy((2000, REPEATS)).clip(-20, 20))  # a distribution with heavy tails
    missed = [not g.low <= 1 <= g.high for g in (gain(row, np.ones(REPEATS)) for row in ratios)]
    assert np.mean(missed) <= MISSED


def test_too_few_repeats_are_refused():
    with pytest.raises(ValueError, match="measure more often"):
        gain(np.ones(5), np.ones(5))


def test_a_figure_that_speaks_against_what_is_done_is_said():
    slow, quick = np.full(REPEATS, 2.0), np.ones(REPEATS)
    rows = {name: Row(name, "a cell", slow, quick, 1) for name in ("lean", "compile", "bfloat16")}
    assert [row.against for row in rows.values()] == [False, True, False]
    assert Row("lean", "a cell", quick, slow, 1).against
    assert "| 2e+03 (2e+03) | 1e+03 (1e+03) | 2.00 [2.00, 2.00] | faster |" in rows["lean"].line()


def test_every_way_to_a_target_s_log_probability_gives_the_same_and_its_gradient():
    random = torch.Generator().manual_seed(3)
    logits = 5 * torch.randn(6, 9, generator=random)
    row, target = torch.tensor([0, 1, 1, 1, 5]), torch.tensor([8, 0, 3, 3, 2])  # a row may have several, or none
    weights, said = torch.randn(5, generator=random), {}
    for way in (stacked._picked, one_table, cross_entropy):
        leaf = logits.clone().requires_grad_()
        value = way(leaf, row, target)
        (value * weights).sum().backward()
        said[way] = torch.cat([value.detach(), leaf.grad.flatten()])
    for way in (one_table, cross_entropy):
        torch.testing.assert_close(said[way], said[stacked._picked])


def test_the_page_says_what_each_thing_gave_and_what_speaks_against_it():
    slow, quick = np.full(REPEATS, 2.0), np.ones(REPEATS)
    rows = [Row("one_table", "a cell", slow, quick, 1), Row("lean", "a cell", slow, quick, 1)]
    text = page(rows, ["A remark, with a table:", "", "| a |", "|---|", "", "Another."], (1.0, 2.0), 660.0)
    against = text.partition("## Where")[2].partition("## Remarks")[0]
    assert all(row.line() in text for row in rows)
    assert THINGS["one_table"].what in against
    assert THINGS["lean"].what not in against
    assert text.endswith("A remark, with a table:\n\n| a |\n|---|\n\nAnother.\n")
    assert {part.__name__ for part in PARTS} >= {"picked", "compiled"}
