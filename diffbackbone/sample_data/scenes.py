"""Make a small data set for segmentation and detection, without a download.

Each scene shows handwritten digits (the 8x8 scans of `sklearn.datasets.load_digits`) of many
sizes, pasted on a crop of a photograph (`sklearn.datasets.load_sample_images`). The same scenes
are written as ADE20K (SceneParse150) and as COCO (instances and panoptic), so the usual readers of
MMSegmentation and Detectron2 find what they expect; a folder of further scenes has no labels, for
pretraining.

Training and validation share neither a scan nor a pixel of a photograph: the scans are split
class by class, and each photograph is cut into a left part (training) and a right part
(validation). Scene i of a split depends on the seed, the split and i alone, so a larger set starts
with the scenes of a smaller one.

Labels of the ADE20K maps: 0 unlabelled (the soft rim of a digit), 1 background, 2 to 11 the digits
0 to 9. Categories of the COCO files: 1 to 10, the digits 0 to 9 (things), and in the panoptic ones
11, background (stuff), with the rim void. The maps of `panoptic_stuff_*`, the semantic half that
Detectron2's `register_coco_panoptic_separated` reads: 0 things, 1 background, 255 unlabelled.

    python tools/make_sample_data.py --out data/sample
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_MISSING: ImportError | None = None
try:
    import cv2
    from PIL import Image, ImageDraw, ImageFont
    from sklearn.datasets import load_digits, load_sample_images
    from tqdm import tqdm
except ImportError as error:  # reported by make_sample_data, after the arguments are checked
    _MISSING = error

FORMAT_VERSION = 2  # 2: with COCO's panoptic files
TOOL = "diffbackbone make_sample_data"
MANIFEST = "sample_data.json"

SPLITS = ("train", "val", "unlabelled")  # the order is part of the seeding: only append
TRAIN_SCAN_SHARE = 0.75
TRAIN_PHOTO_SHARE = 0.7

DIGIT_NAMES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"
)  # fmt: skip
UNLABELLED = 0
BACKGROUND = 1
FIRST_DIGIT = 2
CLASS_NAMES = ("unlabelled", "background", *DIGIT_NAMES)
BACKGROUND_CATEGORY = len(DIGIT_NAMES) + 1  # of COCO, after the digits
STUFF_OF_LABEL = (255, 1, *(0 for _ in DIGIT_NAMES))  # unlabelled, background, things

PALETTE = (
    (236, 236, 236), (38, 44, 56), (230, 57, 70), (244, 140, 54), (255, 214, 64), (146, 200, 62),
    (34, 160, 107), (64, 196, 220), (58, 110, 230), (142, 84, 233), (232, 94, 190), (160, 108, 74),
)  # fmt: skip

MIN_SCENE_SIZE = 32
_SCAN_SPLIT_KEY = (1000,)  # scenes have keys of two numbers
_SCAN_SIDE = 8
_PADDED_SIDE = _SCAN_SIDE + 2  # one empty pixel all round, so that strokes at the edge fade out
_SEGMENT_IDS = 1 << 24
_SEGMENT_STEP = 0x9E3779  # odd, so its multiples below _SEGMENT_IDS are distinct and never 0


class SampleDataError(ValueError):
    """The sample data cannot be made as asked; the message says why and what would do."""


@dataclass(frozen=True)
class SceneConfig:
    """How scenes look.

    Attributes:
        min_size: Smallest height and width of a scene.
        max_size: Largest height and width of a scene.
        min_digits: Fewest digits drawn for a scene; those that find no room are left out.
        max_digits: Most digits drawn for a scene.
        digit_size: Smallest and largest digit, as a share of the scene's short side.
        background_scale: Smallest and largest side of the photo crop, in sides of the scene.
        background_brightness: The photo is dimmed to this share, so that light digits stand out
            and a network trained from random weights finds them within minutes.
        ink: Ink of the enlarged scan (0 to 1) that is still clear, and that is already opaque.
        mask_threshold: Opacity above which a pixel belongs to the digit.
        rim_threshold: Opacity above which a pixel outside the digit is unlabelled.
        min_contrast: Distance of a digit's colour from what is behind it, in CIELAB units of
            which the two of chroma count a quarter.
        gap: Empty pixels kept between digits.
        max_tries: Places tried for a digit before it is left out.
    """

    min_size: int = 64
    max_size: int = 96
    min_digits: int = 3
    max_digits: int = 7
    digit_size: tuple[float, float] = (0.25, 0.5)
    background_scale: tuple[float, float] = (0.5, 1.5)
    background_brightness: float = 0.6
    ink: tuple[float, float] = (0.15, 0.7)
    mask_threshold: float = 0.5
    rim_threshold: float = 0.2
    min_contrast: float = 36.0
    gap: int = 1
    max_tries: int = 40

    def __post_init__(self) -> None:
        _require(
            self.min_size >= MIN_SCENE_SIZE,
            f"min-size must be at least {MIN_SCENE_SIZE}, but {self.min_size} was given",
        )
        _require(
            self.max_size >= self.min_size,
            f"max-size must be at least min-size ({self.min_size}), but {self.max_size} was given",
        )
        _require(
            1 <= self.min_digits <= self.max_digits,
            "digits must be MIN MAX with 1 <= MIN <= MAX, "
            f"but {self.min_digits} {self.max_digits} was given",
        )
        _require_range("digit_size", self.digit_size, 0.25, 0.8)
        _require_range("background_scale", self.background_scale, 0.1, 10.0)
        _require(
            0.0 < self.background_brightness <= 1.0,
            "background_brightness must be above 0 and at most 1, but "
            f"{self.background_brightness} was given",
        )
        _require_range("ink", self.ink, 0.0, 1.0)
        _require(
            self.ink[0] < self.ink[1],
            f"ink must be two different values, but {self.ink} was given",
        )
        _require(
            0.0 < self.rim_threshold <= self.mask_threshold < 1.0,
            "thresholds must obey 0 < rim_threshold <= mask_threshold < 1, but "
            f"{self.rim_threshold} and {self.mask_threshold} were given",
        )
        _require(self.gap >= 0, f"gap must be at least 0, but {self.gap} was given")
        _require(self.max_tries >= 1, f"max_tries must be at least 1, but {self.max_tries} given")


@dataclass(frozen=True)
class Pool:
    """What the scenes of a split are made of; nothing else reaches them.

    Attributes:
        scans: Scans of digits, N x 8 x 8, ink from 0 to 1.
        classes: The digit that each scan shows.
        indices: Place of each scan in `load_digits`.
        photos: The split's part of each photograph, H x W x 3 RGB bytes.
    """

    scans: np.ndarray
    classes: np.ndarray
    indices: np.ndarray
    photos: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class PastedDigit:
    """A digit in a scene.

    Attributes:
        digit: What it shows, 0 to 9.
        scan: Place of its scan in `load_digits`.
        mask: Pixels that belong to it, a boolean H x W array.
    """

    digit: int
    scan: int
    mask: np.ndarray

    @property
    def bbox(self) -> tuple[int, int, int, int]:
        """Left, top, width and height of the mask."""
        return _bounding_box(self.mask)


@dataclass(frozen=True)
class Scene:
    """A picture with its labels.

    Attributes:
        image: H x W x 3 RGB bytes.
        labels: H x W bytes: 0 unlabelled, 1 background, 2 to 11 the digits 0 to 9.
        digits: The digits in it.
    """

    image: np.ndarray
    labels: np.ndarray
    digits: tuple[PastedDigit, ...]


@dataclass
class _Tally:
    """Counts over the labelled scenes."""

    pixels: np.ndarray = field(default_factory=lambda: np.zeros(len(CLASS_NAMES), np.int64))
    scenes: dict[str, np.ndarray] = field(
        default_factory=lambda: {
            split: np.zeros(len(CLASS_NAMES), np.int64) for split in ("train", "val")
        }
    )

    def add(self, split: str, labels: np.ndarray) -> None:
        """Count a label map."""
        pixels = np.bincount(labels.ravel(), minlength=len(CLASS_NAMES))
        self.pixels += pixels
        self.scenes[split] += pixels > 0

    def ratios(self) -> np.ndarray:
        """Share of each class among the labelled pixels, in the order of `CLASS_NAMES`."""
        ratios = self.pixels.astype(np.float64)
        ratios[UNLABELLED] = 0.0
        return ratios / max(ratios.sum(), 1.0)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SampleDataError(message)


def _require_range(name: str, given: tuple[float, float], low: float, high: float) -> None:
    _require(
        len(given) == 2 and low <= given[0] <= given[1] <= high,
        f"{name} must be two ascending values from {low} to {high}, but {given} was given",
    )


def _bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return left, top, width and height of a mask that is not empty."""
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top


