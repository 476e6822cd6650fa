"""Turns heads that the CAFT authors' package trained into an artifact of this one.

caft-llm (0.0.1, and its repository up to commit d10c79e) saves heads as ``heads.pth``: a pickled
state dict with the keys ``HEAD.layers.LAYER.PARAMETER``. Parameters named ``linear.*`` belong to
residual blocks with a bias, all others to a ``LlamaDecoderLayer``. The file does not say what the
heads read:

- The code that trains heads alone, and writes such a file, feeds them the input of the base model's
  last layer (``hidden_states[-2]``): the default here, ``last_layer_input``.
- Its fine-tuning (stage 2) feeds the same heads the last hidden state, one layer further and
  normed, from which they predict much worse: ``last_hidden_state`` here.

Neither has the final norm between head and unembedding.
"""

import re
import zipfile
from pathlib import Path
from typing import get_args

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ..basics.adapters import whole_model
from ..basics.checks import require_choice
from ..basics.files import file_sha256, new_folder
from ..basics.hub_errors import explained
from ..basics.provenance import provenance
from ..basics.reading import require_whole_archive
from ..basics.tensors import shape_difference, shapes_of
from ..heads.auxiliary_heads import AuxiliaryHeads
from ..heads.backbone import Backbone
from ..heads.config import HeadInput

HEADS_NAME = "heads.pth"
_KEY = re.compile(r"(\d+)\.layers\.(\d+)\.(.+)")
_ADVICE = "Expected what caft-llm saves with torch.save(model.auxiliary_head.state_dict(), 'heads.pth')."


