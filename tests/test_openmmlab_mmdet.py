"""The MMDetection adapter: Mask R-CNN from the config trains and predicts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import golden
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "mmdet" / "mask_rcnn_gd_t75_b24_coco.py"


for module in ("mmengine", "mmcv", "mmdet"):
    pytest.importorskip(module, reason=f"{module} is not installed")
if importlib.util.find_spec("mmcv._ext") is None:
    pytest.skip("mmdet needs mmcv with compiled operators", allow_module_level=True)


@pytest.fixture
def cfg():
    """The config, with the U-Net and the heads made small."""
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet")
    cfg = Config.fromfile(str(CONFIG))
    cfg.model.backbone.update(unet="tiny", init_cfg=None, out_channels=32)
    cfg.model.neck.update(in_channels=[32] * 4)
    cfg.model.roi_head.bbox_head.update(fc_out_channels=64, num_classes=3)
    cfg.model.roi_head.mask_head.update(num_convs=1, num_classes=3)
    cfg.model.train_cfg.rpn_proposal.update(nms_pre=200, max_per_img=50)
    cfg.model.train_cfg.rcnn.sampler.update(num=32)
    cfg.model.test_cfg.rcnn.score_thr = 0.0  # it has learned nothing
    return cfg


def batch(sizes=((64, 96), (90, 70))) -> dict:
    """Random images with two instances each."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    inputs, samples = [], []
    for height, width in sizes:
        boxes = torch.tensor([[8.0, 8.0, 40.0, 48.0], [30.0, 20.0, 60.0, 60.0]])
        masks = torch.zeros(2, height, width, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
            mask[top:bottom, left:right] = 1
        sample = DetDataSample(
            gt_instances=InstanceData(
                bboxes=boxes,
                labels=torch.tensor([0, 2]),
                masks=BitmapMasks(masks.numpy(), height, width),
            )
        )
        shape = dict(img_shape=(height, width), ori_shape=(height, width))
        sample.set_metainfo({**shape, "scale_factor": (1.0, 1.0)})
        inputs.append(torch.randint(0, 256, (3, height, width), dtype=torch.uint8))
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


@pytest.mark.parametrize("feedback", [None, "bottleneck"])
def test_mask_rcnn_trains_and_predicts(cfg, feedback):
    from mmdet.registry import MODELS
    from mmengine.optim import build_optim_wrapper

    torch.manual_seed(0)
    cfg.model.backbone.feedback = feedback
    cfg.optim_wrapper.update(type="OptimWrapper")  # without mixed precision
    cfg.optim_wrapper.pop("dtype")
    model = MODELS.build(cfg.model).train()
    model.init_weights()
    golden.fill(model.backbone.unet)  # fresh residual branches are zero
    assert type(model).__name__ == "MaskRCNN"
    assert type(model.backbone).__module__ == "diffbackbone.openmmlab.backbone"
    data = model.data_preprocessor(batch(), True)
    assert data["inputs"].amin() >= -1
    assert data["inputs"].amax() <= 1
    losses = model(**data, mode="loss")
    assert {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"} <= set(losses)
    loss, _ = model.parse_losses(losses)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    rates = {group["lr"] for group in optimizer.param_groups}
    assert len(rates) > 10  # layer-wise decay
    first = model.backbone.unet.input_blocks[0][0].weight
    before = first.detach().clone()
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    optimizer.step()
    assert not torch.equal(before, first)

    model.eval()
    with torch.no_grad():
        results = model.test_step(batch())
    for result, (height, width) in zip(results, ((64, 96), (90, 70))):
        found = result.pred_instances
        assert len(found) > 0
        assert found.masks.shape == (len(found), height, width)
        assert found.bboxes.isfinite().all()
        assert set(found.labels.tolist()) <= {0, 1, 2}