def _check_dependencies() -> None:
    if _MISSING is not None:
        raise SampleDataError(
            f"making the sample data needs packages that cannot be imported here ({_MISSING}); "
            "install them with: pip install diffbackbone[sample]"
        ) from _MISSING


# ------------------------------------------------------------------------------------- sources


def split_scans(classes: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Divide scans between training and validation, each class in the same proportion.

    Args:
        classes: The digit that each scan shows.
        seed: Seed of the division.

    Returns:
        Ascending positions of the scans of "train" and of "val".
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=_SCAN_SPLIT_KEY))
    train: list[int] = []
    val: list[int] = []
    for digit in range(len(DIGIT_NAMES)):
        members = rng.permutation(np.flatnonzero(classes == digit))
        cut = round(TRAIN_SCAN_SHARE * len(members))
        train.extend(members[:cut].tolist())
        val.extend(members[cut:].tolist())
    return {"train": np.sort(np.array(train)), "val": np.sort(np.array(val))}


def photo_columns(width: int) -> dict[str, tuple[int, int]]:
    """Divide the columns of a photograph between training (left) and validation (right).

    Args:
        width: Width of the photograph.

    Returns:
        First column and the column after the last, of "train" and of "val".
    """
    cut = round(TRAIN_PHOTO_SHARE * width)
    return {"train": (0, cut), "val": (cut, width)}


