"""MMPretrain adapter: the backbone at several timesteps, and the classification heads.

Import it by a config's ``custom_imports``::

    custom_imports = dict(imports=['diffbackbone.mmpretrain'], allow_failed_imports=False)
    model = dict(
        type='ImageClassifier',
        backbone=dict(type='DiffusionTaps', unet='gd256_uncond', blocks=[24], freeze=True),
        head=dict(type='DiffusionHead', head='attention', in_channels=1024, num_classes=1000,
                  size=16),
    )
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffbackbone.openmmlab.repairs import prepare

prepare("mmpretrain")

from mmpretrain.models.heads import ClsHead  # noqa: E402
from mmpretrain.registry import MODELS  # noqa: E402
from torch import Tensor  # noqa: E402

from diffbackbone.heads import DifFormerHead, build_head  # noqa: E402
from diffbackbone.openmmlab import checks, engine, fsdp  # noqa: E402, F401  registered
from diffbackbone.openmmlab.backbone import DiffusionBackbone  # noqa: E402


@MODELS.register_module()
class DiffusionTaps(DiffusionBackbone):
    """Taps at one or more timesteps, neither projected nor resized: the input of the heads.

    Args:
        unet: See :class:`diffbackbone.openmmlab.backbone.DiffusionBackbone`.
        timesteps: t, 0-based, one or several; DifFormer's paper setting has several (Section 3.2).
        blocks: Tapped blocks, 1-based.
        **kwargs: Other arguments of the backbone, without ``timestep``, ``out_channels`` and
            ``out_strides``.
    """

    def __init__(
        self,
        unet: Any = "gd256_uncond",
        timesteps: Sequence[int] | int = (150,),
        blocks: Sequence[int] | int = (24,),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            unet,
            timestep=timesteps,
            blocks=blocks,
            out_channels=None,
            out_strides=None,
            **kwargs,
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the taps of a batch.

        Args:
            images: (N, 3, H, W) RGB in [-1, 1].

        Returns:
            One map (N, C_b, ceil(H / stride_b), ceil(W / stride_b)) for each timestep and block,
            all blocks of a timestep after one another.
        """
        taps = self.forward_taps(images)
        return tuple(taps[t, b] for t in self.timesteps for b in self.blocks)


@MODELS.register_module()
class DiffusionHead(ClsHead):
    """One of :data:`diffbackbone.heads.HEADS` with MMPretrain's loss and predictions.

    Args:
        head: The head's name; ``"difformer"`` takes several maps, all others one.
        loss: Config of the loss; None takes cross entropy.
        topk: Top-k accuracies that are reported in training with ``cal_acc``.
        cal_acc: Whether to report accuracies in training.
        init_cfg: MMEngine's initialization.
        **options: Arguments of the head.
    """

    def __init__(
        self,
        head: str,
        loss: dict | None = None,
        topk: int | tuple[int, ...] = (1,),
        cal_acc: bool = False,
        init_cfg: dict | None = None,
        **options: Any,
    ) -> None:
        loss = loss or {"type": "CrossEntropyLoss", "loss_weight": 1.0}
        super().__init__(loss=loss, topk=topk, cal_acc=cal_acc, init_cfg=init_cfg)
        self.layers = build_head(head, **options)

    def pre_logits(self, feats: tuple[Tensor, ...]) -> Tensor | list[Tensor]:
        """Return the head's input: all maps, by timestep and then by block, or the only one."""
        if isinstance(self.layers, DifFormerHead):
            return list(feats)
        (x,) = feats
        return x

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Return scores (N, num_classes) before the softmax."""
        return self.layers(self.pre_logits(feats))
