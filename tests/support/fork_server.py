"""What the server of `forked_command` has done before it forks, besides imports: a table that each process would build anew."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("llama")