def build_pools(
    scans: np.ndarray, classes: np.ndarray, photos: Iterable[np.ndarray], seed: int
) -> dict[str, Pool]:
    """Divide scans and photographs among the splits.

    Args:
        scans: Scans of digits, N x 8 x 8, ink from 0 to 1.
        classes: The digit that each scan shows.
        photos: Photographs, H x W x 3 RGB bytes.
        seed: Seed of the division of the scans.

    Returns:
        A pool for each of `SPLITS`; that of "unlabelled" is that of "train".
    """
    photos = list(photos)
    pools = {}
    for split, indices in split_scans(classes, seed).items():
        parts = []
        for photo in photos:
            first, end = photo_columns(photo.shape[1])[split]
            parts.append(np.ascontiguousarray(photo[:, first:end]))
        pools[split] = Pool(scans[indices], classes[indices], indices, tuple(parts))
    pools["unlabelled"] = pools["train"]
    return pools


def load_pools(seed: int) -> dict[str, Pool]:
    """Load scikit-learn's scans and photographs and divide them among the splits.

    Args:
        seed: Seed of the division of the scans.

    Returns:
        A pool for each of `SPLITS`.

    Raises:
        SampleDataError: If a package is missing.
    """
    _check_dependencies()
    digits = load_digits()
    scans = (digits.images / 16.0).astype(np.float32)
    return build_pools(scans, digits.target.astype(np.int64), load_sample_images().images, seed)


# -------------------------------------------------------------------------------------- scenes


def _draw_shape(rng: np.random.Generator, config: SceneConfig) -> tuple[int, int]:
    """Draw height and width: different, and no multiples of 32, wherever the range allows."""
    sizes = list(range(config.min_size, config.max_size + 1))
    sizes = [size for size in sizes if size % 32] or sizes
    height = int(rng.choice(sizes))
    width = int(rng.choice([size for size in sizes if size != height] or sizes))
    return height, width


def _draw_background(
    rng: np.random.Generator, config: SceneConfig, pool: Pool, height: int, width: int
) -> np.ndarray:
    photo = pool.photos[int(rng.integers(len(pool.photos)))]
    scale = rng.uniform(*config.background_scale)
    scale = min(scale, photo.shape[0] / height, photo.shape[1] / width)
    crop_height = min(max(round(scale * height), 1), photo.shape[0])
    crop_width = min(max(round(scale * width), 1), photo.shape[1])
    top = int(rng.integers(photo.shape[0] - crop_height + 1))
    left = int(rng.integers(photo.shape[1] - crop_width + 1))
    crop = photo[top : top + crop_height, left : left + crop_width]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    interpolation = cv2.INTER_AREA if scale > 1 else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(crop), (width, height), interpolation=interpolation)


def _draw_digit(rng: np.random.Generator, pool: Pool) -> tuple[int, int]:
    """Draw a digit, each class as likely as the others, and then the position of a scan of it."""
    digit = int(rng.choice(np.unique(pool.classes)))
    return digit, int(rng.choice(np.flatnonzero(pool.classes == digit)))


