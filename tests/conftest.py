"""What holds for every test: none asks the Hub, and none waits for the garbage collector to walk through torch."""

import gc
import os

# Before huggingface_hub and torch are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# The models are tiny, and more threads only contend. And sums that are compared to the last bit must be made in one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.disable()  # while modules are imported


def pytest_collection_finish() -> None:
    """Keep what the imports made out of every later garbage collection.

    Libraries collect all garbage at the end of a run, and each collection walks through the million objects of imported modules:
    half of the processor time of the tests.
    """
    gc.freeze()
    gc.enable()
