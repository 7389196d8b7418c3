"""The rows of a batch as the kernels want them: settings and scratch memory on the device.

A = rows that proxies decide, of the batch's R; K = candidates, W = width, P = loaded proxies.
"""

from typing import Any, ClassVar

import torch
import triton
from torch import Tensor

from proxy.acceptance import Decision
from proxy.gpu.kernel import BLOCK, CHUNK, GROUP, SLICE, decide_kernel, read_kernel
from proxy.network import Weights

READ_WARPS, DECIDE_WARPS = 4, 8
_MAX_CANDIDATES, _MAX_WIDTH, _MAX_VOCAB_SIZE = 128, 128, 2**19


def supports(max_candidates: int, width: int, vocab_size: int) -> bool:
    """Whether the kernels are made for these sizes. They would be slow, or fail, for larger ones."""
    return (
        max_candidates <= _MAX_CANDIDATES and width <= _MAX_WIDTH and vocab_size <= _MAX_VOCAB_SIZE
    )


class KernelRows:
    """Made when the batch changes; the scratch memory is used at every step."""

    def __init__(
        self,
        integers: Tensor,  # [A, kernel.INTEGERS] int64
        floats: Tensor,  # [A, kernel.FLOATS] float32
        tiles: Tensor,  # [T, TILE] int32, rows of one proxy, indices into A; -1 = none
        weights: Weights,
        tables: Tensor,  # [P, V, 2W]
        *,
        max_candidates: int,
    ) -> None:
        _, vocab_size, width = tables.shape
        hidden_size, width = weights.state.shape[1], width // 2
        count, num_tiles = len(integers), len(tiles)
        num_chunks = triton.cdiv(vocab_size, int(CHUNK))
        num_blocks = triton.cdiv(vocab_size, int(BLOCK))
        num_slices = triton.cdiv(hidden_size, int(SLICE))

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=integers.device)

        scratch = (
            empty(count, triton.cdiv(vocab_size, int(GROUP))),
            empty(count, num_blocks),
            empty(count, 2, num_chunks),
            empty(num_slices, count, 2 * width),
            empty(num_slices, count),
        )
        block_k = _block(max_candidates)
        sizes = vocab_size, hidden_size, width
        self._count = count
        self._read = _Launch(
            read_kernel,
            grid=(num_tiles * num_slices + count * num_chunks, 1, 1),
            sizes=(*sizes, _block(2 * width)),
            num_warps=READ_WARPS,
        )
        state = weights.state.mT.contiguous()
        self._read_arguments = integers, floats, tiles, state, *scratch, count, num_tiles
        self._decide = _Launch(
            decide_kernel,
            grid=(count, 1, 1),
            sizes=(
                *sizes,
                block_k,
                _block(width),
                max(block_k, triton.next_power_of_2(num_blocks)),
                triton.next_power_of_2(num_chunks),
                triton.next_power_of_2(num_slices),
            ),
            num_warps=DECIDE_WARPS,
        )
        rest = (weights.product, weights.logprob, weights.score, weights.bias)
        self._decide_arguments = (
            *(integers, floats, *scratch, tables),
            *(part.contiguous() for part in rest),
        )

    def decide(
        self,
        logits: Tensor,  # [R, V] float32 or bfloat16
        hidden: Tensor,  # [R, H], the lm_head's input
        positions: Tensor,  # [R or more] int, index of the token to be drawn
        *,
        temperature_applied: bool,  # the logits are divided by the temperature of the nucleus
    ) -> Decision:
        """The decision of each row; `slots` index the candidates, the most probable first."""
        columns = torch.empty(4, self._count, dtype=torch.int64, device=logits.device)
        applied = int(temperature_applied)
        of_logits = logits, _stride(logits)
        self._read(*of_logits, hidden, _stride(hidden), *self._read_arguments, applied)
        self._decide(*of_logits, positions, *self._decide_arguments, columns, self._count, applied)
        return Decision(columns)


class _Launch:
    """Launches a kernel without Triton's own look at every argument, which takes 40 microseconds.

    A compiled kernel holds for arguments of the same types and alignments, and integers of the same
    kind. Of one `_Launch` only the first arguments change: tensors, each with its stride or none.
    """

    _compiled: ClassVar[dict[tuple[Any, ...], Any]] = {}

    def __init__(
        self, kernel: Any, *, grid: tuple[int, int, int], sizes: tuple[int, ...], num_warps: int
    ) -> None:
        self._kernel = kernel
        self._grid = grid
        self._sizes = sizes
        self._num_warps = num_warps

    def __call__(self, *arguments: Any) -> None:
        varying = tuple(
            (x.dtype, x.data_ptr() % 16) if isinstance(x, Tensor) else x for x in arguments[:4]
        )
        key = self._kernel.__name__, self._sizes, self._num_warps, varying
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[self._grid](*arguments, *self._sizes)
            return
        # Triton's interpreter returns None.
        compiled = self._kernel[self._grid](*arguments, *self._sizes, num_warps=self._num_warps)
        if compiled is not None:
            self._compiled[key] = compiled


def _block(size: int) -> int:
    """What a kernel reserves for so many numbers: a power of two, and enough for a product."""
    return max(16, triton.next_power_of_2(size))


def _stride(x: Tensor) -> int:
    """From row to row. A single row may have any: then its length, for which the kernel is compiled."""
    return x.stride(0) if len(x) > 1 else x.shape[1]
