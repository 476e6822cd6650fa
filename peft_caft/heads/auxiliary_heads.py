"""`AuxiliaryHeads`: the heads that predict tokens t+2 ... t+n from a hidden state at t.

A head holds only its own parameters. The final norm and the unembedding are the base model's,
frozen and shared, and come from a `Backbone` at run time.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..basics.provenance import source_name
from .backbone import Backbone
from .config import DEFAULT_NUM_HEADS, HeadInput, HeadsConfig, HeadType, fingerprint
from .layer_copy import linear_of, plain_copy
from .layer_replay import LayerAtRows, replay
from .pretrained import PretrainedHeads
from .sharding import gathered, whole
from .watched_pass import Captured


class ResidualBlock(nn.Module):
    """``x + SiLU(W x)`` with W ``(hidden, hidden)``, zero at first: it starts as the identity.

    It is Medusa's block (arXiv 2401.10774), without its bias unless imported heads have one.
    """

    def __init__(self, hidden_size: int, device: torch.device, dtype: torch.dtype, bias: bool = False) -> None:
        super().__init__()
        weight = torch.zeros(hidden_size, hidden_size, device=device, dtype=dtype)
        self.linear = linear_of(weight, torch.zeros_like(weight[0]) if bias else None)

    def forward(self, states: Tensor) -> Tensor:
        """Map ``(rows, hidden)`` in the dtype of the parameters to the same shape and dtype."""
        inputs = states
        if not torch.is_autocast_enabled(states.device.type):  # the stream may be fp32 between layers in bf16 (Mamba)
            inputs = states.to(self.linear.weight.dtype)
        return states + nn.functional.silu(self.linear(inputs))


class ResidualHead(nn.Sequential):
    """A stack of residual blocks, which see each token alone."""

    def states(
        self, hidden: Tensor, rows: Tensor, captured: Captured, skip_queries: bool = True, most: int | None = None
    ) -> Tensor:
        """States of the selected positions, before the final norm.

        Args:
            hidden: hidden states that the head reads, ``(batch, tokens, hidden)``.
            rows: int64 ``(selected,)``, ascending indices into the ``batch * tokens`` positions.
            captured: arguments of the base model's last layer; residual blocks need none.
            skip_queries: allow decoder layers to compute the selected positions alone.
            most: largest number of ``rows`` in one sequence, if it is known.

        Returns:
            ``(selected, hidden)`` in the dtype of the head, or of autocast.
        """
        return self(hidden.flatten(0, 1)[rows])


class DecoderLayerHead(nn.Sequential):
    """A stack of layers of the base model's own kind, called as the model called its last layer.

    The last layer of the stack needs queries of ``rows`` alone, as `LayerAtRows` computes them.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self._at_rows = LayerAtRows()

    def states(
        self, hidden: Tensor, rows: Tensor, captured: Captured, skip_queries: bool = True, most: int | None = None
    ) -> Tensor:
        """Final states of the selected positions; `ResidualHead.states` describes the arguments."""
        *earlier, last = self
        for layer in earlier:
            hidden = replay(layer, hidden, captured)
        if skip_queries and (states := self._at_rows(last, hidden, rows, captured, most)) is not None:
            return states
        return replay(last, hidden, captured).flatten(0, 1)[rows]