def _enlarge(scan: np.ndarray, size: int, ink: tuple[float, float]) -> np.ndarray:
    """Return the opacity of a scan whose 8 pixels measure `size`, cropped to what shows."""
    side = max(round(size * _PADDED_SIDE / _SCAN_SIDE), _PADDED_SIDE)
    padded = np.pad(scan.astype(np.float32), 1)
    large = cv2.resize(padded, (side, side), interpolation=cv2.INTER_CUBIC)
    alpha = np.clip((large - ink[0]) / (ink[1] - ink[0]), 0.0, 1.0)
    rows = np.flatnonzero((alpha > 0).any(axis=1))
    columns = np.flatnonzero((alpha > 0).any(axis=0))
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _pick_colour(rng: np.random.Generator, behind: np.ndarray, min_contrast: float) -> np.ndarray:
    """Pick a light colour of random hue that stands out from the pixels behind it.

    Saturation and value are drawn until the colour is far enough from most of the pixels; where
    none is, the farthest one is taken, among them a pale one of that hue and white.
    """
    tries = 32
    hsv = np.empty((tries + 2, 1, 3), np.float32)
    hsv[..., 0] = rng.uniform(0.0, 360.0)
    hsv[:tries, 0, 1] = rng.uniform(0.05, 0.6, tries)
    hsv[:tries, 0, 2] = rng.uniform(0.8, 1.0, tries)
    hsv[tries:, 0, 1:] = (0.25, 1.0), (0.0, 1.0)
    colours = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    step = max(1, min(behind.shape[:2]) // 24)
    pixels = behind[::step, ::step].astype(np.float32) / 255.0
    distance = (
        cv2.cvtColor(colours, cv2.COLOR_RGB2LAB)
        - cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB).reshape(1, -1, 3)
    ) * np.array([1.0, 0.25, 0.25], np.float32)  # lightness matters most to the eye
    contrast = np.percentile(np.linalg.norm(distance, axis=-1), 15, axis=1)
    enough = np.flatnonzero(contrast >= min_contrast)
    best = enough[0] if len(enough) else np.argmax(contrast)
    return colours[best, 0] * 255.0


def _find_room(
    rng: np.random.Generator,
    config: SceneConfig,
    scan: np.ndarray,
    taken: np.ndarray,
) -> tuple[int, int, np.ndarray] | None:
    """Draw size and place of a digit; the largest size is lowered as tries fail.

    Returns:
        Top, left and opacity; None if no room was found.
    """
    height, width = taken.shape
    short = min(height, width)
    low, high = config.digit_size
    alpha = np.empty((0, 0))
    for attempt in range(config.max_tries):
        if attempt % 10 == 0:
            share = rng.uniform(low, high)
            high = share
            alpha = _enlarge(scan, max(round(share * short), 1), config.ink)
        tall, wide = alpha.shape
        top = int(rng.integers(height - tall + 1))
        left = int(rng.integers(width - wide + 1))
        around = taken[
            max(top - config.gap, 0) : top + tall + config.gap,
            max(left - config.gap, 0) : left + wide + config.gap,
        ]
        if not around.any():
            return top, left, alpha
    return None


