"""Write scenes as ADE20K (SceneParse150) and COCO (instances and panoptic).

Labels of the ADE20K maps: 0 unlabelled (the soft rim of a digit), 1 background, 2 to 11 the digits
0 to 9. Categories of the COCO files: 1 to 10, the digits 0 to 9 (things), and in the panoptic ones
11, background (stuff), with the rim void. The maps of `panoptic_stuff_*`, the semantic half that
Detectron2's `register_coco_panoptic_separated` reads: 0 things, 1 background, 255 unlabelled.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from diffbackbone.sample_data.scenes import BACKGROUND, DIGIT_NAMES, Scene
from diffbackbone.utils import write_json, write_text

FORMAT_VERSION = 2  # 2: with COCO's panoptic files
ADE_FOLDERS = {"train": "training", "val": "validation"}
BACKGROUND_CATEGORY = len(DIGIT_NAMES) + 1  # of COCO, after the digits
STUFF_OF_LABEL = np.array([255, 1, *(0 for _ in DIGIT_NAMES)], np.uint8)
DESCRIPTION = (
    "diffbackbone sample data: handwritten digits (UCI, CC BY 4.0) on photographs (china.jpg and "
    "flower.jpg, CC BY 2.0) of scikit-learn"
)
_SEGMENT_IDS = 1 << 24
_SEGMENT_STEP = 0x9E3779  # odd, so its multiples below _SEGMENT_IDS are distinct and never 0


def save_jpeg(image: np.ndarray, path: Path) -> None:
    """Write RGB bytes as JPEG."""
    Image.fromarray(image).save(path, quality=95)


def write_labelled(root: Path, split: str, scenes: Iterable[Scene]) -> None:
    """Write the scenes of a split in both layouts."""
    ade, coco = root / "ADEChallengeData2016", root / "coco"
    images, annotations = (ade / kind / ADE_FOLDERS[split] for kind in ("images", "annotations"))
    coco_images, segment_maps, stuff_maps = (
        coco / f"{kind}{split}2017" for kind in ("", "panoptic_", "panoptic_stuff_")
    )
    for folder in (images, annotations, coco_images, segment_maps, stuff_maps):
        folder.mkdir(parents=True)
    write_text(ade / "classes.txt", "\n".join(["background", *DIGIT_NAMES]) + "\n")
    records: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    panoptic: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes, 1):
        ade_name, coco_name = f"ADE_{split}_{number:08d}", f"{number:012d}"
        save_jpeg(scene.image, images / f"{ade_name}.jpg")
        save_jpeg(scene.image, coco_images / f"{coco_name}.jpg")
        Image.fromarray(scene.labels).save(annotations / f"{ade_name}.png")
        Image.fromarray(STUFF_OF_LABEL[scene.labels]).save(stuff_maps / f"{coco_name}.png")
        segment_map, segments = draw_segments(scene)
        Image.fromarray(segment_map).save(segment_maps / f"{coco_name}.png")
        height, width = scene.labels.shape
        size = {"width": width, "height": height}
        records.append({"id": number, "file_name": f"{coco_name}.jpg", **size})
        panoptic.append(
            {"image_id": number, "file_name": f"{coco_name}.png", "segments_info": segments}
        )
        for pasted, segment in zip(scene.digits, segments):
            instance = {**segment, "id": len(instances) + 1, "image_id": number}
            instance["bbox"] = [float(value) for value in segment["bbox"]]
            instance["segmentation"] = mask_to_polygons(pasted.mask)
            instances.append(instance)
    things = [
        {"id": number, "name": name, "supercategory": "digit"}
        for number, name in enumerate(DIGIT_NAMES, 1)
    ]
    background = {"id": BACKGROUND_CATEGORY, "name": "background", "supercategory": "background"}
    both = [*({**thing, "isthing": 1} for thing in things), {**background, "isthing": 0}]
    for kind, entries, categories in (
        ("instances", instances, things), ("panoptic", panoptic, both)
    ):  # fmt: skip
        content = {
            "info": {"description": DESCRIPTION},
            "images": records,
            "annotations": entries,
            "categories": categories,
        }
        write_json(coco / "annotations" / f"{kind}_{split}2017.json", content, indent=None)


def draw_segments(scene: Scene) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Draw the panoptic map of a scene: a segment for each digit and one for the background.

    Returns:
        (H, W, 3) RGB bytes, in which the id of a segment is R + 256 G + 65536 B and 0 is void (the
        rim of a digit), and COCO's `segments_info`: the digits in the scene's order, then the
        background. Ids are unique in the scene and far apart as colors.
    """
    parts = [(pasted.digit + 1, pasted.mask) for pasted in scene.digits]
    parts.append((BACKGROUND_CATEGORY, scene.labels == BACKGROUND))
    ids = np.zeros(scene.labels.shape, np.uint32)
    segments = []
    for number, (category, mask) in enumerate(parts, 1):
        segment = {"id": number * _SEGMENT_STEP % _SEGMENT_IDS, "category_id": category}
        ids[mask] = segment["id"]
        area, box = int(mask.sum()), list(cv2.boundingRect(mask.astype(np.uint8)))
        segments.append({**segment, "area": area, "bbox": box, "iscrowd": 0})
    channels = [(ids >> shift) & 0xFF for shift in (0, 8, 16)]
    return np.stack(channels, axis=-1).astype(np.uint8), segments


def mask_to_polygons(mask: np.ndarray) -> list[list[float]]:
    """Cover a mask with polygons, as COCO wants them.

    COCO's polygons have no holes, so a piece with a hole is cut in two through the column of the
    hole's centroid, until none is left. Pixel (x, y) is the square from (x, y) to (x + 1, y + 1);
    the polygons cover the mask exactly.
    """
    polygons = []
    parts = [mask]
    while parts:
        count, areas = cv2.connectedComponents(parts.pop().astype(np.uint8), connectivity=8)
        for area in range(1, count):
            piece = areas == area
            column = _hole_column(piece)
            if column is None:
                polygons.append(_outline(piece))
                continue
            is_left = np.arange(piece.shape[1]) < column
            parts += [piece & is_left, piece & ~is_left]
    return polygons


def _hole_column(piece: np.ndarray) -> int | None:
    """Return the column of the centroid of a hole, None if the piece has no hole."""
    empty = np.pad(~piece, 1, constant_values=True).astype(np.uint8)
    count, areas, _, centroids = cv2.connectedComponentsWithStats(empty, connectivity=4)
    holes = [area for area in range(1, count) if area != areas[0, 0]]
    return round(centroids[holes[0]][0]) - 1 if holes else None


def _outline(piece: np.ndarray) -> list[float]:
    """Return the outline of a connected piece without holes, along the edges of its pixels.

    At twice the size, the outermost pixels that `cv2.findContours` walks along are even where the
    edge lies before them and odd where it lies after, so halving upwards lands on the edge.
    """
    double = piece.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, _ = cv2.findContours(double, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    points = (contours[0][:, 0].astype(np.int64) + 1) // 2
    points = points[(points != np.roll(points, 1, axis=0)).any(axis=1)]
    steps = np.roll(points, -1, axis=0) - points
    corners = (steps != np.roll(steps, 1, axis=0)).any(axis=1)
    return points[corners].astype(float).ravel().tolist()
