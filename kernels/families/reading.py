"""Read and check numbers of a model's files, for all families of processors.

Rules: a value that the arithmetic does not support raises ValueError, KeyError or TypeError; nothing is guessed. None
in a file means the default, as in the processors. Sizes have no default: a file without one is not the processor's
own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sidecar.kernels.grid import RESAMPLES, Size

CLIP_MEAN_STD: Final = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF_MEAN_STD: Final = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

Config = Mapping[str, Any]


def read_common(config: Config, resample: int, mean_std: tuple[tuple[float, ...], tuple[float, ...]]) -> dict[str, Any]:
    """The numbers that all families have. Raises ValueError, KeyError or TypeError for unsupported values."""
    values: dict[str, Any] = {
        "resample": resample,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean_std[0],
        "image_std": mean_std[1],
    }
    values |= {key: config[key] for key in values if config.get(key) is not None}
    values |= {key: tuple(float(v) for v in values[key]) for key in ("image_mean", "image_std")}
    if values["resample"] not in RESAMPLES:
        raise ValueError("resample is not bilinear, bicubic or Lanczos")
    sane = (
        all(type(values[key]) is bool for key in ("do_rescale", "do_normalize"))
        and type(values["rescale_factor"]) in (int, float)
        and values["rescale_factor"] > 0
        and len(values["image_mean"]) == len(values["image_std"]) == 3
        and all(values["image_std"])
    )
    if not sane:
        raise ValueError("invalid mean, deviation or rescaling")
    return values


def check_steps(config: Config, **wanted: Any) -> None:
    """Raise ValueError if a step has another value than this family supports; absent ones are defaults."""
    wanted = {
        "do_resize": True,
        "do_convert_rgb": True,
        "do_center_crop": False,
        "do_pad": False,
        "pad_size": None,
        "data_format": "channels_first",
        "input_data_format": None,
        "device": "cpu",
    } | wanted
    for key, value in wanted.items():
        if value is not ... and config.get(key, value) not in (value, None):
            raise ValueError(f"{key} is not {value}")


def check_count(value: Any, most: int = 1 << 30) -> int:
    """A positive integer up to `most`. Raises ValueError."""
    if type(value) is not int or not 0 < value <= most:
        raise ValueError("not a size")
    return value


def check_pair(value: Any) -> Size:
    """A size as {"height", "width"} or one number."""
    if isinstance(value, Mapping):
        if set(value) - {"height", "width"}:
            raise ValueError("not a size")
        return check_count(value["height"], 1 << 14), check_count(value["width"], 1 << 14)
    return check_count(value, 1 << 14), check_count(value, 1 << 14)


def get_or(config: Config, key: str, value: Any) -> Any:
    """The value of `key`, or `value` if the file has none."""
    return value if config.get(key) is None else config[key]


def require(config: Config, key: str) -> Any:
    """The value of `key`, on which sizes depend. Raises ValueError if the file has none."""
    if config.get(key) is None:
        raise ValueError(f"{key} is missing and has no default")
    return config[key]


def require_count(config: Config, key: str, most: int = 1 << 30) -> int:
    """The required positive integer `key`. Raises ValueError."""
    return check_count(require(config, key), most)


def require_pair(config: Config, key: str) -> Size:
    """The required size `key`. Raises ValueError."""
    return check_pair(require(config, key))


def optional_count(value: Any) -> int:
    """A count on which only tokens depend: 0 if the file has none."""
    return value if type(value) is int and 0 < value <= 1 << 20 else 0


def check_positive(height: int, width: int) -> Size:
    """The size. Raises ValueError if there are no pixels."""
    if min(height, width) < 1:
        raise ValueError("an image without pixels")
    return height, width
