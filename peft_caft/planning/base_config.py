"""The configuration of a base model, read by itself: no weights are needed."""

from __future__ import annotations

from pathlib import Path

import transformers
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, PretrainedConfig

from ..basics.hub_errors import explained, first_line


def read_config(model: str) -> PretrainedConfig:
    """A model's configuration, out of a ``config.json``, a folder that holds one, or the Hub (or
    its cache).

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: if it is not there or cannot be had.
        ValueError: if transformers does not know what it describes.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"model: no config.json in {model!r}, expected one. Give a model folder, a config.json or a Hub id."
            )
    elif not path.is_file():
        with explained("model", model):
            path = Path(hf_hub_download(model, "config.json"))
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"model: {path} is no configuration that transformers {transformers.__version__} knows ({first_line(error)}). "
            "Expected that of a causal language model in transformers itself; models with code of their own are not read."
        ) from error