def import_heads(
    source: str,
    model: str,
    output: str,
    head_input: HeadInput = "last_layer_input",
    base_model_id: str | None = None,
    license: str | None = None,
    revision: str | None = None,
) -> AuxiliaryHeads:
    """Turn caft-llm's ``heads.pth`` into an artifact, which appears whole or not at all.

    The heads predict what they predict in that package, except for rows padded on the left: there
    it calls decoder-layer heads without a mask and with positions from 0. (With eager attention its
    heads see the future, and cannot be compared.)

    Args:
        source: the file, or a Hub repository that holds a ``heads.pth``.
        model: the base model that the heads were trained for, folder or Hub id.
        head_input: what the heads read.
        base_model_id: Hub id to record as the base model, where ``model`` is a local copy.
        revision: branch, tag or commit of ``source`` on the Hub.

    Returns:
        the heads, in the file's own dtype.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: if the file cannot be had.
        FileExistsError: if ``output`` holds anything.
        ValueError: if the file is no state dict of such heads or does not fit the base model.
        TypeError: if caft-llm cannot have trained these heads for this kind of base model.
    """
    require_choice("head_input", head_input, get_args(HeadInput))
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"output: {output} exists, expected a new folder. Remove it or choose another one.")
    if revision is not None and Path(source).exists():
        raise ValueError(f"revision: got {revision!r} for the file {source}, which has none. Leave it out.")
    path = _find(source, revision)
    record = {"imported_from": "caft-llm", "file": path.name, "file_sha256": file_sha256(path)}
    if not Path(source).exists():  # then the file lies under snapshots/COMMIT of the Hub's cache
        record |= {"repository": source, "revision": path.parent.name}
    heads = heads_of(read_state_dict(path), whole_model(model, dtype="auto"), head_input)
    config = heads.config
    config.base_model_name_or_path = base_model_id or config.base_model_name_or_path
    config.license = license
    config.training = record | provenance()
    with new_folder(folder) as made:
        heads.save_pretrained(made)
    return heads


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a ``heads.pth``, name -> tensor on the CPU, without executing anything in it.

    Raises:
        ValueError: if the file holds anything else than finite floating-point tensors.
    """
    require_whole_archive(path)
    try:
        # Only a zip archive, the format since torch 1.6, can be mapped instead of read.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # the unpickler may raise anything for bytes that are no pickle
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path}: refused, since reading it would run code: it holds {refused[1]}, expected tensors alone. "
                f"{_ADVICE} Use a file from a source that you trust, with nothing but the state dict in it."
            ) from error
        raise ValueError(
            f"{path}: damaged, or not a file that torch.save wrote ({type(error).__name__}). {_ADVICE} Get the file again."
        ) from error
    if not isinstance(state, dict) or not state:
        raise ValueError(
            f"{path}: got {'an empty' if state == {} else 'a'} {type(state).__name__}, expected a state dict. {_ADVICE}"
        )
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {key!r} is a {type(value).__name__}, expected a tensor. {_ADVICE}")
        if not value.is_floating_point() or value.layout != torch.strided:
            raise ValueError(
                f"{path}: {key!r} is {value.dtype}, {value.layout}, expected dense floating point. {_ADVICE}"
            )
        if not value.isfinite().all():
            raise ValueError(
                f"{path}: {key!r} holds infinite values or NaN, expected finite ones. Train the heads again."
            )
    return state


def heads_of(
    state: dict[str, Tensor], model: PreTrainedModel, head_input: HeadInput = "last_layer_input"
) -> AuxiliaryHeads:
    """Heads of this package with the weights of caft-llm's.

    Args:
        state: result of `read_state_dict`; all tensors are used.
        model: the base model that the heads were trained for.

    Raises:
        ValueError: if names or shapes do not fit such heads for this base model.
        TypeError: if caft-llm cannot have trained them for this kind of base model.
    """
    num_heads, num_layers = _counts(state)
    is_residual = any(".linear." in key for key in state)
    _require_alike(Backbone.of(model), is_residual)
    heads = AuxiliaryHeads.from_base_model(
        model,
        num_heads,
        "residual" if is_residual else "decoder_layer",
        head_input,
        num_layers,
        residual_bias=is_residual,
    )
    theirs = {name: re.sub(r"heads\.(\d+)\.(\d+)\.", r"\1.layers.\2.", name) for name in heads.state_dict()}
    expected = {theirs[name]: shape for name, shape in shapes_of(heads.state_dict()).items()}
    if difference := shape_difference(shapes_of(state), expected):
        raise ValueError(
            f"heads: do not fit the base model, whose hidden size is {heads.config.hidden_size}: {difference} Pass the base "
            "model that the heads were trained for."
        )
    heads.load_state_dict({name: state[key] for name, key in theirs.items()}, assign=True)
    heads.config.final_norm = False
    return heads


def _find(source: str, revision: str | None) -> Path:
    path = Path(source)
    if path.is_dir():
        raise FileNotFoundError(f"heads: got the folder {source!r}, expected a file such as {path / HEADS_NAME}.")
    if path.is_file():
        return path
    if path.suffix in (".pth", ".pt", ".bin"):
        raise FileNotFoundError(
            f"heads: no file {source!r}. Expected caft-llm's {HEADS_NAME}, or a Hub repository id."
        )
    with explained("heads", source, revision):
        return Path(hf_hub_download(source, HEADS_NAME, revision=revision))


def _counts(state: dict[str, Tensor]) -> tuple[int, int]:
    """Number of heads, and number of layers of each head."""
    for part, what in (
        ("lora_", "LoRA layers, whose scale it does not hold; merge them with PEFT before you save the heads"),
        (".lm_head.", "heads with an unembedding of their own (--separate-unembed), which this package does not have"),
    ):
        if found := [key for key in state if part in key]:
            raise ValueError(f"heads: the file holds {what}; first {found[0]!r}. {_ADVICE}")
    matches = {key: _KEY.fullmatch(key) for key in state}
    if unknown := [key for key, match in matches.items() if match is None]:
        raise ValueError(
            f"heads: {len(unknown)} unknown name(s), first {unknown[0]!r}, expected HEAD.layers.LAYER.PARAMETER. {_ADVICE}"
        )
    places = {(int(match[1]), int(match[2])) for match in matches.values() if match}
    num_heads, num_layers = (1 + max(numbers) for numbers in zip(*places, strict=True))
    for index in range(num_heads * num_layers):
        head, layer = divmod(index, num_layers)
        if (head, layer) not in places:
            raise ValueError(
                f"heads: {head}.layers.{layer} is missing, expected {num_heads} heads of {num_layers} layer(s), after the "
                f"highest numbers in the file. {_ADVICE}"
            )
    return num_heads, num_layers


def _require_alike(backbone: Backbone, is_residual: bool) -> None:
    """Refuse base models for which the weights mean something else here than in caft-llm.

    Layers of other models than Llama may have the same names and shapes but compute something else.
    """
    layer = type(backbone.last_layer).__name__
    if not is_residual and type(backbone.last_layer) is not LlamaDecoderLayer:
        raise TypeError(
            f"model: got one whose layers are {layer}, expected a Llama, since caft-llm's decoder-layer heads are "
            "LlamaDecoderLayer. Pass the base model that the heads were trained for."
        )
    known = backbone.probed()
    if known.scale != 1 or known.softcap:
        raise TypeError(
            f"model: got {type(backbone.model).__name__}, which scales or caps its logits, expected one that does not: "
            "caft-llm leaves that out. Train heads for it with `peft-caft train-heads`."
        )
