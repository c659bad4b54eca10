"""How many rows a loss takes at a time. Shapes: T rows take part, H hidden size, V vocabulary, V' a dense teacher's."""

from typing import NamedTuple

import torch

from rbfast import ops


class Budget(NamedTuple):
    """A chunk's logits (student's and teacher's) take at most so many bytes, or those of so many rows if that is more.

    Larger chunks read the head fewer times, and a product of few rows spends its time on arranging the head.
    """

    bytes: int
    rows: int


ON_CPU = Budget(40 * 2**20, 96)
# Products in AMX's tiles take less time, of which arranging the head for a chunk is a larger share: with V = 151936 and
# a dense teacher a call takes 1.3 times as long by 96 rows as by 256, and by 512 no less.
IN_TILES = Budget(96 * 2**20, 256)
# Chunks hold a multiple of this many rows: head_grad_ sums rows in pairs, or by 32, which a chunk must never split.
ROW_MULTIPLE = 32

# On a GPU logits and dz take at most this much together. Rows fill whole tiles of the products: on an H200, with
# H = 4096 and V = 128256, 768 rows at a time take 1% longer than 1024 and 512 take 5%, but more gain nothing. A call
# with a dense teacher takes 6% longer by 896 rows and 13% by 832.
GPU_BYTES = 925 * 10**6
TILE_ROWS = 256
MOST_ROWS = 1024
# Each product that is added to a gradient in bf16 rounds it. With more than two the error could exceed 0.3%.
MOST_ROUNDINGS = 2


class Chunking(NamedTuple):
    """How many rows' logits exist at a time, how many rows' dz, and how many rows' teacher logits beside them.

    beside: on a GPU it may be less than a chunk. Of three products with 1024 rows each a dense teacher's alone is cut
    then, and the others keep the size that is fast: 768 rows cost the product back 9% more each.
    keeps_dz: dz has memory of its own, in bf16, beside the logits. Else it takes their place, and product is chunk.
    rounds_sum: the head's gradient is added up in bf16, by at most MOST_ROUNDINGS products. Else it is in fp32.
    """

    chunk: int
    product: int
    beside: int
    keeps_dz: bool = False
    rounds_sum: bool = False


def chunk_on_cpu(rows: int, row_bytes: int, asked: int | None, budget: Budget = ON_CPU) -> Chunking:
    """row_bytes: of a row's logits. asked: the rows per chunk that the user sets, or None."""
    fitting = max(budget.rows, budget.bytes // row_bytes // ROW_MULTIPLE * ROW_MULTIPLE)
    return _even(rows, asked, fitting, ROW_MULTIPLE)


def chunk_on_gpu(
    rows: int, row_bytes: int, asked: int | None, memory: int = GPU_BYTES, beside_bytes: int = 0
) -> Chunking:
    """beside_bytes: of a row's teacher logits. They are cut as evenly as fits if a whole chunk's do not."""
    fitting = max(ROW_MULTIPLE, min(MOST_ROWS, memory // (row_bytes + beside_bytes // 2)))
    multiple = TILE_ROWS if fitting >= TILE_ROWS else ROW_MULTIPLE
    chunking = _even(rows, asked, fitting // multiple * multiple, multiple)
    chunk = chunking.chunk
    if asked or beside_bytes == 0 or chunk * (row_bytes + beside_bytes) <= memory:
        return chunking
    left = max(multiple, (memory - chunk * row_bytes) // beside_bytes // multiple * multiple)
    return chunking._replace(beside=_even(chunk, None, left, multiple).chunk)


def chunk_trained_head(
    rows: int, row_bytes: int, asked: int | None, head: torch.Size, beside_bytes: int = 0
) -> Chunking:
    """On a GPU in bf16: a product that adds to the head's gradient [V, H] reads and writes all of it, so few are made.

    Half of the rows' dz is smaller than a sum in fp32 if T <= 4 H. Then the sum is in bf16, with two products.
    """
    V, H = head
    dz_bytes = torch.bfloat16.itemsize * V
    rounds_sum = rows <= 4 * H
    product = max(GPU_BYTES // 2 // dz_bytes, -(-rows // MOST_ROUNDINGS) if rounds_sum else 0)
    product = _limit(rows, _up(product, TILE_ROWS))
    room = max(GPU_BYTES - product * dz_bytes, GPU_BYTES // 4)
    chunking = chunk_on_gpu(product, row_bytes, asked, room, beside_bytes)
    return Chunking(chunking.chunk, product, chunking.beside, True, rounds_sum)


def _even(rows: int, asked: int | None, most: int, multiple: int) -> Chunking:
    """Chunks of as many rows as are asked for, or about equal ones: as few as hold at most `most` rows each."""
    chunks = max(1, -(-rows // most))
    chunk = _limit(rows, _up(asked, ROW_MULTIPLE) if asked else _up(-(-rows // chunks), multiple))
    return Chunking(chunk, chunk, chunk)


def _limit(rows: int, most: int) -> int:
    return max(1, min(rows, most))


def _up(rows: int, multiple: int) -> int:
    return -(-rows // multiple) * multiple


def logits_bytes(tokens: int, vocabulary: int, device: torch.device, teacher_vocabulary: int = 0) -> int:
    """What the logits take that exist at a time, of so many tokens; a dense teacher's too."""
    own, beside = 4 * vocabulary, 4 * teacher_vocabulary
    if device.type != "cpu":
        chunking = chunk_on_gpu(tokens, own, None, beside_bytes=beside)
    else:
        chunking = chunk_on_cpu(tokens, own + beside, None, IN_TILES if ops.cpu_isa() == "amx" else ON_CPU)
    return chunking.chunk * own + chunking.beside * beside
