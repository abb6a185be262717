"""What a preprocessor_config.json of Transformers makes of a picture, as far as it is done here, and what is not.

Transformers resizes a picture to `size`, cuts `crop_size` out of its centre, multiplies by `rescale_factor`, subtracts
`image_mean` and divides by `image_std`. Here a picture is resized (bicubic) until it covers the model's input over
`crop_pct`, the centre is cut out, divided by 255, and normalised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from beit_pretrain.errors import CheckpointError

FILE = "preprocessor_config.json"
BICUBIC = 3  # Pillow's number
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
KEEP_SHAPE = ("Bit", "CLIP")  # processors that take one number for the shorter side, and cut out the centre
BEIT_COLOURS = 0.5  # mean and deviation of Transformers' BEiT processors where the file states none

Facts = Mapping[str, Any]


class Geometry(NamedTuple):
    """How a picture is brought to its size in Transformers."""

    edge: int | None  # pixels of its shorter side after resizing
    size: tuple[int, int] | None  # (height, width) that it is squeezed to, in place of `edge`
    crop: tuple[int, int] | None  # (height, width) of what is cut out of the centre

    @property
    def resized(self) -> tuple[int, int] | None:
        """(height, width) of a square picture before the crop."""
        return self.size if self.edge is None else (self.edge, self.edge)


def facts_of(processor: Facts, given: str) -> tuple[dict[str, Any], list[str]]:
    """Mean, std, crop_pct and reduce_zero_label, as far as stated, and a note where the pixels will be others here.

    CheckpointError, which calls the place `given`, for entries that cannot be, or cannot be done here.
    """
    if not processor:
        return {}, []
    where = f"{given}: {FILE}"
    facts: dict[str, Any] = _colours(processor, where)
    if "do_reduce_labels" in processor:
        facts["reduce_zero_label"] = bool(processor["do_reduce_labels"])
    geometry = _geometry(processor, where)
    if (sides := geometry.resized) is not None:
        crop = geometry.crop or sides
        if crop[0] > sides[0] or crop[1] > sides[1]:
            raise CheckpointError(
                f"{where}: crop_size {_times(crop)} is larger than size {_times(sides)}, and the black border that "
                "Transformers adds is not made here: set crop_size to that of size in it"
            )
        facts["crop_pct"] = crop[0] / sides[0]
    other = [*_other_shapes(processor, geometry), *_other_resampling(processor, where)]
    notes = [
        f"with its {FILE} Transformers makes other pixels ({', '.join(other)}): here a picture keeps its shape and "
        "is resized bicubically"
    ]
    return facts, notes if other else []


def as_a_whole(stage: str, image_size: tuple[int, int]) -> bool:
    """Whether this project has Transformers squeeze pictures: a crop after a shortest edge covers squares only."""
    return image_size[0] != image_size[1] or stage == "segment"


def fits(processor: Facts, stage: str, image_size: tuple[int, int], crop_pct: float, given: str) -> bool:
    """Whether the file is still what this project writes for a model of this size and crop."""
    where = f"{given}: {FILE}"
    edge, size, crop = _geometry(processor, where)
    if _other_resampling(processor, where):
        return False
    if as_a_whole(stage, image_size):
        return size == image_size and crop in (None, size)
    return crop == image_size and edge == cover(image_size[0], crop_pct)


def cover(side: int, crop_pct: float) -> int:
    """Pixels that a side is resized to, of which the crop keeps `crop_pct`."""
    return math.floor(side / crop_pct + 1e-6)


def entry(facts: Facts, name: str, kinds: type | tuple[type, ...], where: str) -> Any:
    """An entry of a JSON file from elsewhere, None where there is none; CheckpointError for one of another kind."""
    value = facts.get(name)
    if value is None or (isinstance(value, kinds) and not (isinstance(value, bool) and kinds is not bool)):
        return value
    raise CheckpointError(
        f"{where}: {name}={value} is no value for it: correct it there, or copy the file again"
    )


# --- colours --------------------------------------------------------------------------------------------------------


def _colours(processor: Facts, where: str) -> dict[str, Any]:
    """Mean and std for pixels that were divided by 255, whatever the file multiplies by; none that nobody states."""
    factor = entry(processor, "rescale_factor", (int, float), where) if _on(processor, "do_rescale") else 1.0
    scale = 255 * (1 / 255 if factor is None else factor)
    if not (math.isfinite(scale) and scale > 0):
        raise CheckpointError(f"{where}: rescale_factor={factor}: set a number above 0")
    scale = 1.0 if math.isclose(scale, 1, rel_tol=1e-6) else scale
    if not _on(processor, "do_normalize"):
        colours: dict[str, Any] = {"mean": [0.0] * 3, "std": [1.0] * 3}
    else:
        standard = BEIT_COLOURS if _type(processor).startswith("Beit") else None
        colours = {name: three(processor, f"image_{name}", standard, where) for name in ("mean", "std")}
    if colours["std"] is not None and 0 in colours["std"]:
        raise CheckpointError(f"{where}: image_std={colours['std']}: set numbers other than 0")
    return {name: [n / scale for n in value] for name, value in colours.items() if value is not None}


def three(processor: Facts, name: str, standard: float | None, where: str) -> list[float] | None:
    """A number for each colour; CheckpointError for what is none."""
    value = entry(processor, name, (int, float, list), where)
    value = standard if value is None else value
    if value is None:
        return None
    values = value if isinstance(value, list) else [value] * 3  # as Transformers takes one number
    numbers = all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in values)
    if len(values) != 3 or not numbers:
        raise CheckpointError(f"{where}: {name}={value}: set three numbers, for red, green and blue")
    return [float(n) for n in values]


# --- sizes ----------------------------------------------------------------------------------------------------------


def _geometry(processor: Facts, where: str) -> Geometry:
    crop = None
    if processor.get("do_center_crop", _type(processor).startswith(KEEP_SHAPE)):
        crop = _sides(processor, "crop_size", where)
    if not _on(processor, "do_resize"):
        return Geometry(None, None, crop)
    size = entry(processor, "size", (int, list, Mapping), where)
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return Geometry(_whole(size["shortest_edge"], "size", where), None, crop)
    # Transformers' own classes differ in what one number is; BEiT's take it for both sides.
    square = processor.get("default_to_square", not _type(processor).startswith(KEEP_SHAPE))
    if isinstance(size, int) and not square:
        return Geometry(_whole(size, "size", where), None, crop)
    return Geometry(None, _sides(processor, "size", where), crop)


def _sides(processor: Facts, name: str, where: str) -> tuple[int, int] | None:
    """(height, width) of an entry: one number, two, or two with their names."""
    value = entry(processor, name, (int, list, Mapping), where)
    if value is None:
        return None
    if isinstance(value, int):
        value = [value, value]
    sides = [value.get("height"), value.get("width")] if isinstance(value, Mapping) else list(value)
    if len(sides) != 2:
        raise CheckpointError(f"{where}: {name}={value}: set height and width in pixels")
    height, width = (_whole(side, name, where) for side in sides)
    return height, width


def _whole(value: Any, name: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{where}: {name}={value}: set pixels, a whole number from 1")
    return value


def _other_shapes(processor: Facts, geometry: Geometry) -> list[str]:
    """What Transformers does to a picture's shape and is not done here."""
    if not _on(processor, "do_resize"):
        return ["do_resize=false: pictures keep their size"]
    if geometry.size is not None:
        return [f"pictures are squeezed to {_times(geometry.size)}"]
    if geometry.edge is not None and geometry.crop is None:
        return ["do_center_crop=false: nothing is cut out"]
    if geometry.crop is not None and geometry.crop[0] != geometry.crop[1]:
        return [f"{_times(geometry.crop)} is cut out, whatever the shape of the picture"]
    return []


def _other_resampling(processor: Facts, where: str) -> list[str]:
    resample = entry(processor, "resample", int, where)
    if resample in (None, BICUBIC) or not _on(processor, "do_resize"):
        return []
    return [f"resample={resample}" + (f", {RESAMPLING[resample]}" if resample in RESAMPLING else "")]


def _on(processor: Facts, name: str) -> bool:
    """A switch that is on unless the file says otherwise."""
    return processor.get(name) not in (False, 0)


def _type(processor: Facts) -> str:
    return str(processor.get("image_processor_type") or processor.get("feature_extractor_type") or "")


def _times(sides: tuple[int, int]) -> str:
    return f"{sides[0]} x {sides[1]}"
