"""What the server of `forked_command` does before its imports, and a table that each process would build anew."""

import gc

gc.disable()  # while modules are imported

from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402

get_checkpoint_conversion_mapping("llama")