def make_scene(pool: Pool, config: SceneConfig, seed: int, split: str, index: int) -> Scene:
    """Make a scene; the same arguments always give the same one.

    Args:
        pool: Scans and photographs to make it of.
        config: How it looks.
        seed: Seed of the data set, 0 or more.
        split: One of `SPLITS`.
        index: Number of the scene in its split, 0 or more.

    Returns:
        The scene; it has at least one digit.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index))
    rng = np.random.default_rng(sequence)
    height, width = _draw_shape(rng, config)
    image = _draw_background(rng, config, pool, height, width).astype(np.float32)
    image *= config.background_brightness
    opacity = np.zeros((height, width), np.float32)
    labels = np.full((height, width), BACKGROUND, np.uint8)
    taken = np.zeros((height, width), bool)
    digits = []
    for _ in range(int(rng.integers(config.min_digits, config.max_digits + 1))):
        digit, member = _draw_digit(rng, pool)
        room = _find_room(rng, config, pool.scans[member], taken)
        if room is None:
            continue
        top, left, alpha = room
        box = np.s_[top : top + alpha.shape[0], left : left + alpha.shape[1]]
        colour = _pick_colour(rng, image[box], config.min_contrast)
        image[box] += alpha[..., None] * (colour - image[box])
        opacity[box] = alpha
        taken[box] = True
        mask = np.zeros((height, width), bool)
        mask[box] = alpha > config.mask_threshold
        labels[mask] = FIRST_DIGIT + digit
        digits.append(PastedDigit(digit, int(pool.indices[member]), mask))
    rim = (opacity > config.rim_threshold) & (opacity <= config.mask_threshold)
    labels[rim] = UNLABELLED
    pixels = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return Scene(pixels, labels, tuple(digits))


# ------------------------------------------------------------------------------------ polygons


def _hole_column(piece: np.ndarray) -> int | None:
    """Return the column of the centroid of a hole, None if the piece has no hole."""
    empty = np.pad(~piece, 1, constant_values=True).astype(np.uint8)
    count, areas = cv2.connectedComponents(empty, connectivity=4)
    for area in range(1, count):
        if area != areas[0, 0]:
            return round(float(np.nonzero(areas == area)[1].mean())) - 1
    return None


def _outline(piece: np.ndarray) -> list[float]:
    """Return the outline of a connected piece without holes, along the edges of its pixels.

    At twice the size, the outermost pixels that `cv2.findContours` walks along are even where the
    edge lies before them and odd where it lies after, so halving upwards lands on the edge.
    """
    double = piece.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, _ = cv2.findContours(double, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    points = (contours[0][:, 0].astype(np.int64) + 1) // 2
    points = points[(points != np.roll(points, 1, axis=0)).any(axis=1)]
    before = points - np.roll(points, 1, axis=0)
    after = np.roll(points, -1, axis=0) - points
    corners = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    return points[corners].astype(float).ravel().tolist()


def mask_to_polygons(mask: np.ndarray) -> list[list[float]]:
    """Cover a mask with polygons, as COCO wants them.

    COCO's polygons have no holes, so a piece with a hole is cut in two through the column of the
    hole's centroid, until none is left. Coordinates are those of COCO, in which pixel (x, y) is
    the square from (x, y) to (x + 1, y + 1); the polygons cover the mask exactly.

    Args:
        mask: A boolean H x W array.

    Returns:
        Polygons, each x0, y0, x1, y1 and so on.
    """
    polygons = []
    parts = [np.asarray(mask, bool)]
    while parts:
        count, areas = cv2.connectedComponents(parts.pop().astype(np.uint8), connectivity=8)
        for area in range(1, count):
            piece = areas == area
            column = _hole_column(piece)
            if column is None:
                polygons.append(_outline(piece))
                continue
            left, right = piece.copy(), piece
            left[:, column:] = False
            right[:, :column] = False
            parts += [left, right]
    return polygons


# --------------------------------------------------------------------------------------- files


def _write_json(path: Path, content: Any, indent: int | None = None) -> None:
    text = json.dumps(content, indent=indent)
    path.write_bytes(f"{text}\n".encode())


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _digit_categories() -> list[dict[str, Any]]:
    return [
        {"id": number, "name": name, "supercategory": "digit"}
        for number, name in enumerate(DIGIT_NAMES, 1)
    ]


def _panoptic_categories() -> list[dict[str, Any]]:
    categories = [
        {**category, "isthing": 1, "color": list(PALETTE[label])}
        for label, category in enumerate(_digit_categories(), FIRST_DIGIT)
    ]
    background = CLASS_NAMES[BACKGROUND]
    categories.append(
        {
            "id": BACKGROUND_CATEGORY,
            "name": background,
            "supercategory": background,
            "isthing": 0,
            "color": list(PALETTE[BACKGROUND]),
        }
    )
    return categories


def _coco(split: str, categories: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "info": {
            "description": f"diffbackbone sample data, {split}: handwritten digits on photographs",
            "url": "",
            "version": str(FORMAT_VERSION),
            "year": 2026,
            "contributor": "made by tools/make_sample_data.py from scikit-learn's data sets",
            "date_created": "",
        },
        "licenses": [
            {
                "id": 1,
                "name": "Attribution 2.0 Generic (photographs china.jpg and flower.jpg)",
                "url": "https://creativecommons.org/licenses/by/2.0/",
            },
            {
                "id": 2,
                "name": "Attribution 4.0 International (UCI handwritten digits)",
                "url": "https://creativecommons.org/licenses/by/4.0/",
            },
        ],
        "images": [],
        "annotations": [],
        "categories": categories,
    }


def _coco_annotation(number: int, image_id: int, pasted: PastedDigit) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image_id,
        "category_id": pasted.digit + 1,
        "bbox": [float(value) for value in pasted.bbox],
        "area": int(pasted.mask.sum()),
        "iscrowd": 0,
        "segmentation": mask_to_polygons(pasted.mask),
    }


def draw_segments(scene: Scene) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Draw the panoptic map of a scene: a segment for each digit and one for the background.

    Args:
        scene: The scene.

    Returns:
        H x W x 3 RGB bytes, in which the id of a segment is R + 256 G + 65536 B and 0 is void (the
        rim of a digit), and COCO's `segments_info`: the digits in the scene's order, then the
        background. Ids are unique in the scene and far apart as colours.
    """
    parts = [(pasted.digit + 1, pasted.mask) for pasted in scene.digits]
    parts.append((BACKGROUND_CATEGORY, scene.labels == BACKGROUND))
    ids = np.zeros(scene.labels.shape, np.uint32)
    segments = []
    for number, (category, mask) in enumerate(parts, 1):
        segment_id = number * _SEGMENT_STEP % _SEGMENT_IDS
        ids[mask] = segment_id
        segments.append(
            {
                "id": segment_id,
                "category_id": category,
                "area": int(mask.sum()),
                "bbox": list(_bounding_box(mask)),
                "iscrowd": 0,
            }
        )
    channels = [(ids >> shift) & 0xFF for shift in (0, 8, 16)]
    return np.stack(channels, axis=-1).astype(np.uint8), segments


