"""Sample data made from scikit-learn's digits and photographs, without a download."""

from diffbackbone.sample_data.digits import SampleDigitsError, make_digits
from diffbackbone.sample_data.scenes import (
    DIGIT_NAMES,
    SampleDataError,
    SceneConfig,
    load_pools,
    make_sample_data,
    make_scene,
)

__all__ = [
    "DIGIT_NAMES",
    "SampleDataError",
    "SampleDigitsError",
    "SceneConfig",
    "load_pools",
    "make_digits",
    "make_sample_data",
    "make_scene",
]
