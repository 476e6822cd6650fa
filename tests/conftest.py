"""The tests never ask the Hub: set before huggingface_hub is imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
