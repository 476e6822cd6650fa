"""Reads the configuration of a base model without its weights."""

from pathlib import Path

import transformers
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, PretrainedConfig

from ..basics.hub_errors import explained, first_line


def read_config(model: str) -> PretrainedConfig:
    """Read a ``config.json``, that of a folder, or that of a Hub id, which the cache may answer.

    Raises:
        FileNotFoundError: if there is no such model.
        PermissionError, ConnectionError: if the Hub refuses it or cannot be reached.
        ValueError: if transformers does not know the configuration.
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
    except Exception as error:  # huggingface_hub's checks of types, for one, have errors of their own
        raise ValueError(
            f"model: {path} is no configuration that transformers {transformers.__version__} knows ({first_line(error)}). "
            "Expected a causal language model that is part of transformers; models with code of their own are not read."
        ) from error
