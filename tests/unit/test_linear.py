"""Linear layers for decoding against a plain product, for one row, a few and many."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from megatron.early_exit.inference.worker import linear as linear_module
from megatron.early_exit.inference.worker.linear import (
    DenseLinear,
    FewRowsLinear,
    Int8Linear,
    PackedLinear,
    WeightFirstLinear,
    can_pack,
    fastest_kinds,
    fastest_linear,
)

ROWS = (1, 2, 3, 8, 9, 40)


def inputs(rows: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(70, 48, generator=generator) * torch.linspace(0.1, 3, 70)[:, None]
    shapes = ((rows, 48), (70,), (rows, 70))
    return tuple(t.to(dtype) for t in (weight, *(torch.randn(s, generator=generator) for s in shapes)))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", [DenseLinear, WeightFirstLinear, PackedLinear, FewRowsLinear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense(kind: type, rows: int, with_bias: bool, dtype: torch.dtype) -> None:
    weight, x, bias, residual = inputs(rows, dtype)
    bias = bias if with_bias else None
    if kind in (PackedLinear, FewRowsLinear) and not can_pack(weight):
        pytest.skip(f"this CPU has no packed {dtype}")
    linear = kind(weight, bias, (WeightFirstLinear, DenseLinear)) if kind is FewRowsLinear else kind(weight, bias)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.1}
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    with torch.inference_mode():
        torch.testing.assert_close(linear(x).double(), expected, **tolerance)
        torch.testing.assert_close(linear.add_to(residual, x).double(), residual.double() + expected, **tolerance)
        assert linear.add_to(residual, x).dtype == dtype
    assert linear.num_bytes == weight.numel() * weight.element_size()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_int8(rows: int, with_bias: bool) -> None:
    weight, x, bias, residual = inputs(rows)
    linear = Int8Linear(weight, bias if with_bias else None)
    kept = linear.dequantised()
    # Each row's largest weight is 127 steps: what is lost is half a step, and the rounding of the scale in bf16.
    assert ((kept - weight).abs() <= weight.abs().amax(1, keepdim=True) * (0.51 / 127 + 2**-8)).all()
    expected = F.linear(x.bfloat16().float(), kept, bias if with_bias else None)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x).float(), expected, rtol=2e-2, atol=0.25)
        added = linear.add_to(residual, x)
    assert added.dtype == torch.float32
    torch.testing.assert_close(added, residual + expected, rtol=2e-2, atol=0.25)
    assert linear.num_bytes == weight.numel()


def test_a_row_of_zeros_in_int8() -> None:
    weight, x, _, _ = inputs(2)
    weight[3] = 0
    assert Int8Linear(weight)(x)[:, 3].abs().max() == 0


def test_packing_is_for_what_the_library_takes() -> None:
    assert isinstance(fastest_linear(torch.randn(8, 8, dtype=torch.float64)), DenseLinear)
    assert not can_pack(torch.randn(8, 8, dtype=torch.float16))


def test_the_form_is_chosen_by_what_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(600, 600)
    seconds = {PackedLinear: [1.0, 1.0], DenseLinear: [0.9, 0.5], WeightFirstLinear: [0.6, 0.7]}
    monkeypatch.setattr(linear_module, "_seconds", lambda forms, x: seconds[type(forms[0])][x.size(0) - 1])
    fastest_kinds.cache_clear()
    try:
        chosen = fastest_linear(weight)
        assert [type(chosen._form(rows)) for rows in (1, 2, 3, 40)] == [
            WeightFirstLinear, DenseLinear, PackedLinear, PackedLinear,
        ]  # fmt: skip
        seconds |= {DenseLinear: [0.9, 0.9], WeightFirstLinear: [0.9, 0.9]}  # not worth twice the memory
        fastest_kinds.cache_clear()
        assert isinstance(fastest_linear(weight), PackedLinear)
    finally:
        fastest_kinds.cache_clear()
    assert isinstance(fastest_linear(weight[:10]), DenseLinear)
