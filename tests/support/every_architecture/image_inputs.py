"""Batches with an image in every row, as the processor of a vision-language model would place them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

SIDE, PATCH = 16, 4  # pixels, as `configs` has them
GRID = SIDE // PATCH
AREA = 3 * PATCH * PATCH  # numbers of a patch
COUNTS = (4, 16, 1, 2, 3, 5, 6, 8, 9, 12, 17, 18, 20, 24, 32, 36, 64)  # image tokens of a row, tried in this order
IMAGE_TOKEN = ("image_token_id", "image_token_index", "image_patch_id", "img_context_token_id", "video_token_index")
# Layouts of the pixels of two images: patches by themselves, whole images, images in parts, patches of each image.
PATCHES = ((2 * GRID**2, AREA), (2 * GRID**2, 2 * AREA), (2 * GRID**2, 3, PATCH, PATCH))
IMAGES = ((2, 3, SIDE, SIDE), (2, 1, 3, SIDE, SIDE), (2, 2, 3, SIDE, SIDE), (2, 1, 4, 3, SIDE, SIDE))
PATCHES_OF_IMAGES = ((2, GRID**2, AREA), (2, 4, 4 * AREA), (1, 3, PATCH, 2 * GRID**2 * PATCH))


class NoImages(Exception):
    """No way was found to give the model an image."""


def with_images(model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs of a forward pass whose logits depend on the pixels.

    Raises:
        NoImages: with the last error that the model raised.
    """
    reason = "takes no pixel_values"
    for pixels in _pixel_values(model):
        counts, tried = list(COUNTS), set()
        while counts:
            count = counts.pop(0)
            if count in tried:
                continue
            tried.add(count)
            given = _inputs(model, pixels, count)
            try:
                if _depends_on_pixels(model, given):
                    return given
                reason = "its logits do not depend on pixel_values"
            except Exception as error:
                reason = " ".join(str(error).split())[:300]
                if "match" not in reason:
                    break
                if len(tried) == 1:  # the message tells how many features two images, or one, have
                    told = [int(number) for number in re.findall(r"\b\d+\b", reason)]
                    counts = [n for n in (*(t // 2 for t in told), *told) if 0 < n < 200] + counts
    raise NoImages(reason)


@torch.no_grad()
def _depends_on_pixels(model: PreTrainedModel, given: dict[str, Any]) -> bool:
    pixels = given["pixel_values"]
    outputs = []
    for values in (pixels, pixels + torch.randn(pixels.shape, generator=torch.Generator().manual_seed(4))):
        torch.manual_seed(0)
        outputs.append(model(**given | {"pixel_values": values}).logits)
    return bool((outputs[0] - outputs[1]).abs().max() > 1e-6)


def _pixel_values(model: PreTrainedModel) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(3)
    takes_grids = {"image_grid_thw", "image_grid_hw"} & _parameters(model)
    for shape in (*(PATCHES if takes_grids else ()), *IMAGES, *PATCHES_OF_IMAGES):
        yield torch.rand(shape, generator=generator)


def _parameters(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _image_token(model: PreTrainedModel) -> int:
    """-1 if the model takes no tokens for an image."""
    found = [getattr(model.config, name, None) for name in IMAGE_TOKEN]
    found.append((getattr(model.config, "vocabulary_map", None) or {}).get("<image>"))
    return next((token for token in found if isinstance(token, int)), -1)


def _inputs(model: PreTrainedModel, pixels: Tensor, count: int) -> dict[str, Any]:
    parameters, token = _parameters(model), _image_token(model)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(20, 60, (2, 14), generator=generator)
    ids = text if token < 0 else torch.cat([text[:, :2], torch.full((2, count), token), text[:, 2:]], dim=1)
    is_image, grid, side = (ids == token).long(), torch.tensor([[GRID, GRID]] * 2), torch.arange(GRID)
    in_the_prompt = torch.zeros(ids.shape, dtype=torch.bool)
    in_the_prompt[:, 2:6] = True
    optional = {
        "image_grid_thw": torch.tensor([[1, GRID, GRID]] * 2),
        "image_grid_hw": grid,
        "spatial_shapes": grid,
        "target_sizes": grid,
        "image_sizes": torch.tensor([[SIDE, SIDE]] * 2),
        "image_merge_sizes": torch.tensor([2, 2]),
        "token_type_ids": is_image,
        "mm_token_type_ids": is_image,
        "moe_mm_token_type_ids": is_image,
        "qformer_input_ids": text[:, :3],
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, 4, dtype=torch.long),
        "cross_attention_mask": torch.ones(2, ids.shape[1], 1, 4, dtype=torch.long),
        "image_attention_mask": torch.ones(2, ids.shape[1], 1, dtype=torch.long),
        "image_embeds_position_mask": in_the_prompt,
        "high_res_pixel_values": torch.rand(2, 3, 4 * SIDE, 4 * SIDE, generator=generator),
    }
    if pixels.dim() == 3:  # patches of each image
        optional["pixel_attention_mask"] = torch.ones(pixels.shape[:2], dtype=torch.long)
        positions = side[: int(pixels.shape[1] ** 0.5)]
        optional["image_position_ids"] = torch.cartesian_prod(positions, positions).expand(2, -1, -1)
    if type(model).__name__.startswith("Llava") and not hasattr(model.config, "image_grid_pinpoints"):
        del optional["image_sizes"]  # only another vision tower takes them
    return {
        "input_ids": ids,
        "pixel_values": pixels,
        **{name: value for name, value in optional.items() if name in parameters},
    }
