"""The sparse path, compiled by Numba: route plan, calls of ONNX Runtime's C library, the loop.

For what :func:`sdt_deploy.runtime.compiled_loop.fits` lets through. Arrays hold what those of
:mod:`sdt_deploy.runtime.routing` and :mod:`sdt_deploy.runtime.sparse` hold; the tests compare them.

All of it is one file, for Numba compiles anew what it keeps on disk only if the file changes that a
function is in, not if one does that it calls. The two functions that Python calls have signatures:
they are compiled, or read from disk, on import, and never in the middle of a run.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

from sdt_deploy.ort_library import ELEMENT_TYPES, Function
from sdt_deploy.runtime.routing import HIDDEN, Float32, Int32

Int64 = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
ADDRESS, ELEMENT_TYPE, N_BYTES, N_AXES, FIRST_AXIS = range(5)
ROW = 12
"""A tensor is a row of int64: where it lies, its type, its size, its axes. What lies there belongs
to the caller: a compiled function frees its own arrays once it does not name them any more."""
ENTRY, ROUTE, MOVE, HEAD, FIRST_STAGE = range(5)
"""Places in ``times``."""
_RUN = int(Function.RUN)
_MAKE_TENSOR = int(Function.CREATE_TENSOR_WITH_DATA_AS_ORT_VALUE)
_RELEASE = int(Function.RELEASE_VALUE)
_F32, _I32 = ELEMENT_TYPES["float32"], ELEMENT_TYPES["int32"]
_CLOCK_MONOTONIC = 6 if sys.platform == "darwin" else 1
_WORDS = types.int64[::1]
_FLOATS, _INTS, _ROWS = types.float32[::1], types.int32[::1], types.uint8[:, ::1]
_FIXED_FLOATS = types.Array(types.float32, 1, "C", readonly=True)


@intrinsic
def call(typingctx: Any, address: Any, arguments: Any) -> Any:
    """Call the C function at ``address`` with a tuple of words; returns a word."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word, n = ir.IntType(64), signature.args[1].count
        function = builder.inttoptr(args[0], ir.FunctionType(word, [word] * n).as_pointer())
        return builder.call(function, [builder.extract_value(args[1], i) for i in range(n)])

    return types.int64(types.int64, arguments), generate


@njit(cache=True)
def nanoseconds(clock: int, scratch: Int64) -> int:
    """Return the time of ``clock_gettime``, whose address ``clock`` is; ``scratch [2]``."""
    call(clock, (_CLOCK_MONOTONIC, scratch.ctypes.data))
    time: int = scratch[0] * 1_000_000_000 + scratch[1]
    return time


@njit(cache=True)
def describe(
    tensor: Int64, address: int, element_type: int, item_bytes: int, shape: tuple[int, ...]
) -> None:
    """Fill the row ``tensor [ROW]``."""
    size = item_bytes
    for i in range(len(shape)):
        tensor[FIRST_AXIS + i] = shape[i]
        size *= shape[i]
    tensor[ADDRESS], tensor[ELEMENT_TYPE] = address, element_type
    tensor[N_BYTES], tensor[N_AXES] = size, len(shape)


@njit(
    types.int64(_WORDS, types.int64, types.int64, _WORDS, types.int64[:, ::1], types.int64),
    cache=True,
    nogil=True,
)
def run_graph(
    api: Int64, memory: int, session: int, names: Int64, tensors: Int64, n_inputs: int
) -> int:
    """Run a graph.

    Args:
        api: ``[n]``, the library's functions.
        memory: the library's name for the caller's memory.
        session: the graph.
        names: ``[n_tensors]``, addresses of the names of the inputs and outputs.
        tensors: ``[n_tensors or more, ROW]``.
        n_inputs: how many of them are inputs.

    Returns:
        The address of a status for :meth:`sdt_deploy.ort_library.OrtLibrary.check`; 0: all is well.
    """
    n = len(names)
    values = np.zeros(n, dtype=np.int64)
    status = 0
    for i in range(n):
        row = tensors[i]
        data, kind, size, axes = row[ADDRESS], row[ELEMENT_TYPE], row[N_BYTES], row[N_AXES]
        shape, value = row.ctypes.data + 8 * FIRST_AXIS, values.ctypes.data + 8 * i
        status = call(api[_MAKE_TENSOR], (memory, data, size, shape, axes, kind, value))
        if status:
            break
    if not status:
        inputs, outputs = values.ctypes.data, values.ctypes.data + 8 * n_inputs
        input_names, output_names = names.ctypes.data, names.ctypes.data + 8 * n_inputs
        status = call(
            api[_RUN],
            (session, 0, input_names, inputs, n_inputs, output_names, n - n_inputs, outputs),
        )
    for i in range(n):
        if values[i]:
            call(api[_RELEASE], (values[i],))
    return status


