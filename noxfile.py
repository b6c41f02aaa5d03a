"""Test the supported Pythons, torch versions and frameworks, each in a fresh environment.

For instance::

    nox --list
    nox -s "core-3.11(oldest)"
    DETECTRON2_WHEEL=~/wheels/detectron2-0.6-cp311-*.whl nox -s detectron2 tested
"""

import os
from pathlib import Path

import nox

OLDEST_CORE = {
    "3.10": ["numpy==1.24.4", "safetensors==0.4.0"],
    "3.11": ["numpy==1.24.4", "safetensors==0.4.0"],
    "3.12": ["numpy==1.26.4"],
    "3.13": ["numpy==2.1.3"],
}
MMSEG = ["mmengine==0.10.7", "mmcv-lite==2.1.0", "mmsegmentation==1.2.2"]
OPENMMLAB = [*MMSEG, "mmpretrain==1.2.0"]
TESTED = ["torch==2.11.0", "torchvision==0.26.0"]
OLDEST = ["torch==2.6.0", "torchvision==0.21.0", "numpy==1.26.4"]
OLDEST += ["opencv-python==4.10.0.84", "matplotlib<3.10", "scipy<1.14"]  # they accept numpy 1

# names of test files begin with test_ and one of these
CORE_TESTS = ["backbone", "checkpoint", "costs", "diffusion", "feedback", "heads", "hostile_files"]
CORE_TESTS += ["models", "ops", "unet", "unpickle"]
OPENMMLAB_TESTS = ["checkpoint", "unpickle", "openmmlab"]
DETECTRON2_TESTS = ["checkpoint", "detectron2"]


def check(session: nox.Session, packages: list[str], extras: str, tests: list[str]) -> None:
    """Install packages and this project with its extras, then run test files."""
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text("setuptools<82\n")  # 82 drops pkg_resources; applies to builds, too
    packages = [*packages, "pytest", "pillow", "setuptools", "-e", f".{extras}"]
    session.install(*packages, env={"PIP_CONSTRAINT": str(constraints.resolve())})
    files = {str(path) for name in tests for path in Path("tests").glob(f"test_{name}*.py")}
    session.run("pytest", "-q", *sorted(files), *session.posargs, env={"OMP_NUM_THREADS": "1"})


def detectron2_wheel(session: nox.Session) -> str:
    """Return the wheel to test: DETECTRON2_WHEEL or the newest one in ~/wheels."""
    wheels = sorted(map(str, Path.home().glob("wheels/detectron2-*.whl")))
    wheel = os.environ.get("DETECTRON2_WHEEL") or (wheels[-1] if wheels else "")
    return wheel or session.skip("needs a Detectron2 wheel: DETECTRON2_WHEEL=FILE")


@nox.session(python=list(OLDEST_CORE))
@nox.parametrize("torch", ["oldest", "newest"], ids=["oldest", "newest"])
def core(session: nox.Session, torch: str) -> None:
    """Torch, numpy and safetensors alone."""
    oldest = ["torch==2.6.0", *OLDEST_CORE[session.python]]
    check(session, oldest if torch == "oldest" else ["torch", "numpy"], "", CORE_TESTS)


@nox.session(python="3.10")
def openmmlab_oldest(session: nox.Session) -> None:
    """MMSegmentation and MMPretrain with the oldest torch."""
    check(session, [*OLDEST, *OPENMMLAB], "[mmseg,mmpretrain,tools]", OPENMMLAB_TESTS)


@nox.session(python="3.13")
def openmmlab_newest(session: nox.Session) -> None:
    """MMSegmentation and MMPretrain with the newest torch."""
    check(session, ["torch", *OPENMMLAB], "[mmseg,mmpretrain,tools]", OPENMMLAB_TESTS)


@nox.session(python="3.11")
def mmseg(session: nox.Session) -> None:
    """MMSegmentation without MMPretrain and Detectron2."""
    check(session, [*TESTED, *MMSEG], "[mmseg,tools]", [*OPENMMLAB_TESTS, *DETECTRON2_TESTS])


@nox.session(python="3.11")
def onedl(session: nox.Session) -> None:
    """The maintained forks of MMEngine, mmcv and MMSegmentation, under the same import names."""
    packages = [*TESTED, "onedl-mmengine", "onedl-mmcv", "onedl-mmsegmentation", "ftfy", "regex"]
    check(session, packages, "[tools]", OPENMMLAB_TESTS)


@nox.session(python="3.11")
def detectron2(session: nox.Session) -> None:
    """Detectron2 without OpenMMLab's packages."""
    packages = [*TESTED, detectron2_wheel(session)]
    check(session, packages, "[detectron2,tools]", [*OPENMMLAB_TESTS, *DETECTRON2_TESTS])


@nox.session(python="3.11")
def tested(session: nox.Session) -> None:
    """The versions that everything is tested with."""
    packages = [*TESTED, *OPENMMLAB, detectron2_wheel(session)]
    tests = [*OPENMMLAB_TESTS, *DETECTRON2_TESTS]
    check(session, packages, "[mmseg,mmpretrain,detectron2,tools]", tests)
