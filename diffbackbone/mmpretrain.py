"""MMPretrain adapter: the backbone at several timesteps, and the classification heads.

Import it by a config's ``custom_imports``::

    custom_imports = dict(imports=['diffbackbone.mmpretrain'], allow_failed_imports=False)
    model = dict(
        type='ImageClassifier',
        backbone=dict(type='DiffusionTaps', unet='gd256_uncond', blocks=[24], freeze=True),
        head=dict(type='DiffusionAttentionHead', in_channels=1024, num_classes=1000, size=16),
    )
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from diffbackbone.openmmlab import repairs

repairs.check_mmpretrain_stack()
repairs.apply_mmengine_repairs()

from mmpretrain.models.heads import ClsHead  # noqa: E402
from mmpretrain.registry import MODELS  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from diffbackbone import heads  # noqa: E402
from diffbackbone.openmmlab import (  # noqa: E402
    CheckInputsHook,
    DiffusionBackbone,
    DiffusionOptimWrapperConstructor,
)

__all__ = [
    "CheckInputsHook",
    "DifFormerHead",
    "DiffusionAttentionHead",
    "DiffusionBackbone",
    "DiffusionCNNHead",
    "DiffusionLinearHead",
    "DiffusionMLPHead",
    "DiffusionOptimWrapperConstructor",
    "DiffusionTaps",
]


@MODELS.register_module()
class DiffusionTaps(DiffusionBackbone):
    """Raw taps at one or more timesteps, neither projected nor resized, as heads take them.

    Args:
        unet: See :class:`diffbackbone.openmmlab.DiffusionBackbone`.
        timesteps: t, 0-based, one or several; DifFormer's paper setting has several (Section 3.2).
        blocks: Tapped blocks, 1-based.
        **kwargs: Other arguments of the backbone; ``timestep``, ``out_channels`` and
            ``out_strides`` excepted.

    Raises:
        ValueError: There is no timestep, one is given twice, or see
            :class:`diffbackbone.DiffusionBackbone`.
    """

    def __init__(
        self,
        unet: Any = "gd256_uncond",
        timesteps: Sequence[int] | int = (150,),
        blocks: Sequence[int] | int = (24,),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            unet, timestep=0, blocks=blocks, out_channels=None, out_strides=None, **kwargs
        )
        self.timesteps = self.schedule.check_timesteps(timesteps)
        self.timestep = self.timesteps[0]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Taps of a batch.

        Args:
            images: (N, 3, H, W) RGB in [-1, 1].

        Returns:
            One map (N, C_b, ceil(H / stride_b), ceil(W / stride_b)) for each timestep and block,
            all blocks of a timestep after one another.
        """
        taps = self.forward_taps(images, self.timesteps)
        return tuple(taps[t, b] for t in self.timesteps for b in self.blocks)


class _DiffusionClsHead(ClsHead):
    """One of :mod:`diffbackbone.heads` with MMPretrain's loss and predictions.

    Args:
        loss: Config of the loss.
        topk: Top-k accuracies that are reported in training with ``cal_acc``.
        cal_acc: Whether to report accuracies in training.
        init_cfg: MMEngine's initialisation.
        **kwargs: Arguments of the head.

    Raises:
        ValueError: See the head.
    """

    layers_type: ClassVar[type[nn.Module]]

    def __init__(
        self,
        loss: dict | None = None,
        topk: int | tuple[int, ...] = (1,),
        cal_acc: bool = False,
        init_cfg: dict | None = None,
        **kwargs: Any,
    ) -> None:
        loss = loss or {"type": "CrossEntropyLoss", "loss_weight": 1.0}
        super().__init__(loss=loss, topk=topk, cal_acc=cal_acc, init_cfg=init_cfg)
        self.layers = self.layers_type(**kwargs)

    def pre_logits(self, feats: tuple[Tensor, ...]) -> Any:
        """The map that the head takes: the only one.

        Raises:
            ValueError: There are several.
        """
        if len(feats) != 1:
            raise ValueError(
                f"{type(self).__name__} takes one map, got {len(feats)}: give the backbone one "
                "block and one timestep, or take DifFormerHead"
            )
        return feats[0]

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Scores (N, num_classes) before the softmax."""
        return self.layers(self.pre_logits(feats))


@MODELS.register_module()
class DiffusionLinearHead(_DiffusionClsHead):
    """:class:`diffbackbone.heads.LinearHead`."""

    layers_type = heads.LinearHead


@MODELS.register_module()
class DiffusionMLPHead(_DiffusionClsHead):
    """:class:`diffbackbone.heads.MLPHead`."""

    layers_type = heads.MLPHead


@MODELS.register_module()
class DiffusionCNNHead(_DiffusionClsHead):
    """:class:`diffbackbone.heads.CNNHead`."""

    layers_type = heads.CNNHead


@MODELS.register_module()
class DiffusionAttentionHead(_DiffusionClsHead):
    """:class:`diffbackbone.heads.AttentionHead`."""

    layers_type = heads.AttentionHead


@MODELS.register_module()
class DifFormerHead(_DiffusionClsHead):
    """:class:`diffbackbone.heads.DifFormerHead`, on the maps of :class:`DiffusionTaps`."""

    layers_type = heads.DifFormerHead

    def pre_logits(self, feats: tuple[Tensor, ...]) -> list[Tensor]:
        """All maps, by timestep and then by block."""
        return list(feats)
