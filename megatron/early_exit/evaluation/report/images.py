"""Bytes of plots: PNG of few colours, sharp on paper and light enough to stand in the page."""

from __future__ import annotations

import io

from megatron.early_exit.evaluation.report.plots.base import SETTINGS, Plot

DOTS_PER_INCH = 180
_NUM_COLOURS = 64


def png(plot: Plot) -> bytes:
    """The same plot gives the same bytes."""
    import matplotlib
    from PIL import Image

    drawn = io.BytesIO()
    with matplotlib.rc_context(SETTINGS):
        plot.draw().savefig(drawn, format="png", dpi=DOTS_PER_INCH)
    image = Image.open(drawn).convert("RGB").quantize(_NUM_COLOURS)
    written = io.BytesIO()
    image.save(written, format="png", optimize=True)
    return written.getvalue()
