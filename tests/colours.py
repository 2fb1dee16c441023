"""What eyes see of colours: contrast, and differences with every kind of colour blindness."""

from __future__ import annotations

import re
from typing import Any

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
COLOUR_VISION = {
    "normal": [(1, 0, 0), (0, 1, 0), (0, 0, 1)],
    "protanopia": [(0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)],
    "deuteranopia": [(0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)],
    "tritanopia": [(1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)],
}
# Ottosson's Oklab: cone responses of linear RGB, and back; Lab of the cube roots of the responses, and back.
RGB_TO_CONES = [(0.4122214708, 0.5363325363, 0.0514459929), (0.2119034982, 0.6806995451, 0.1073969566),
                (0.0883024619, 0.2817188376, 0.6299787005)]  # fmt: skip
CONES_TO_RGB = [(4.0767416621, -3.3077115913, 0.2309699292), (-1.2684380046, 2.6097574011, -0.3413193965),
                (-0.0041960863, -0.7034186147, 1.7076147010)]  # fmt: skip
ROOTS_TO_LAB = [(0.2104542553, 0.7936177850, -0.0040720468), (1.9779984951, -2.4285922050, 0.4505937099),
                (0.0259040371, 0.7827717662, -0.8086757660)]  # fmt: skip
LAB_TO_ROOTS = [(1, 0.3963377774, 0.2158037573), (1, -0.1055613458, -0.0638541728), (1, -0.0894841775, -1.2914855480)]


def dot(row: Any, vector: Any) -> float:
    return sum(a * b for a, b in zip(row, vector, strict=True))


def to_linear(css: str) -> list[float]:
    """Linear RGB of a colour: rgb(...) or oklab(...), as browsers compute them, or #rrggbb."""
    if css.startswith("#"):
        css = f"rgb({', '.join(str(int(css[i : i + 2], 16)) for i in (1, 3, 5))})"
    values = [float(number) for number in re.findall(r"-?[\d.]+(?:e-?\d+)?", css)]
    if css.startswith("oklab"):
        return [dot(row, [dot(line, values) ** 3 for line in LAB_TO_ROOTS]) for row in CONES_TO_RGB]
    assert css.startswith("rgb("), css
    return [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (one / 255 for one in values)]


def to_oklab(rgb: list[float]) -> list[float]:
    roots = [dot(row, rgb) ** (1 / 3) for row in RGB_TO_CONES]
    return [dot(row, roots) for row in ROOTS_TO_LAB]


def contrast(first: list[float], second: list[float]) -> float:
    """WCAG's."""
    dark, light = sorted(dot((0.2126, 0.7152, 0.0722), one) for one in (first, second))
    return (light + 0.05) / (dark + 0.05)


def seen_with(matrix: Any, rgb: list[float]) -> list[float]:
    """Oklab of a linear colour for eyes of COLOUR_VISION; distances between such say how different they look."""
    return to_oklab([max(dot(row, rgb), 0.0) for row in matrix])