class AuxiliaryHeads(PretrainedHeads):
    """n - 1 auxiliary heads of a base model: ``heads[0]`` predicts 2 tokens ahead, ``heads[-1]`` n.

    A head that reads the input x of the last decoder layer computes
    ``lm_head(final_norm(head_k(x)))``; one that reads the last hidden state, which is normed
    already, computes ``lm_head(head_k(x))``. Norm and unembedding are the base model's.

    Example:
        >>> heads = AuxiliaryHeads.from_base_model(model, num_heads=4)  # fresh, untrained
        >>> heads.save_pretrained("heads")
        >>> heads = AuxiliaryHeads.from_pretrained("heads", base_model=model)
        >>> two_ahead, *others = heads.logits(model, input_ids)  # each (batch, tokens, vocabulary)
    """

    def __init__(self, config: HeadsConfig, heads: list[ResidualHead | DecoderLayerHead]) -> None:
        super().__init__()
        self.config = config
        self.heads = nn.ModuleList(heads)

    @classmethod
    def from_base_model(
        cls,
        model: nn.Module,
        num_heads: int = DEFAULT_NUM_HEADS,
        head_type: HeadType = "decoder_layer",
        head_input: HeadInput = "last_layer_input",
        head_num_layers: int = 1,
        residual_bias: bool = False,
    ) -> AuxiliaryHeads:
        """Make heads for ``model``, on its device and in its dtype. They must be trained first.

        Args:
            model: a transformers causal language model; PEFT adapters in it are left out.
            num_heads: number of heads, n - 1.
            head_type: ``"residual"`` (starts as the identity) or ``"decoder_layer"`` (copies of the
                last layer, so that with ``head_input="last_layer_input"`` every head starts with
                the model's own next-token logits).
            head_input: ``"last_layer_input"`` or ``"last_hidden_state"``.
            head_num_layers: number of blocks or layers per head.
            residual_bias: give residual blocks a bias.

        Raises:
            TypeError: if the model is not a decoder-only causal language model.
            ValueError: if an argument is out of range.
        """
        backbone = Backbone.of(model)
        base = backbone.model
        config = HeadsConfig(
            head_type=head_type,
            head_input=head_input,
            num_heads=num_heads,
            head_num_layers=head_num_layers,
            residual_bias=residual_bias,
            final_norm=head_input == "last_layer_input",
            hidden_size=backbone.hidden_size,
            vocab_size=backbone.vocab_size,
            unembedding_fingerprint=fingerprint(whole(backbone.lm_head.weight)) or [],
            base_model_name_or_path=source_name(base.name_or_path) if base.name_or_path else None,
            base_model_revision=getattr(base.config, "_commit_hash", None),
            base_model_class=type(base).__name__,
        )
        return cls.from_config(config, backbone)

    @classmethod
    def from_config(cls, config: HeadsConfig, backbone: Backbone) -> AuxiliaryHeads:
        """Heads of the described shape; ``decoder_layer`` heads start as copies of the last layer.

        A layer that is constructed instead would draw from the global generator, leave the experts
        of a mixture empty, and might have another kind of attention than the last layer's mask.
        """
        weight = backbone.lm_head.weight

        def block() -> nn.Module:
            if config.head_type == "residual":
                return ResidualBlock(config.hidden_size, weight.device, weight.dtype, config.residual_bias)
            with gathered(backbone.last_layer.parameters()):
                return plain_copy(backbone.last_layer, weight.dtype)

        head_class = ResidualHead if config.head_type == "residual" else DecoderLayerHead
        stacks = [[block() for _ in range(config.head_num_layers)] for _ in range(config.num_heads)]
        return cls(config, [head_class(*stack) for stack in stacks])

    def train(self, mode: bool = True) -> AuxiliaryHeads:
        """Keep frozen heads in evaluation mode: dropout adds noise and advances the generator."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    def keep_first(self, count: int, source: str = "given") -> None:
        """Drop all but the first ``count`` heads of ``source``; a ValueError if it has fewer."""
        if count > len(self.heads):
            raise ValueError(
                f"num_auxiliary_heads: got {count}, expected at most {len(self.heads)}, which is what the heads "
                f"{source!r} hold. Set num_auxiliary_heads={len(self.heads)} or use heads trained for more tokens."
            )
        self.heads = self.heads[:count]
        self.config.num_heads = count

    def states(
        self,
        index: int,
        captured: Captured,
        rows: Tensor,
        backbone: Backbone,
        skip_queries: bool = True,
        most: int | None = None,
    ) -> Tensor:
        """Final states of one head, ready for the unembedding.

        Args:
            index: 0 for the head that predicts 2 tokens ahead.
            captured: record of the base model's forward pass over ``(batch, tokens)``.
            rows, skip_queries, most: arguments of `ResidualHead.states`.
            backbone: parts of that base model; the final norm is used.

        Returns:
            ``(selected, hidden)`` in the dtype of the hidden states.

        Raises:
            TypeError: if decoder-layer heads cannot be called as the model calls its last layer.
        """
        if self.config.head_type == "decoder_layer" and not backbone.probed().layer_replays:
            raise TypeError(
                f"head_type: got 'decoder_layer' with {type(backbone.model).__name__}, whose last layer needs more than its "
                "arguments (called again, it gives something else), expected 'residual'. Set head_type='residual'."
            )
        hidden = getattr(captured, self.config.head_input)
        head = self.heads[index]
        # Heads that train in fp32 run in the base model's half precision, as mixed precision does.
        mixed = hidden.dtype in (torch.bfloat16, torch.float16) and next(head.parameters()).dtype == torch.float32
        with torch.autocast(hidden.device.type, dtype=hidden.dtype) if mixed else nullcontext():
            states = head.states(hidden, rows, captured, skip_queries, most)
        states = states.to(hidden.dtype)
        return backbone.normed(states) if self.config.final_norm else states

    @torch.no_grad()
    def logits(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> list[Tensor]:
        """Logits of every head at every position, without graph.

        Args:
            model: the base model, or a PEFT model around it, whose active adapters take part.
            input_ids: int64 ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``, 1 for tokens and 0 for padding.
            position_ids: int64 ``(batch, tokens)``.

        Returns:
            ``(batch, tokens, vocabulary)`` for each head, fp32 or better; entry i is for t + i + 2.

        Raises:
            ValueError: if the heads were made for another base model.
        """
        backbone = Backbone.of(model)
        self.config.require_base_model(whole(backbone.lm_head.weight), "given")
        with backbone.capture() as records:
            backbone.trunk(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            )
        rows = torch.arange(input_ids.numel(), device=input_ids.device)
        shape = (*input_ids.shape, backbone.vocab_size)
        unembedding = backbone.unembedding(records[-1])
        states = (self.states(index, records[-1], rows, backbone) for index in range(len(self.heads)))
        return [unembedding.logits(s.to(unembedding.weight.dtype)).view(shape) for s in states]

    def plain_state_dict(self) -> dict[str, Tensor]:
        """Name -> parameter; LoRA inside the heads (``train_heads="lora"``) is merged into them."""
        if not any(isinstance(module, BaseTunerLayer) for module in self.modules()):
            return self.state_dict()
        merged = copy.deepcopy(self)
        for name, module in list(merged.named_modules()):
            if isinstance(module, BaseTunerLayer):
                module.merge()
                parent, _, child = name.rpartition(".")
                setattr(merged.get_submodule(parent), child, module.get_base_layer())
        return merged.state_dict()
