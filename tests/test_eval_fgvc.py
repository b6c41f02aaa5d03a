"""`tools/prepare_fgvc.py` on small data sets in the layouts that are distributed."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("tyro", reason="tyro is not installed")

from PIL import Image
from scipy.io import savemat

from diffbackbone.eval import fgvc
from diffbackbone.eval.data import list_folder
from diffbackbone.utils import UserError


def write_image(path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def make_aircraft(root):
    (root / "data").mkdir()
    lists = {"trainval": ["1 F/A-18", "2 707-320", "3 707-320"], "test": ["4 F/A-18", "5 707-320"]}
    for part, lines in lists.items():
        (root / f"data/images_variant_{part}.txt").write_text("\n".join(lines) + "\n")
    for i in range(1, 6):
        write_image(root / f"data/images/{i}.jpg")
    return {"train/F_A-18/1.jpg", "train/707-320/2.jpg", "train/707-320/3.jpg",
            "val/F_A-18/4.jpg", "val/707-320/5.jpg"}  # fmt: skip


def make_cars(root):
    (root / "devkit").mkdir()
    names = np.array(["Audi S4 Sedan 2007", "Ram C/V Cargo Van"], dtype=object)
    savemat(root / "devkit/cars_meta.mat", {"class_names": names})
    kind = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
    files = {"cars_train": "devkit/cars_train_annos.mat"}
    files["cars_test"] = "cars_test_annos_withlabels.mat"
    for (part, file), labels in zip(files.items(), ((1, 2, 2), (2, 1))):
        rows = [(39, label, f"{i:05d}.jpg") for i, label in enumerate(labels, 1)]
        savemat(root / file, {"annotations": np.array([rows], dtype=kind)[0]})
        for _, _, name in rows:
            write_image(root / part / name)
    return {"train/Audi S4 Sedan 2007/00001.jpg", "train/Ram C_V Cargo Van/00002.jpg",
            "train/Ram C_V Cargo Van/00003.jpg", "val/Ram C_V Cargo Van/00001.jpg",
            "val/Audi S4 Sedan 2007/00002.jpg"}  # fmt: skip


def make_flowers(root):
    savemat(root / "imagelabels.mat", {"labels": np.array([[2, 1, 1, 2, 1]], np.uint8)})
    savemat(root / "setid.mat", {"trnid": [[5]], "valid": [[4, 2]], "tstid": [[1, 3]]})
    for i in range(1, 6):
        write_image(root / f"jpg/image_{i:05d}.jpg")
    return {"train/001/image_00005.jpg", "train/002/image_00004.jpg", "train/001/image_00002.jpg",
            "val/002/image_00001.jpg", "val/001/image_00003.jpg"}  # fmt: skip


def make_birds(root, keys="12345"):
    paths = [f"{c}/{c}_{i}.jpg" for i, c in enumerate(("001.Albatross", "002.Wren") * 2)]
    paths.append("001.Albatross/with space.jpg")
    (root / "images.txt").write_text("".join(f"{k} {p}\n" for k, p in zip(keys, paths)))
    split = "".join(f"{k} {s}\n" for k, s in zip(reversed(keys), (0, 0, 1, 1, 1)))
    (root / "train_test_split.txt").write_text(split)
    for path in paths:
        write_image(root / "images" / path)
    return {f"{'train' if i < 3 else 'val'}/{path}" for i, path in enumerate(paths)}


def make_nabirds(root):
    return make_birds(root, "abcde")


def make_dogs(root):
    parts = {"train": ["n1-Pug/n1_1.jpg", "n2-Dhole/n2_1.jpg", "n2-Dhole/n2_2.jpg"]}
    parts["test"] = ["n1-Pug/n1_3.jpg", "n2-Dhole/n2_3.jpg"]
    for part, paths in parts.items():
        rows = np.array([[path] for path in paths], dtype=object)
        savemat(root / f"{part}_list.mat", {"file_list": rows})
        for path in paths:
            write_image(root / "Images" / path)
    return {f"{'train' if part == 'train' else 'val'}/{p}" for part in parts for p in parts[part]}


MAKERS = {"aircraft": make_aircraft, "cars": make_cars, "cub": make_birds, "dogs": make_dogs,
          "flowers": make_flowers, "nabirds": make_nabirds}  # fmt: skip


@pytest.mark.parametrize("name", fgvc.SETS)
@pytest.mark.parametrize("inside", [True, False])
def test_all_layouts(name, inside, tmp_path):
    root = tmp_path / fgvc.SETS[name][1]
    root.mkdir()
    expected = MAKERS[name](root)
    options = dict(set=name, source=tmp_path if inside else root, out=tmp_path / "out")
    with pytest.raises(UserError, match=r"2 classes .Table 7: \d+.*3 train .*2 val"):
        fgvc.run(fgvc.FgvcConfig(**options))
    assert not (tmp_path / "out").exists()
    text = fgvc.run(fgvc.FgvcConfig(**options, partial=True))
    assert "differs from Table 7" in text
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.jpg")}
    assert found == expected
    train = list_folder(tmp_path / "out/train")
    assert (len(train), len(list_folder(tmp_path / "out/val", train.classes))) == (3, 2)


def test_right_counts_pass_and_missing_images_are_named(tmp_path, monkeypatch):
    make_dogs(tmp_path)
    monkeypatch.setitem(fgvc.SETS, "dogs", (fgvc.read_dogs, "stanford_dogs", (2, 3, 2)))
    config = fgvc.FgvcConfig(set="dogs", source=tmp_path, out=tmp_path / "out")
    assert "as in Table 7" in fgvc.run(config)
    (tmp_path / "Images/n2-Dhole/n2_3.jpg").unlink()
    config.out = tmp_path / "other"
    with pytest.raises(UserError, match="n2_3.jpg is missing"):
        fgvc.run(config)
    assert not config.out.exists()