def _save_jpeg(image: np.ndarray, path: Path) -> None:
    Image.fromarray(image).save(path, quality=95)


def _write_labelled(root: Path, split: str, scenes: Iterable[Scene], tally: _Tally) -> None:
    ade = root / "ADEChallengeData2016"
    folder = {"train": "training", "val": "validation"}[split]
    images = ade / "images" / folder
    annotations = ade / "annotations" / folder
    coco_images = root / "coco" / f"{split}2017"
    coco_annotations = root / "coco" / "annotations"
    segment_maps = root / "coco" / f"panoptic_{split}2017"
    stuff_maps = root / "coco" / f"panoptic_stuff_{split}2017"
    for path in (images, annotations, coco_images, coco_annotations, segment_maps, stuff_maps):
        path.mkdir(parents=True, exist_ok=True)
    coco = _coco(split, _digit_categories())
    panoptic = _coco(split, _panoptic_categories())
    panoptic["images"] = coco["images"]
    stuff_of_label = np.array(STUFF_OF_LABEL, np.uint8)
    for number, scene in enumerate(scenes, 1):
        name = f"ADE_{split}_{number:08d}"
        _save_jpeg(scene.image, images / f"{name}.jpg")
        Image.fromarray(scene.labels).save(annotations / f"{name}.png")
        _link(images / f"{name}.jpg", coco_images / f"{number:012d}.jpg")
        tally.add(split, scene.labels)
        height, width = scene.labels.shape
        coco["images"].append(
            {
                "id": number,
                "file_name": f"{number:012d}.jpg",
                "width": width,
                "height": height,
                "license": 1,
            }
        )
        for pasted in scene.digits:
            annotation = _coco_annotation(len(coco["annotations"]) + 1, number, pasted)
            coco["annotations"].append(annotation)
        map_name = f"{number:012d}.png"
        segment_map, segments = draw_segments(scene)
        Image.fromarray(segment_map).save(segment_maps / map_name)
        Image.fromarray(stuff_of_label[scene.labels]).save(stuff_maps / map_name)
        panoptic["annotations"].append(
            {"image_id": number, "file_name": map_name, "segments_info": segments}
        )
    _write_json(coco_annotations / f"instances_{split}2017.json", coco)
    _write_json(coco_annotations / f"panoptic_{split}2017.json", panoptic)


def _write_object_info(path: Path, tally: _Tally) -> None:
    ratios = tally.ratios()
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    for label in range(BACKGROUND, len(CLASS_NAMES)):
        train, val = (int(tally.scenes[split][label]) for split in ("train", "val"))
        stuff = int(label == BACKGROUND)
        lines.append(f"{label}\t{ratios[label]:.4f}\t{train}\t{val}\t{stuff}\t{CLASS_NAMES[label]}")
    path.write_bytes(("\n".join(lines) + "\n").encode())


