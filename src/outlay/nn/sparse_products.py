"""Products with a matrix given by sorted flat positions and values, seen by the FLOP counter.

They are operators of their own, so that a plan on fake tensors can pass through them and their
FLOPs are counted.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def has_sparse_products(x: Tensor) -> bool:
    """True where the sparse kernels are worth a thought: measured on CPU alone, with MKL."""
    wide = x.dtype in (torch.float32, torch.float64)
    return x.device.type == "cpu" and wide and torch.backends.mkl.is_available()


@functools.cache
def _be_quiet() -> None:
    """Torch says once in a process that sparse matrices are in beta: not in the user's run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(1).to_sparse_csr()


def _rows(values: Tensor, positions: Tensor, rows: int, columns: int) -> Tensor:
    """CSR of the matrix."""
    steps = torch.arange(0, rows * columns + 1, columns, device=values.device)
    starts = torch.searchsorted(positions, steps.to(positions.dtype), out_int32=True)
    inner = (positions % columns).int()
    return torch.sparse_csr_tensor(starts, inner, values, (rows, columns), check_invariants=False)


def _columns(values: Tensor, positions: Tensor, rows: int, columns: int) -> Tensor:
    """CSR of the transposed matrix."""
    inner, order = (positions % columns).sort(stable=True)
    steps = torch.arange(columns + 1, device=values.device, dtype=inner.dtype)
    starts = torch.searchsorted(inner, steps, out_int32=True)
    outer = (positions // columns)[order].int()
    return torch.sparse_csr_tensor(
        starts, outer, values[order], (columns, rows), check_invariants=False
    )


def _wide(tensor: Tensor) -> Tensor:
    """Sparse kernels know float32 and float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


torch.library.define(
    "outlay::sparse_product",
    "(Tensor values, Tensor positions, SymInt rows, SymInt columns, Tensor dense, "
    "bool transposed) -> Tensor",
)
torch.library.define(
    "outlay::sampled_product", "(Tensor left, Tensor right, Tensor positions) -> Tensor"
)


@torch.library.impl("outlay::sparse_product", "default")
def _sparse_product(
    values: Tensor, positions: Tensor, rows: int, columns: int, dense: Tensor, transposed: bool
) -> Tensor:
    _be_quiet()
    made = (_columns if transposed else _rows)(_wide(values), positions, rows, columns)
    with torch.autocast(dense.device.type, enabled=False):
        return (made @ _wide(dense)).to(dense.dtype)


@torch.library.register_fake("outlay::sparse_product")
def _(values: Any, positions: Any, rows: Any, columns: Any, dense: Any, transposed: Any) -> Tensor:
    return dense.new_empty(columns if transposed else rows, dense.shape[1])


def sparse_product(
    values: Tensor, positions: Tensor, rows: int, columns: int, dense: Tensor, transposed: bool
) -> Tensor:
    """S times a dense matrix, or S transposed times it.

    Args:
        values: Entries of S. Shape (k,).
        positions: Their flat places, increasing. Shape (k,).
        rows: Of S.
        columns: Of S.
        dense: Shape (columns, t), or (rows, t) if transposed.
        transposed: Take S transposed.

    Returns:
        Shape (rows, t), or (columns, t) if transposed, in the type of `dense`.
    """
    return torch.ops.outlay.sparse_product(values, positions, rows, columns, dense, transposed)


@torch.library.impl("outlay::sampled_product", "default")
def _sampled_product(left: Tensor, right: Tensor, positions: Tensor) -> Tensor:
    _be_quiet()
    blank = torch.zeros(len(positions), dtype=_wide(left[:0]).dtype, device=left.device)
    pattern = _rows(blank, positions, left.shape[0], right.shape[1])
    found = torch.sparse.sampled_addmm(pattern, _wide(left), _wide(right), beta=0.0)
    return found.values().to(left.dtype)


@torch.library.register_fake("outlay::sampled_product")
def _(left: Any, right: Any, positions: Any) -> Tensor:
    return left.new_empty(positions.shape)


def sampled_product(left: Tensor, right: Tensor, positions: Tensor) -> Tensor:
    """Entries of left @ right at flat positions, increasing.

    Args:
        left: Shape (rows, t).
        right: Shape (t, columns).
        positions: Shape (k,).

    Returns:
        Shape (k,), in the type of `left`.
    """
    return torch.ops.outlay.sampled_product(left, right, positions)


@register_flop_formula(torch.ops.outlay.sparse_product)
def _product_flops(
    values: Any, positions: Any, rows: Any, columns: Any, dense: Any, *_: Any, **__: Any
) -> int:
    return 2 * values[0] * dense[1]


@register_flop_formula(torch.ops.outlay.sampled_product)
def _sampled_flops(left: Any, right: Any, positions: Any, **_: Any) -> int:
    return 2 * positions[0] * left[1]