@njit(cache=True)
def sort_rows(
    scores: Float32,
    thresholds: Float32,
    depths: Int32,
    order: Int32,
    row_of: Int32,
    active_tokens: Int32,
) -> bool:
    """Find how deep tokens go, and sort rows by falling depth, tokens of equal depth in order.

    From ``scores [n_tokens]`` and nondecreasing ``thresholds [n_layers]``. Out: ``depths``,
    ``order`` (the token of each row) and ``row_of`` (the row of each token), ``[n_tokens]``, and
    ``active_tokens [n_layers]``. Returns whether rows are tokens.
    """
    n_layers = len(thresholds)
    next_row = np.zeros(n_layers + 1, dtype=np.int32)
    for token in range(len(scores)):
        depth = 0
        while depth < n_layers and not scores[token] <= thresholds[depth]:  # NaN goes all the way
            depth += 1
        depths[token] = depth
        if depth:
            next_row[depth - 1] += 1
    for depth in range(n_layers - 1, -1, -1):
        next_row[depth] += next_row[depth + 1]
        active_tokens[depth] = next_row[depth]
    is_sorted = True
    for token in range(len(scores)):
        row = next_row[depths[token]]
        next_row[depths[token]] += 1
        order[row], row_of[token] = token, row
        is_sorted &= row == token
    return is_sorted


@njit(cache=True)
def lay_out(
    depths: Int32,
    deepest: Int32,
    layer: int,
    whole: bool,
    cu_seqlens: Int32,
    row_of: Int32,
    n_heads: int,
    gather_index: Int32,
    scatter_index: Int32,
    key_bias: Float32,
    scratch: Int32,
) -> tuple[int, int]:
    """Lay tokens out as :func:`~sdt_deploy.runtime.routing.head_layouts` does.

    Tokens whose ``depths [n_tokens]`` exceed ``layer`` are laid out, with ``whole`` all others of
    their sequences, too; ``deepest [batch]`` is the largest depth of every sequence and
    ``row_of [n_tokens]`` the row of every token. Out: ``gather_index``, ``scatter_index`` and
    ``key_bias``, large enough, or empty if not wanted. ``scratch`` is ``[n_tokens + batch]``.

    Returns:
        Sequences, and places of each: the beginning of ``gather_index`` and ``key_bias`` is
        ``[sequences, n_heads, places]``.
    """
    batch = len(cu_seqlens) - 1
    rows, counts = scratch[batch:], scratch[:batch]
    n = n_sequences = width = 0
    for sequence in range(batch):
        if deepest[sequence] <= layer:
            continue
        before = n
        for token in range(cu_seqlens[sequence], cu_seqlens[sequence + 1]):
            rows[n] = row_of[token]
            n += whole or depths[token] > layer
        counts[n_sequences] = n - before
        n_sequences += 1
        width = max(width, n - before)
    start = 0
    for i in range(n_sequences):
        count, first = counts[i], i * n_heads * width
        for head in range(n_heads):
            place = first + head * width
            for k in range(count):
                gather_index[place + k] = rows[start + k] * n_heads + head
            for k in range(count, width):
                gather_index[place + k] = head
            if len(key_bias):
                for k in range(count):
                    key_bias[place + k] = 0.0
                for k in range(count, width):
                    key_bias[place + k] = HIDDEN
        if len(scatter_index):
            for k in range(count):
                to = rows[start + k] * n_heads
                for head in range(n_heads):
                    scatter_index[to + head] = first + head * width + k
        start += count
    return n_sequences, width


