"""One Hub and one process of its client, which takes seconds to start, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ..support.hub_client import Client, client_environment
from ..support.hub_server import HubServer

IMPORTS = """
import json, os
from pathlib import Path
import torch
from peft import get_peft_model
from peft_caft import CAFTConfig
from tests.support.seeded_heads import load, made, push, seed_of
from tests.support.tiny_checkpoint import save_checkpoint, tiny_llama
"""


@pytest.fixture(scope="session")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """The client's ``HF_HOME``."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def client(hub, home) -> Iterator[Client]:
    with Client(client_environment(hub.endpoint, home), IMPORTS) as process:
        yield process
