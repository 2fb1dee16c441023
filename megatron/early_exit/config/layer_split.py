"""How layers are split over the stages of a pipeline: what a layout's text says, and the flags that ask for a split.

A stage is a model chunk; with interleaving a rank has several. A split is the number of layers of every stage, in the
order of the layers.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

_LONGEST = 100_000
"""Letters of a layout, written out: more than the layers of any model."""

_PART = re.compile(r"(?:\((?P<group>[^()]*)\)(?=\*)|(?P<letter>[EtmL|]))(?:\*(?P<times>\d+))?")


def split_layers(
    num_layers: int,
    num_ranks: int,
    *,
    per_chunk: int | None = None,
    first: int | None = None,
    last: int | None = None,
    layout: str | None = None,
) -> tuple[int, ...]:
    """Layers of every stage of a model of `num_layers` on `num_ranks` pipeline ranks.

    per_chunk: layers of one model chunk. first, last: layers of these ranks. layout: as `parse_layout` reads it. Raises
    ValueError with the flags that do not fit."""
    if num_ranks < 1:
        raise ValueError(f"--pipeline-model-parallel-size {num_ranks}: must be at least 1")
    if per_chunk is not None and num_ranks == 1:
        raise ValueError(
            f"--num-layers-per-virtual-pipeline-stage {per_chunk} with --pipeline-model-parallel-size 1: there is no"
            " pipeline to interleave; drop it"
        )
    ends = {"--decoder-first-pipeline-num-layers": first, "--decoder-last-pipeline-num-layers": last}
    others = [
        f"{flag} {count}"
        for flag, count in (*ends.items(), ("--num-layers-per-virtual-pipeline-stage", per_chunk))
        if count is not None
    ]
    if layout is not None and others:
        raise ValueError(
            f"--pipeline-model-parallel-layout {layout} with {' '.join(others)}: the layout says the layers of every"
            " stage; give one of them"
        )
    if (first, last) != (None, None) and per_chunk is not None:
        raise ValueError(
            f"{' '.join(others)}: chunks of different sizes are given by --pipeline-model-parallel-layout alone"
        )
    if layout is not None:
        return _by_layout(num_layers, num_ranks, layout)
    if (first, last) != (None, None):
        return _by_ends(num_layers, num_ranks, first, last)
    if num_layers % num_ranks:
        raise ValueError(
            f"--num-layers {num_layers} is not divisible by --pipeline-model-parallel-size {num_ranks}: change one, or"
            " give the layers of the first or the last stage (--decoder-first-pipeline-num-layers,"
            " --decoder-last-pipeline-num-layers), or of every stage (--pipeline-model-parallel-layout)"
        )
    per_rank = num_layers // num_ranks
    if per_chunk is None:
        return (per_rank,) * num_ranks
    if per_chunk < 1 or per_rank % per_chunk:
        raise ValueError(
            f"--num-layers-per-virtual-pipeline-stage {per_chunk} does not divide the {per_rank} layers of a stage"
            f" (--num-layers {num_layers} / --pipeline-model-parallel-size {num_ranks}); chunks of different sizes are"
            " given by --pipeline-model-parallel-layout"
        )
    return (per_chunk,) * (num_layers // per_chunk)


def _by_ends(num_layers: int, num_ranks: int, first: int | None, last: int | None) -> tuple[int, ...]:
    """The first or the last stage as they are given, the others equally."""
    first_stage = () if first is None else (first,)
    last_stage = () if last is None else (last,)
    flags = {"--decoder-first-pipeline-num-layers": first, "--decoder-last-pipeline-num-layers": last}
    given = " ".join(f"{flag} {count}" for flag, count in flags.items() if count is not None)
    if num_ranks == 1:
        raise ValueError(f"{given} with --pipeline-model-parallel-size 1: one stage has all layers; drop it")
    if min(first_stage + last_stage) < 1:
        raise ValueError(f"{given}: every stage needs at least one layer")
    num_others = num_ranks - len(first_stage + last_stage)
    others = f"{num_others} {'stage' if num_others == 1 else 'stages'}"
    rest = num_layers - sum(first_stage + last_stage)
    if num_others == 0 and rest:
        raise ValueError(
            f"{given}: {sum(first_stage + last_stage)} layers on {num_ranks} stages, not --num-layers {num_layers};"
            " correct one of them"
        )
    if num_others and (rest < num_others or rest % num_others):
        raise ValueError(
            f"{given} with --num-layers {num_layers} and --pipeline-model-parallel-size {num_ranks}: {max(rest, 0)}"
            f" layers are left for {others} of equal size; change a number, or give the layers of every stage by"
            " --pipeline-model-parallel-layout"
        )
    return (*first_stage, *(rest // num_others for _ in range(num_others)), *last_stage)


def _by_layout(num_layers: int, num_ranks: int, layout: str) -> tuple[int, ...]:
    """Every stage as the layout says."""
    shown = f"--pipeline-model-parallel-layout {layout}"
    try:
        counts = parse_layout(layout)
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from None
    if num_ranks == 1 and len(counts) > 1:
        raise ValueError(f"{shown}: {len(counts)} stages with --pipeline-model-parallel-size 1: one has all layers")
    if len(counts) % num_ranks:
        raise ValueError(f"{shown}: {len(counts)} stages, no multiple of --pipeline-model-parallel-size {num_ranks}")
    if sum(counts) != num_layers:
        raise ValueError(f"{shown}: {sum(counts)} layers, not --num-layers {num_layers}; correct one of them")
    return counts


def parse_layout(layout: str) -> tuple[int, ...]:
    """Layers of every stage by Megatron's text for them, such as `Et*3|(tt|)*2tL`: `|` divides stages, `E` is the
    embedding, `t` a layer, `L` the loss; `*3` repeats a letter or what stands in parentheses, commas say nothing.

    Raises ValueError for what is no layout, or none that exits can be trained in."""
    stages = _written_out(layout.replace(",", "")).split("|")
    if any("m" in stage for stage in stages):
        raise ValueError("m: multi-token prediction is not supported: its heads would stand behind the last exit")
    if not stages[0].startswith("E") or "".join(stages).count("E") != 1:
        raise ValueError("the embedding (E) stands once, at the beginning of the first stage")
    if not stages[-1].endswith("L") or "".join(stages).count("L") != 1:
        raise ValueError("the loss (L) stands once, at the end of the last stage")
    counts = tuple(stage.count("t") for stage in stages)
    if 0 in counts:
        raise ValueError(
            f"stage {counts.index(0)} has no layer (t): stages of the embedding or the loss alone are not supported"
        )
    return counts


def _written_out(text: str) -> str:
    """A layout without repetitions."""
    written, place = "", 0
    while place < len(text):
        part = _PART.match(text, place)
        if part is None:
            raise ValueError(f"{text[place:]!r} is no part of a layout; one looks like Et*3|(tt|)*2tL")
        inner = part["letter"] or _written_out(part["group"])
        times = int(part["times"] or 1)
        if len(inner) * times + len(written) > _LONGEST:
            raise ValueError(f"more than {_LONGEST:,} layers and stages")
        written, place = written + inner * times, part.end()
    return written


def layout_text(layers_per_stage: Sequence[int]) -> str:
    """The text of a split: `parse_layout` reads it."""
    letters = lambda count: "t" if count == 1 else f"t*{count}"
    *before, last = layers_per_stage
    parts = []
    for count, equal in itertools.groupby(before):
        stage, times = f"{letters(count)}|", len(list(equal))
        parts.append(f"({stage})*{times}" if times > 2 else stage * times)
    return f"E{''.join(parts)}{letters(last)}L"


def layer_numbers(layers_per_stage: Sequence[int]) -> tuple[range, ...]:
    """Numbers, from 1, of the layers of every stage."""
    ends = itertools.accumulate(layers_per_stage)
    return tuple(range(end - count + 1, end + 1) for end, count in zip(ends, layers_per_stage, strict=True))


def split_flags(layers_per_stage: Sequence[int], num_ranks: int) -> list[str]:
    """Flags of training that split layers so, the simplest that can say it; none where all ranks have as many."""
    is_even = len(set(layers_per_stage)) == 1
    if len(layers_per_stage) > num_ranks:
        if is_even:
            return ["--num-layers-per-virtual-pipeline-stage", str(layers_per_stage[0])]
        return ["--pipeline-model-parallel-layout", layout_text(layers_per_stage)]
    if is_even:
        return []
    first, *middle, last = layers_per_stage
    if not middle:
        return ["--decoder-first-pipeline-num-layers", str(first)]
    if len(set(middle)) > 1:
        return ["--pipeline-model-parallel-layout", layout_text(layers_per_stage)]
    flags = {"--decoder-first-pipeline-num-layers": first, "--decoder-last-pipeline-num-layers": last}
    return [word for flag, count in flags.items() if count != middle[0] for word in (flag, str(count))]