@njit(
    types.int64(
        _WORDS,
        _WORDS,
        _WORDS,
        types.int64[:, ::1],
        _FIXED_FLOATS,
        types.int64,
        types.int64,
        _INTS,
        _ROWS,
        _ROWS,
        _INTS,
        _FLOATS,
        types.float32[:, ::1],
        _FLOATS,
        _INTS,
        _INTS,
        _WORDS,
    ),
    cache=True,
    nogil=True,
)
def run_loop(
    api: Int64,
    fixed: Int64,
    sessions: Int64,
    names: Int64,
    thresholds: Float32,
    input_ids: int,
    token_type_ids: int,
    cu_seqlens: Int32,
    current: Bytes,
    other: Bytes,
    space: Int32,
    bias: Float32,
    output: Float32,
    scores: Float32,
    depths: Int32,
    active_tokens: Int32,
    times: Int64,
) -> int:
    """Run a batch.

    Args:
        api: see :func:`run_graph`.
        fixed: the library's name for the caller's memory, the address of ``clock_gettime``, whether
            all tokens are seen, heads, pooling (0: none, 1: cls, 2: mean), whether the entry takes
            positions, and token types, element type of the states, bytes of an element.
        sessions: ``[n_layers + 2]``, entry, stages and head.
        names: ``[3, 8]``, of the tensors of entry, stages and head, inputs first.
        thresholds: ``[n_layers]``.
        input_ids: address of ``[n_tokens]`` int32.
        token_type_ids: the same; 0: they are zeros.
        cu_seqlens: ``[batch + 1]``.
        current: a buffer ``[n_tokens, row_bytes]``, overwritten.
        other: another.
        space: ``[(5 + n_heads) · n_tokens + 3 · batch + 2 · len(bias)]``, overwritten.
        bias: ``[batch · longest sequence · n_heads]``, overwritten.
        output: out, ``[rows, width]``.
        scores: out, ``[n_tokens]``.
        depths: out, ``[n_tokens]``.
        active_tokens: out, ``[n_layers]``.
        times: out, ``[n_layers + 4]``, nanoseconds; see ``ENTRY``.

    Returns:
        The address of a status; 0: all is well.
    """
    memory, clock, sees_all, n_heads, pooling = fixed[0], fixed[1], fixed[2], fixed[3], fixed[4]
    takes_positions, takes_types, element_type, item_bytes = fixed[5], fixed[6], fixed[7], fixed[8]
    n, batch, n_layers = len(scores), len(cu_seqlens) - 1, len(thresholds)
    d_model = current.shape[1] // item_bytes
    tensors, scratch = np.zeros((8, ROW), np.int64), np.empty(2, np.int64)
    times[:] = 0

    order, row_of, free = space[:n], space[n : 2 * n], space[2 * n : 3 * n + batch]
    firsts, lengths = space[3 * n + batch :][:batch], space[3 * n + 2 * batch :][:batch]
    positions, zeros = space[3 * n + 3 * batch :][:n], space[4 * n + 3 * batch :][:n]
    layouts = space[5 * n + 3 * batch :]
    longest = 0
    for sequence in range(batch):
        start = cu_seqlens[sequence]
        lengths[sequence] = cu_seqlens[sequence + 1] - start
        longest = max(longest, lengths[sequence])
        for place in range(lengths[sequence]):
            positions[start + place] = place
    zeros[:] = 0
    describe(tensors[0], input_ids, _I32, 4, (n,))
    n_inputs = 1
    if takes_positions:
        describe(tensors[n_inputs], positions.ctypes.data, _I32, 4, (n,))
        n_inputs += 1
    if takes_types:
        types_at = token_type_ids if token_type_ids else zeros.ctypes.data
        describe(tensors[n_inputs], types_at, _I32, 4, (n,))
        n_inputs += 1
    describe(tensors[n_inputs], current.ctypes.data, element_type, item_bytes, (n, d_model))
    describe(tensors[n_inputs + 1], scores.ctypes.data, _F32, 4, (n,))
    n_tensors = n_inputs + 2
    mark = nanoseconds(clock, scratch)
    status: int = run_graph(api, memory, sessions[0], names[0, :n_tensors], tensors, n_inputs)
    if status:
        return status
    start, mark = mark, nanoseconds(clock, scratch)
    times[ENTRY] = mark - start

    is_sorted = sort_rows(scores, thresholds, depths, order, row_of, active_tokens)
    deepest = np.zeros(batch, np.int32)
    for sequence in range(batch):
        for token in range(cu_seqlens[sequence], cu_seqlens[sequence + 1]):
            deepest[sequence] = max(deepest[sequence], depths[token])
    start, mark = mark, nanoseconds(clock, scratch)
    times[ROUTE] += mark - start
    if not is_sorted:
        for row in range(n):
            other[row] = current[order[row]]
        current, other = other, current
    start, mark = mark, nanoseconds(clock, scratch)
    times[MOVE] += mark - start

    places = batch * longest * n_heads
    scatter, gather = layouts[: n * n_heads], layouts[n * n_heads :][:places]
    seen = layouts[n * n_heads + places :]
    none, no_bias = scatter[:0], bias[:0]
    alive, seen_width = -1, 0
    for layer in range(n_layers):
        k = np.int64(active_tokens[layer])
        if not k:
            break
        keys = no_bias if sees_all else bias
        sequences, width = lay_out(
            depths, deepest, layer, False, cu_seqlens, row_of, n_heads, gather, scatter, keys, free
        )
        if sees_all and sequences != alive:
            alive, seen_width = lay_out(
                depths, deepest, layer, True, cu_seqlens, row_of, n_heads, seen, none, bias, free
            )
        describe(tensors[0], current.ctypes.data, element_type, item_bytes, (k, d_model))
        describe(tensors[1], gather.ctypes.data, _I32, 4, (sequences, n_heads, width))
        describe(tensors[2], scatter.ctypes.data, _I32, 4, (k, n_heads))
        n_inputs = 4
        key_width = width
        if sees_all:
            n_inputs, key_width = 6, seen_width
            describe(tensors[4], current.ctypes.data, element_type, item_bytes, (n, d_model))
            describe(tensors[5], seen.ctypes.data, _I32, 4, (sequences, n_heads, seen_width))
        describe(tensors[3], bias.ctypes.data, _F32, 4, (sequences, n_heads, key_width, 1))
        updated = other.ctypes.data
        describe(tensors[n_inputs], updated, element_type, item_bytes, (k, d_model))
        start, mark = mark, nanoseconds(clock, scratch)
        times[ROUTE] += mark - start
        of_stage = names[1, : n_inputs + 1]
        status = run_graph(api, memory, sessions[1 + layer], of_stage, tensors, n_inputs)
        if status:
            return status
        start, mark = mark, nanoseconds(clock, scratch)
        times[FIRST_STAGE + layer] = mark - start
        if 2 * k < n:  # of active and finished rows, copy the fewer
            current[:k] = other[:k]
        else:
            other[k:] = current[k:]
            current, other = other, current
        start, mark = mark, nanoseconds(clock, scratch)
        times[MOVE] += mark - start

    n_inputs = 1
    if pooling == 1:
        for sequence in range(batch):
            firsts[sequence] = row_of[cu_seqlens[sequence]]
        describe(tensors[1], firsts.ctypes.data, _I32, 4, (batch,))
        n_inputs = 2
    elif pooling == 2:
        for sequence in range(batch):
            place = sequence * longest
            for token in range(cu_seqlens[sequence], cu_seqlens[sequence + 1]):
                gather[place] = row_of[token]
                place += 1
            gather[place : (sequence + 1) * longest] = 0
        describe(tensors[1], gather.ctypes.data, _I32, 4, (batch, longest))
        describe(tensors[2], lengths.ctypes.data, _I32, 4, (batch,))
        n_inputs = 3
    start, mark = mark, nanoseconds(clock, scratch)
    times[ROUTE] += mark - start
    if not pooling and not is_sorted:
        for token in range(n):
            other[token] = current[row_of[token]]
        current, other = other, current
        start, mark = mark, nanoseconds(clock, scratch)
        times[MOVE] += mark - start
    describe(tensors[0], current.ctypes.data, element_type, item_bytes, (n, d_model))
    describe(tensors[n_inputs], output.ctypes.data, _F32, 4, output.shape)
    of_head = names[2, : n_inputs + 1]
    status = run_graph(api, memory, sessions[1 + n_layers], of_head, tensors, n_inputs)
    times[HEAD] = nanoseconds(clock, scratch) - mark
    return status