def draw_contact_sheet(scenes: Sequence[tuple[str, Scene]], columns: int = 3) -> Image.Image:
    """Draw scenes beside their label maps, with a legend of the colours.

    Args:
        scenes: Captions and scenes.
        columns: Scenes in a row.

    Returns:
        The picture.
    """
    cell, gap, margin, caption, header = 168, 6, 24, 22, 64
    paper, text, faint = (250, 250, 248), (32, 36, 44), (120, 126, 136)
    pair = 2 * cell + gap
    rows = -(-len(scenes) // columns)
    width = 2 * margin + columns * pair + (columns - 1) * margin
    legend_top = header + rows * (cell + caption + 12) + 8
    sheet = Image.new("RGB", (width, legend_top + 52), paper)
    draw = ImageDraw.Draw(sheet)
    title, small = ImageFont.load_default(size=22), ImageFont.load_default(size=13)
    draw.text((margin, 20), "Sample scenes and their labels", text, title)
    palette = np.array(PALETTE, np.uint8)
    for place, (name, scene) in enumerate(scenes):
        row, column = divmod(place, columns)
        left = margin + column * (pair + margin)
        top = header + row * (cell + caption + 12)
        height, wide = scene.labels.shape
        zoom = cell / max(height, wide)
        size = (max(round(wide * zoom), 1), max(round(height * zoom), 1))
        offset = ((cell - size[0]) // 2, (cell - size[1]) // 2)
        pictures = (
            (Image.fromarray(scene.image), Image.Resampling.BICUBIC),
            (Image.fromarray(palette[scene.labels]), Image.Resampling.NEAREST),
        )
        for side, (picture, resample) in enumerate(pictures):
            x = left + side * (cell + gap)
            sheet.paste(picture.resize(size, resample), (x + offset[0], top + offset[1]))
        shown = " ".join(
            str(pasted.digit) for pasted in sorted(scene.digits, key=lambda pasted: pasted.bbox)
        )
        draw.text((left, top + cell + 5), f"{name}: {shown}", text, small)
        right = (left + pair, top + cell + 5)
        draw.text(right, f"{wide} x {height}", faint, small, anchor="ra")
    names = ("unlabelled rim", "background", *(str(digit) for digit in range(10)))
    x: float = margin
    for name, colour in zip(names, PALETTE):
        draw.rounded_rectangle(
            (x, legend_top + 10, x + 20, legend_top + 30), 4, fill=colour, outline=(176, 180, 186)
        )
        draw.text((x + 27, legend_top + 20), name, text, small, anchor="lm")
        x += 27 + draw.textlength(name, small) + 26
    return sheet


def _contact_scenes(
    pools: dict[str, Pool], config: SceneConfig, seed: int, counts: dict[str, int]
) -> list[tuple[str, Scene]]:
    """Choose a dozen scenes: 8 of training and 4 of validation where there are as many."""
    val = min(counts["val"], max(4, 12 - counts["train"]))
    train = min(counts["train"], 12 - val)
    return [
        (f"{split} {index + 1}", make_scene(pools[split], config, seed, split, index))
        for split, count in (("train", train), ("val", val))
        for index in range(count)
    ]


def _build(
    root: Path, parameters: dict[str, Any], config: SceneConfig, seed: int, counts: dict[str, int]
) -> _Tally:
    """Write everything into an empty folder."""
    pools = load_pools(seed)
    tally = _Tally()
    with tqdm(total=sum(counts.values()), unit="scene", disable=None) as bar:

        def scenes(split: str) -> Iterable[Scene]:
            bar.set_description(split)
            for index in range(counts[split]):
                yield make_scene(pools[split], config, seed, split, index)
                bar.update()

        for split in ("train", "val"):
            _write_labelled(root, split, scenes(split), tally)
        unlabelled = root / "unlabelled"
        unlabelled.mkdir()
        for number, scene in enumerate(scenes("unlabelled"), 1):
            _save_jpeg(scene.image, unlabelled / f"{number:08d}.jpg")
    _write_object_info(root / "ADEChallengeData2016" / "objectInfo150.txt", tally)
    sheet = draw_contact_sheet(_contact_scenes(pools, config, seed, counts))
    sheet.save(root / "contact_sheet.png")
    split_record = {split: pools[split].indices.tolist() for split in ("train", "val")}
    _write_json(root / MANIFEST, {**parameters, "scans": split_record}, indent=1)
    return tally


def _read_manifest(out: Path) -> dict[str, Any] | None:
    """Return what `out` says about itself, None if we did not make it."""
    try:
        manifest = json.loads((out / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("tool") == TOOL else None


def _may_write(out: Path, parameters: dict[str, Any], force: bool) -> bool:
    """Say whether `out` is to be written; False if it already holds what is asked for.

    Raises:
        SampleDataError: If `out` holds something that must not be replaced.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return True
    manifest = _read_manifest(out)
    _require(
        manifest is not None,
        f"{out} exists and was not made by this tool (it has no {MANIFEST} of ours), so it is "
        "never replaced, not even with --force; name another folder with --out",
    )
    if force:
        return True
    if {key: manifest[key] for key in manifest if key != "scans"} == parameters:
        return False
    made = manifest.get("version")
    difference = (
        "made with other parameters"
        if made == FORMAT_VERSION
        else f"in format version {made}, while this tool makes version {FORMAT_VERSION}"
    )
    raise SampleDataError(
        f"{out} holds sample data {difference}; replace it with --force or name another folder "
        "with --out"
    )


def _publish(built: Path, out: Path, aside: Path) -> None:
    """Move the finished folder into place, and what was there to `aside`."""
    replaced = out.exists()
    if replaced:
        out.rename(aside)
    try:
        built.rename(out)
    except BaseException:
        if replaced:
            aside.rename(out)
        raise


def make_sample_data(
    out: str | os.PathLike[str],
    *,
    train: int = 800,
    val: int = 60,
    unlabelled: int = 400,
    seed: int = 0,
    config: SceneConfig | None = None,
    force: bool = False,
) -> str:
    """Write the data set; `out` appears whole or not at all.

    Args:
        out: Folder to make.
        train: Number of training scenes.
        val: Number of validation scenes.
        unlabelled: Number of scenes without labels.
        seed: Seed of everything drawn.
        config: How the scenes look.
        force: Replace data that this tool made with other parameters or in another version.

    Returns:
        A sentence that says what was done.

    Raises:
        SampleDataError: If an argument is bad, a package is missing or `out` is in use.
    """
    config = config or SceneConfig()
    counts = {"train": train, "val": val, "unlabelled": unlabelled}
    for name, value in (*counts.items(), ("seed", seed)):
        _require(value >= 0, f"{name} must be at least 0, but {value} was given")
    parameters = {
        "tool": TOOL,
        "version": FORMAT_VERSION,
        "seed": seed,
        "counts": counts,
        "scene": {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(config).items()
        },
        "train_scan_share": TRAIN_SCAN_SHARE,
        "train_photo_share": TRAIN_PHOTO_SHARE,
    }
    out = Path(out).resolve()
    if not _may_write(out, parameters, force):
        return f"{out} already holds this sample data; nothing to do"
    _check_dependencies()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        built = Path(scratch) / "new"
        built.mkdir()
        tally = _build(built, parameters, config, seed, counts)
        _may_write(out, parameters, force)  # someone may have written there meanwhile
        _publish(built, out, Path(scratch) / "old")
    return (
        f"{out}: {train} training, {val} validation and {unlabelled} unlabelled scenes; "
        f"{tally.ratios()[BACKGROUND]:.1%} of the labelled pixels are background"
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Make a small data set of handwritten digits on photographs, in the layouts "
        "of ADE20K and COCO, without a download.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("data/sample"), help="folder to make")
    parser.add_argument("--train", type=int, default=800, help="training scenes")
    parser.add_argument("--val", type=int, default=60, help="validation scenes")
    parser.add_argument("--unlabelled", type=int, default=400, help="scenes without labels")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything drawn")
    parser.add_argument("--min-size", type=int, default=64, help="smallest side of a scene")
    parser.add_argument("--max-size", type=int, default=96, help="largest side of a scene")
    parser.add_argument(
        "--digits", type=int, nargs=2, default=(3, 7), metavar=("MIN", "MAX"), help="per scene"
    )
    parser.add_argument("--force", action="store_true", help="replace other sample data")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: Arguments; those of the process if None.

    Raises:
        SystemExit: If the data cannot be made; the message says why.
    """
    arguments = _parse(argv)
    try:
        config = SceneConfig(
            min_size=arguments.min_size,
            max_size=arguments.max_size,
            min_digits=arguments.digits[0],
            max_digits=arguments.digits[1],
        )
        done = make_sample_data(
            arguments.out,
            train=arguments.train,
            val=arguments.val,
            unlabelled=arguments.unlabelled,
            seed=arguments.seed,
            config=config,
            force=arguments.force,
        )
    except (SampleDataError, OSError) as error:
        raise SystemExit(f"make_sample_data: {error}") from error
    print(done)


if __name__ == "__main__":
    main()
