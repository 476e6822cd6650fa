"""What tests of several processes and of their simulation share."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version

accelerate_wraps_so = pytest.mark.skipif(
    Version(version("accelerate")) < Version("1.15"),
    reason="accelerate 1.15 gives embedding and lm_head units of their own",
)


LAYERS, HEADS = 2, 2


SIZES = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
