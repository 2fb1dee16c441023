"""Which layers, and so which exits, each pipeline stage has."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def split_layers(num_layers: int, num_stages: int, given: Sequence[int] | None = None) -> tuple[int, ...]:
    """Layers of each stage: as given, or as even as possible, the first stages having one more where that does not come
    out even. (The last one has the final head besides.)

    Raises ValueError unless every stage has a layer, and every layer a stage."""
    if num_stages > num_layers:
        raise ValueError(
            f"pipeline_parallel_size is {num_stages}, but the model has {num_layers} layers and every stage needs one; "
            f"choose at most {num_layers}"
        )
    if given is None:
        least, more = divmod(num_layers, num_stages)
        return (least + 1,) * more + (least,) * (num_stages - more)
    if len(given) != num_stages:
        raise ValueError(
            f"pipeline_layers is {_words(given)}, but pipeline_parallel_size is {num_stages}; give one number for each "
            "stage"
        )
    if any(count < 1 for count in given):
        raise ValueError(f"pipeline_layers is {_words(given)}; every stage needs at least one layer")
    if sum(given) != num_layers:
        even = split_layers(num_layers, num_stages)
        raise ValueError(
            f"pipeline_layers is {_words(given)}, {sum(given)} layers in all, but the model has {num_layers}; choose "
            f"numbers that add up to {num_layers}, such as {_words(even)}"
        )
    return tuple(given)


def layer_ranges(layers_per_stage: Sequence[int]) -> list[range]:
    """Layers of each stage, counted from 0."""
    stops = itertools.accumulate(layers_per_stage)
    return [range(stop - count, stop) for count, stop in zip(layers_per_stage, stops, strict=True)]


def stages_in_words(layers_per_stage: Sequence[int], exit_layers: Sequence[int]) -> str:
    """Such as `layers 1 to 4 (exit 2), 5 to 8 (exits 6, 8), 9`.

    exit_layers: the layers, counted from 1, that name the exits."""
    stages = []
    for layers in layer_ranges(layers_per_stage):
        exits = [number for number in exit_layers if number - 1 in layers]
        text = str(layers.stop) if len(layers) == 1 else f"{layers.start + 1} to {layers.stop}"
        if exits:
            text += f" (exit{'s' * (len(exits) > 1)} {_words(exits, ', ')})"
        stages.append(text)
    return f"layers {', '.join(stages)}"


def _words(numbers: Sequence[int], separator: str = " ") -> str:
    return separator.join(map(str, numbers))
