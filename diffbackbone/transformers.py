"""Hugging Face transformers: the backbone for UperNet, Mask2Former and other models.

Importing this module registers its classes with transformers' Auto classes.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import warnings
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.backbone_utils import (
    BackboneConfigMixin,
    BackboneMixin,
    filter_output_hidden_states,
)
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple

from diffbackbone.backbone import DiffusionBackbone

OPTIONS = {
    name: parameter.default
    for name, parameter in inspect.signature(DiffusionBackbone).parameters.items()
    if name not in ("checkpoint", "dtype", "schedule", "save_frozen")
}
"""Arguments of :class:`diffbackbone.DiffusionBackbone` that a config holds, with their defaults."""
_OF_LOADING = ("attn_implementation", "experts_implementation")


class DiffusionBackboneConfig(BackboneConfigMixin, transformers.PreTrainedConfig):
    """Configuration of :class:`DiffusionBackboneModel`.

    The stages are the tapped blocks in the order of ``blocks``, named ``"block<b>"`` (1-based).

    Args:
        checkpoint: Path or URL of the U-Net's weights, read when a new model is built. It is not
            saved: ``save_pretrained`` writes the weights themselves.
        out_features: Names of the stages that become feature maps, for example ``["block24"]``.
        out_indices: The same by 0-based position in ``blocks``. With neither, the last stage.
        **kwargs: Arguments of :class:`diffbackbone.DiffusionBackbone` but ``dtype``, ``schedule``
            and ``save_frozen``, and of ``PreTrainedConfig``. For half precision give ``dtype`` to
            ``from_pretrained`` or ``from_config``.

    Raises:
        ValueError: A block is named twice, or there is no such stage.
    """

    model_type = "diffbackbone"

    def __post_init__(self, **kwargs: Any) -> None:
        for name, default in OPTIONS.items():
            # as JSON gives it back, so that a saved config equals the loaded one
            value = json.dumps(kwargs.pop(name, default), default=dataclasses.asdict)
            setattr(self, name, json.loads(value))
        self.checkpoint = kwargs.pop("checkpoint", None)
        blocks = [self.blocks] if isinstance(self.blocks, int) else self.blocks
        self.stage_names = [f"block{block}" for block in blocks]
        if len(set(self.stage_names)) < len(self.stage_names):
            raise ValueError(f"blocks of a transformers backbone must differ, got {blocks}")
        self.set_output_features_output_indices(
            kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        )
        # transformers would keep a misspelled argument without a word
        unknown = kwargs.keys() - {*dir(self), *_OF_LOADING}
        unknown = sorted(name for name in unknown if not name.startswith("_"))
        if unknown:
            warnings.warn(
                f"DiffusionBackboneConfig does not know {', '.join(unknown)}; its arguments are "
                f"checkpoint, out_features, out_indices, {', '.join(OPTIONS)}",
                stacklevel=2,
            )
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration for JSON, without paths of this machine."""
        local = ("checkpoint", "_name_or_path")
        return {name: value for name, value in super().to_dict().items() if name not in local}


class DiffusionBackboneModel(BackboneMixin, transformers.PreTrainedModel):
    """:class:`diffbackbone.DiffusionBackbone`, in ``model``, as a transformers backbone."""

    config_class = DiffusionBackboneConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    has_attentions = False

    def __init__(self, config: DiffusionBackboneConfig) -> None:
        super().__init__(config)
        loading = torch.get_default_device().type == "meta"  # in from_pretrained
        options = {name: getattr(config, name) for name in OPTIONS}
        self.model = DiffusionBackbone(**options, checkpoint=None if loading else config.checkpoint)
        self.num_features = list(self.model.channels)
        frozen = [name for name, p in self.named_parameters() if not p.requires_grad]
        self._to_freeze = frozen if loading else []
        if not loading:  # transformers must not initialize the weights anew
            for module in self.model.modules():
                module._is_hf_initialized = True
        self.post_init()

    def train(self, mode: bool = True) -> DiffusionBackboneModel:
        """Set training mode, and freeze what ``from_pretrained``, which calls this, unfroze."""
        while self._to_freeze:
            self.get_parameter(self._to_freeze.pop()).requires_grad_(False)
        return super().train(mode)

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self, pixel_values: Tensor, class_labels: Tensor | None = None, **kwargs: Any
    ) -> BackboneOutput:
        """Compute the feature maps.

        Args:
            pixel_values: (N, 3, H, W) RGB in [-1, 1], of any size from 32 px.
            class_labels: Labels (N,) for a class-conditional U-Net, in place of ``class_label``.
            **kwargs: ``output_hidden_states`` asks for the maps of all stages, too.

        Returns:
            ``feature_maps``: one map (N, C_i, ceil(H / s_i), ceil(W / s_i)) for each of
            ``out_features``.
        """
        maps = tuple(self.model(pixel_values, class_labels))
        chosen = tuple(maps[index] for index in self.out_indices)
        return BackboneOutput(feature_maps=chosen, hidden_states=maps)


class DiffusionImageProcessor(transformers.SegformerImageProcessor):
    """Segformer's image processor with mean and std 0.5, which gives pixels in [-1, 1]."""

    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)


transformers.AutoConfig.register("diffbackbone", DiffusionBackboneConfig, exist_ok=True)
transformers.AutoBackbone.register(DiffusionBackboneConfig, DiffusionBackboneModel, exist_ok=True)
transformers.AutoImageProcessor.register(
    DiffusionBackboneConfig, fast_image_processor_class=DiffusionImageProcessor, exist_ok=True
)
