"""Scenes of handwritten digits on photographs, with their label maps.

Each scene shows scans of `sklearn.datasets.load_digits` in many sizes, pasted on a crop of a
photograph of `sklearn.datasets.load_sample_images`. Training and validation share neither a scan
nor a pixel of a photograph: the scans are split class by class, and each photograph is cut into a
left part (training) and a right part (validation).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from sklearn.datasets import load_digits, load_sample_images

from diffbackbone.utils import UserError

SPLITS = ("train", "val", "unlabelled")  # the order is part of the seeding: only append
TRAIN_SCAN_SHARE = 0.75
TRAIN_PHOTO_SHARE = 0.7

DIGIT_NAMES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"
)  # fmt: skip
UNLABELLED, BACKGROUND, FIRST_DIGIT = 0, 1, 2  # values of the label maps

MIN_SCENE_SIZE = 32
_SCAN_SPLIT_KEY = (1000,)  # scenes have keys of two numbers
_SCAN_SIDE = 8
_PADDED_SIDE = _SCAN_SIDE + 2
_COLOR_TRIES = 32
_TRIES_PER_SIZE = 10


@dataclass(frozen=True)
class SceneConfig:
    """Appearance of the scenes."""

    min_size: int = 64  # smallest and largest height and width
    max_size: int = 96
    min_digits: int = 3  # fewest and most digits drawn; those that find no room are left out
    max_digits: int = 7
    digit_size: tuple[float, float] = (0.25, 0.5)  # shares of the scene's short side, up to 0.8
    background_scale: tuple[float, float] = (0.5, 1.5)  # sides of the photo's crop, in scene sides
    background_brightness: float = 0.6  # dims the photo, so that light digits stand out
    ink: tuple[float, float] = (0.15, 0.7)  # of the enlarged scan: still transparent, and opaque
    mask_threshold: float = 0.5  # opacity above which a pixel belongs to the digit
    rim_threshold: float = 0.2  # opacity above which a pixel outside the digit is unlabelled
    min_contrast: float = 36.0  # between a digit and the pixels behind it, see `_pick_color`
    gap: int = 1  # empty pixels between digits
    max_tries: int = 40  # places tried for a digit

    def __post_init__(self) -> None:
        sizes = MIN_SCENE_SIZE <= self.min_size <= self.max_size
        if not sizes or not 1 <= self.min_digits <= self.max_digits:
            raise UserError(
                f"scenes need {MIN_SCENE_SIZE} <= min-size <= max-size and 1 <= fewest <= most "
                f"digits, got {self}"
            )


@dataclass(frozen=True)
class Pool:
    """The scans and photographs that the scenes of a split are made of."""

    scans: np.ndarray  # (N, 8, 8), ink from 0 to 1
    classes: np.ndarray  # digit that each scan shows
    photos: tuple[np.ndarray, ...]  # the split's part of each photograph, (H, W, 3) RGB bytes


@dataclass(frozen=True)
class PastedDigit:
    """A digit in a scene."""

    digit: int  # 0 to 9
    mask: np.ndarray  # (H, W), True where a pixel belongs to it


@dataclass(frozen=True)
class Scene:
    """An image with its labels."""

    image: np.ndarray  # (H, W, 3) RGB bytes
    labels: np.ndarray  # (H, W) bytes: 0 unlabelled, 1 background, 2 to 11 the digits 0 to 9
    digits: tuple[PastedDigit, ...]


def split_scans(classes: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Divide scans between "train" and "val", each class in the same proportion."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=_SCAN_SPLIT_KEY))
    train: list[int] = []
    for digit in range(len(DIGIT_NAMES)):
        members = rng.permutation(np.flatnonzero(classes == digit))
        train.extend(members[: round(TRAIN_SCAN_SHARE * len(members))])
    return {"train": np.sort(train), "val": np.setdiff1d(np.arange(len(classes)), train)}


def load_pools(seed: int) -> dict[str, Pool]:
    """Divide scikit-learn's scans and photographs among `SPLITS`; "unlabelled" shares "train"'s."""
    digits, photos = load_digits(), load_sample_images().images
    scans = (digits.images / 16.0).astype(np.float32)
    cuts = [round(TRAIN_PHOTO_SHARE * photo.shape[1]) for photo in photos]
    parts = {
        "train": tuple(photo[:, :cut] for photo, cut in zip(photos, cuts)),
        "val": tuple(photo[:, cut:] for photo, cut in zip(photos, cuts)),
    }
    pools = {
        split: Pool(scans[indices], digits.target[indices], parts[split])
        for split, indices in split_scans(digits.target, seed).items()
    }
    return {**pools, "unlabelled": pools["train"]}


def make_scene(pool: Pool, config: SceneConfig, seed: int, split: str, index: int) -> Scene:
    """Make scene `index` (from 0) of a split; the same arguments always give the same one."""
    sequence = np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index))
    rng = np.random.default_rng(sequence)
    height, width = _draw_shape(rng, config)
    image = _draw_background(rng, config, pool, height, width).astype(np.float32)
    image *= config.background_brightness
    opacity = np.zeros((height, width), np.float32)
    labels = np.full((height, width), BACKGROUND, np.uint8)
    taken = np.zeros((height, width), bool)
    digits = []
    for _ in range(rng.integers(config.min_digits, config.max_digits + 1)):
        digit = int(rng.choice(np.unique(pool.classes)))
        member = rng.choice(np.flatnonzero(pool.classes == digit))
        room = _find_room(rng, config, pool.scans[member], taken)
        if room is None:
            continue
        top, left, alpha = room
        box = np.s_[top : top + alpha.shape[0], left : left + alpha.shape[1]]
        color = _pick_color(rng, image[box], config.min_contrast)
        image[box] += alpha[..., None] * (color - image[box])
        opacity[box] = alpha
        taken[box] = True
        mask = np.zeros((height, width), bool)
        mask[box] = alpha > config.mask_threshold
        labels[mask] = FIRST_DIGIT + digit
        digits.append(PastedDigit(digit, mask))
    rim = (opacity > config.rim_threshold) & (opacity <= config.mask_threshold)
    labels[rim] = UNLABELLED
    pixels = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return Scene(pixels, labels, tuple(digits))


def _draw_shape(rng: np.random.Generator, config: SceneConfig) -> tuple[int, int]:
    """Draw height and width: different, and no multiples of 32, where the range allows it."""
    sizes = list(range(config.min_size, config.max_size + 1))
    sizes = [size for size in sizes if size % 32] or sizes
    height = int(rng.choice(sizes))
    width = int(rng.choice([size for size in sizes if size != height] or sizes))
    return height, width


def _draw_background(
    rng: np.random.Generator, config: SceneConfig, pool: Pool, height: int, width: int
) -> np.ndarray:
    """Draw a crop of a photo, flip it half of the time, and resize it to the scene."""
    photo = pool.photos[rng.integers(len(pool.photos))]
    scale = rng.uniform(*config.background_scale)
    scale = min(scale, photo.shape[0] / height, photo.shape[1] / width)
    crop_height, crop_width = round(scale * height), round(scale * width)
    top = rng.integers(photo.shape[0] - crop_height + 1)
    left = rng.integers(photo.shape[1] - crop_width + 1)
    crop = photo[top : top + crop_height, left : left + crop_width]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    interpolation = cv2.INTER_AREA if scale > 1 else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(crop), (width, height), interpolation=interpolation)


def _enlarge(scan: np.ndarray, size: int, ink: tuple[float, float]) -> np.ndarray:
    """Return the opacity of a scan whose 8 pixels measure `size`, cropped to what shows."""
    side = max(round(size * _PADDED_SIDE / _SCAN_SIDE), _PADDED_SIDE)
    padded = np.pad(scan.astype(np.float32), 1)  # strokes at the edge fade out
    large = cv2.resize(padded, (side, side), interpolation=cv2.INTER_CUBIC)
    alpha = np.clip((large - ink[0]) / (ink[1] - ink[0]), 0.0, 1.0)
    left, top, width, height = cv2.boundingRect((alpha > 0).astype(np.uint8))
    return alpha[top : top + height, left : left + width]


def _find_room(
    rng: np.random.Generator, config: SceneConfig, scan: np.ndarray, taken: np.ndarray
) -> tuple[int, int, np.ndarray] | None:
    """Draw top, left and opacity of a digit, smaller after some failed tries; None if all fail."""
    height, width = taken.shape
    low, high = config.digit_size
    for attempt in range(config.max_tries):
        if attempt % _TRIES_PER_SIZE == 0:
            high = rng.uniform(low, high)
            alpha = _enlarge(scan, max(round(high * min(height, width)), 1), config.ink)
        tall, wide = alpha.shape
        top = int(rng.integers(height - tall + 1))
        left = int(rng.integers(width - wide + 1))
        rows = slice(max(top - config.gap, 0), top + tall + config.gap)
        columns = slice(max(left - config.gap, 0), left + wide + config.gap)
        if not taken[rows, columns].any():
            return top, left, alpha
    return None


def _pick_color(rng: np.random.Generator, behind: np.ndarray, min_contrast: float) -> np.ndarray:
    """Pick a light color of random hue that is at least `min_contrast` from most pixels behind it.

    If none of the colors drawn is, the farthest one is taken, or a pale one or white. The contrast
    is a distance in CIELAB, with a quarter of the weight on the two chroma channels.
    """
    hsv = np.empty((_COLOR_TRIES + 2, 1, 3), np.float32)
    hsv[..., 0] = rng.uniform(0.0, 360.0)
    hsv[:-2, 0, 1] = rng.uniform(0.05, 0.6, _COLOR_TRIES)
    hsv[:-2, 0, 2] = rng.uniform(0.8, 1.0, _COLOR_TRIES)
    hsv[-2:, 0, 1:] = (0.25, 1.0), (0.0, 1.0)
    colors = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    step = max(1, min(behind.shape[:2]) // 24)
    pixels = behind[::step, ::step].astype(np.float32) / 255.0
    distance = (
        cv2.cvtColor(colors, cv2.COLOR_RGB2LAB)
        - cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB).reshape(1, -1, 3)
    ) * np.array([1.0, 0.25, 0.25], np.float32)
    contrast = np.percentile(np.linalg.norm(distance, axis=-1), 15, axis=1)
    enough = np.flatnonzero(contrast >= min_contrast)
    best = enough[0] if len(enough) else np.argmax(contrast)
    return colors[best, 0] * 255.0
