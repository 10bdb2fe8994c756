"""Agreement with lm-evaluation-harness: the same model, the same file, its own task and its own scoring.

The harness runs as it does for anyone: its `HFLM` model and its `crows_pairs_english` task, of which only the place of
the data is changed to the local file. The expected numbers are therefore the harness', computed while the test runs.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fedcanary.compare import NO_LORA, _attach, compare
from fedcanary.models import base as models
from fedcanary.models import stacked
from fedcanary.probes.suites import load
from fedcanary.types import Suite

ITEMS = 400
# Raised inside lm_eval and the data set reader it uses, about their own internals; nothing of ours is in the stack.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
FILE = Path("crows_pairs", "crows_pairs_anonymized.csv")
TASK = """
include: {included}
task: crows_pairs_local
dataset_path: csv
dataset_name: null
dataset_kwargs:
  data_files:
    test: {file}
  cache_dir: {cache}
"""


@pytest.fixture(scope="module")
def crows_pairs(tmp_path_factory) -> Path:
    """The first items of the published file, as a file of their own."""
    folder = os.environ.get("FEDCANARY_DATA")
    path = Path(folder or ".") / FILE
    if not folder or not path.is_file():
        pytest.skip(f"set FEDCANARY_DATA to a folder that holds {FILE}")
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    short = tmp_path_factory.mktemp("data") / "crows_pairs_anonymized.csv"
    with short.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows[:ITEMS]])
    return short


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """A random adapter with everything that a LoRA of peft's may carry: DoRA, ranks by module."""
    from peft import LoraConfig, get_peft_model

    base = models.load(models.BUNDLED)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        use_dora=True,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        wrapped = get_peft_model(base.model, config)
        for name, tensor in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(tensor, std=0.05)
    folder = tmp_path_factory.mktemp("adapter")
    wrapped.save_pretrained(str(folder))
    return folder


def harness(folder: Path, file: Path, adapter: Path | None, dtype: str) -> tuple[float, np.ndarray]:
    """pct_stereotype, and (n, 2) log-likelihoods in the file's order."""
    pytest.importorskip("lm_eval", reason="install the extra 'golden' to compare with lm-evaluation-harness")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder.mkdir()
    included = Path(lm_eval.__file__).parent / "tasks" / "crows_pairs" / "crows_pairs_english.yaml"
    (folder / "local.yaml").write_text(TASK.format(included=included, file=file, cache=folder / "cache"))
    model = HFLM(
        pretrained=str(models.BUNDLED_DIR),
        peft=None if adapter is None else str(adapter),
        device="cpu",
        dtype=dtype,
        batch_size=16,
    )
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, tasks=["crows_pairs_local"], task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    samples = sorted(found["samples"]["crows_pairs_local"], key=lambda sample: sample["doc_id"])
    logp = np.array([[answer[0][0] for answer in sample["resps"]] for sample in samples], dtype=np.float64)
    return found["results"]["crows_pairs_local"]["pct_stereotype,none"], logp


def ours(suite: Suite, adapter: Path | None, dtype: str) -> np.ndarray:
    """(n, 2) log-likelihoods as `compare` computes them."""
    base = models.load(models.BUNDLED, dtype=getattr(torch, dtype))
    rows = base.rows(suite.items)
    asked = base if adapter is None else _attach(base, adapter, [])
    return stacked.score(asked, NO_LORA, [], [rows])[0].logp


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(("dtype", "relative"), [("float64", 0.0), ("float32", 5e-7)])
def test_same_likelihoods_and_same_pct_stereotype(crows_pairs, adapter, tmp_path, adapted, dtype, relative):
    """Within 1e-4; in float32 the harness also rounds each sum of up to -1000 to that precision, a few in 1e7."""
    suite = load(crows_pairs)
    assert len(suite.items) == ITEMS
    folder = adapter if adapted else None
    share, theirs = harness(tmp_path / "task", crows_pairs, folder, dtype)
    found = ours(suite, folder, dtype)
    assert theirs.shape == found.shape == (ITEMS, 2)
    np.testing.assert_allclose(found, theirs, rtol=relative, atol=1e-4)
    (preference,) = compare(models.BUNDLED, folder, [suite]).pct_stereotype
    assert preference.items == ITEMS
    assert (preference.adapted if adapted else preference.base) == pytest.approx(share, abs=1e-12)


def test_the_adapter_changes_the_answer(crows_pairs, adapter):
    """Else the test above would show nothing about adapters."""
    suite = load(crows_pairs)
    assert np.abs(ours(suite, adapter, "float32") - ours(suite, None, "float32")).max() > 1.0
