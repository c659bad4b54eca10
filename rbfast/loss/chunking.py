"""Chunk sizes of the loss, in rows. Shapes: T rows take part, H hidden size, V vocabulary, V' a dense teacher's."""

from typing import NamedTuple

import torch

from rbfast import ops


class Budget(NamedTuple):
    """The limit of a chunk's logits (student's and teacher's): `bytes`, or `rows` rows if that is more.

    Larger chunks read the head fewer times, and in a product of few rows packing the head dominates.
    """

    bytes: int
    rows: int


ON_CPU = Budget(40 * 2**20, 96)
# AMX products are faster, so packing the head for each chunk is a larger share of the time: with V = 151936 and a dense
# teacher, chunks of 96 rows take 1.3 times as long as chunks of 256; 512 rows gain nothing more.
IN_TILES = Budget(96 * 2**20, 256)
# Chunks hold a multiple of this many rows: head_grad_ sums rows in pairs or in groups of 32, which must not be split.
ROW_MULTIPLE = 32

ROW_UNIT = 32  # values: 128 bytes of fp32 logits (a GPU cache line, two of a CPU), 64 bytes of a bf16 gradient

# On a GPU logits and dz together take at most this much. Rows fill whole tiles of the GEMMs: on an H200, with H = 4096
# and V = 128256, chunks of 768 rows take 1% longer than 1024 and 512 take 5% longer; more than 1024 gain nothing. With
# a dense teacher, 896 rows take 6% longer and 832 take 13% longer.
GPU_BYTES = 925 * 10**6
REFERENCE_COPIES = 16  # of a chunk's logits, in their size: the reference makes about eight in fp64
TILE_ROWS = 256
MAX_ROWS = 1024
# Each product added to a bf16 gradient rounds it. With more than two, the error could exceed 0.3%.
MAX_ROUNDINGS = 2


class Chunking(NamedTuple):
    """Rows that are in memory at a time: `chunk` rows of logits, `product` rows of dz, `extra` rows of teacher logits.

    extra: on a GPU it may be less than a chunk. Then only a dense teacher's product is cut, and the other two keep the
    fast size of 1024 rows: with 768 rows the backward product costs 9% more per row.
    keeps_dz: dz has its own memory, in bf16. Otherwise dz overwrites the logits, and product == chunk.
    rounds_sum: the head's gradient is summed in bf16, over at most MAX_ROUNDINGS products. Otherwise in fp32.
    """

    chunk: int
    product: int
    extra: int
    keeps_dz: bool = False
    rounds_sum: bool = False


def chunk_on_cpu(rows: int, row_bytes: int, requested: int | None, budget: Budget = ON_CPU) -> Chunking:
    """row_bytes: the size of a row's logits. requested: the rows per chunk that the user set, or None."""
    fitting = max(budget.rows, budget.bytes // row_bytes // ROW_MULTIPLE * ROW_MULTIPLE)
    return _even_chunks(rows, requested, fitting, ROW_MULTIPLE)


def chunk_on_gpu(
    rows: int, row_bytes: int, requested: int | None, *, memory: int = GPU_BYTES, extra_bytes: int = 0
) -> Chunking:
    """extra_bytes: the size of a row's teacher logits. If those of a whole chunk do not fit, they are cut evenly."""
    fitting = max(ROW_MULTIPLE, min(MAX_ROWS, memory // (row_bytes + extra_bytes // 2)))
    multiple = TILE_ROWS if fitting >= TILE_ROWS else ROW_MULTIPLE
    chunking = _even_chunks(rows, requested, fitting // multiple * multiple, multiple)
    chunk = chunking.chunk
    if requested or extra_bytes == 0 or chunk * (row_bytes + extra_bytes) <= memory:
        return chunking
    left = max(multiple, (memory - chunk * row_bytes) // extra_bytes // multiple * multiple)
    return chunking._replace(extra=_even_chunks(chunk, None, left, multiple).chunk)


def gpu_memory(device: torch.device) -> int:
    """The most bytes of a chunk's logits on a GPU."""
    return GPU_BYTES if ops.has_row_kernel(device) else GPU_BYTES // REFERENCE_COPIES


def chunk_trained_head(
    rows: int,
    row_bytes: int,
    requested: int | None,
    head: torch.Size,
    *,
    memory: int = GPU_BYTES,
    extra_bytes: int = 0,
) -> Chunking:
    """For a trained head in bf16 on a GPU: each product reads and writes the whole gradient [V, H], so there are few.

    If T <= 4 H, dz of half the rows is smaller than a sum in fp32. Then the sum is in bf16, over two products.
    """
    V, H = head
    dz_bytes = torch.bfloat16.itemsize * V
    rounds_sum = rows <= 4 * H
    product = max(GPU_BYTES // 2 // dz_bytes, -(-rows // MAX_ROUNDINGS) if rounds_sum else 0)
    product = _clamp(rows, _round_up(product, TILE_ROWS))
    room = min(memory, max(GPU_BYTES - product * dz_bytes, GPU_BYTES // 4))
    chunking = chunk_on_gpu(product, row_bytes, requested, memory=room, extra_bytes=extra_bytes)
    return Chunking(chunking.chunk, product, chunking.extra, True, rounds_sum)


def _even_chunks(rows: int, requested: int | None, max_rows: int, multiple: int) -> Chunking:
    """Chunks of `requested` rows, or else the fewest nearly equal chunks of at most `max_rows` rows each."""
    chunks = max(1, -(-rows // max_rows))
    chunk = _clamp(rows, _round_up(requested, ROW_MULTIPLE) if requested else _round_up(-(-rows // chunks), multiple))
    return Chunking(chunk, chunk, chunk)


def _clamp(rows: int, max_rows: int) -> int:
    return max(1, min(rows, max_rows))


def _round_up(rows: int, multiple: int) -> int:
    return -(-rows // multiple) * multiple


def logits_bytes(tokens: int, vocabulary: int, device: torch.device, teacher_vocabulary: int = 0) -> int:
    """The memory of the logits that exist at a time for a loss of `tokens` rows.

    It includes a dense teacher's and, on a GPU without a kernel for rows, the copies that the reference makes.
    """
    is_gpu = device.type != "cpu"
    own, extra = 4 * row_width(vocabulary, is_gpu), 4 * row_width(teacher_vocabulary, is_gpu)
    if is_gpu:
        chunking = chunk_on_gpu(tokens, own, None, memory=gpu_memory(device), extra_bytes=extra)
    else:
        chunking = chunk_on_cpu(tokens, own + extra, None, IN_TILES if ops.cpu_isa() == "amx" else ON_CPU)
    copies = REFERENCE_COPIES if is_gpu and not ops.has_row_kernel(device) else 0
    return (1 + copies) * chunking.chunk * own + chunking.extra * extra


def row_width(columns: int, is_gpu: bool) -> int:
    """The row stride, in values, that aligns rows of `columns` columns to 64 bytes.

    Dense rows of a vocabulary of 50257 would only be aligned to 4 bytes: GPU kernels, and perhaps the library's GEMMs,
    would read and write most of them value by value. On a CPU the stride is an odd number of units. With 49152 columns,
    for example, all rows would start in the same few sets of a cache, and the product that writes them took 10% longer.
    """
    units = -(-columns // ROW_UNIT)
    return ROW_UNIT * (units if is_gpu or units == 0 else units | 1)
