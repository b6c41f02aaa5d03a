"""Sample data made from scikit-learn's digits and photographs, without a download."""

from diffbackbone.sample_data.dataset import make_sample_data
from diffbackbone.sample_data.digits import make_digits
from diffbackbone.sample_data.scenes import DIGIT_NAMES, SceneConfig, load_pools, make_scene

__all__ = [
    "DIGIT_NAMES",
    "SceneConfig",
    "load_pools",
    "make_digits",
    "make_sample_data",
    "make_scene",
]
