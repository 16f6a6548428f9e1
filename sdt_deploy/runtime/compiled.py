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
Float64 = npt.NDArray[np.float64]
ADDRESS, ELEMENT_TYPE, N_BYTES, N_AXES, FIRST_AXIS = range(5)
ROW = 12
"""A tensor is a row of int64: where it lies, its type, its size, its axes. What lies there belongs
to the caller: a compiled function frees its own arrays once it does not name them any more."""
ENTRY, ROUTE, MOVE, HEAD, FIRST_STAGE = range(5)
"""Places in ``times``."""
STOPPED = -1
"""No address."""
_RUN = int(Function.RUN)
_MAKE_TENSOR = int(Function.CREATE_TENSOR_WITH_DATA_AS_ORT_VALUE)
_RELEASE = int(Function.RELEASE_VALUE)
_F32, _I32 = ELEMENT_TYPES["float32"], ELEMENT_TYPES["int32"]
_CLOCK_MONOTONIC = 6 if sys.platform == "darwin" else 1
_WORDS = types.int64[::1]
_FLOATS, _INTS = types.float32[::1], types.int32[::1]
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
def lap(clock: int, watch: Int64, times: Float64, place: int) -> None:
    """Add to ``times [place]`` the milliseconds since the last call with this ``watch [3]``.

    ``clock`` is the address of ``clock_gettime``.
    """
    call(clock, (_CLOCK_MONOTONIC, watch.ctypes.data))
    now = watch[0] * 1_000_000_000 + watch[1]
    times[place] += (now - watch[2]) * 1e-6
    watch[2] = now


@njit(cache=True)
def take_rows(copy: int, rows: int, index: Int32, out: int, row_bytes: int) -> None:
    """``out[i] = rows[index[i]]`` by ``memcpy``, whose address ``copy`` is, as are the others."""
    for i in range(len(index)):
        call(copy, (out + i * row_bytes, rows + index[i] * row_bytes, row_bytes))


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
    types.int64(_WORDS, types.int64, _WORDS, types.int64[:, ::1], types.int64),
    cache=True,
    nogil=True,
)
def run_graph(api: Int64, memory: int, graph: Int64, tensors: Int64, n_inputs: int) -> int:
    """Run a graph.

    Args:
        api: ``[n]``, the library's functions.
        memory: the library's name for the caller's memory.
        graph: ``[1 + n_tensors or more]``, the session, and addresses of the names of ``tensors``.
        tensors: ``[n_tensors, ROW]``, inputs and outputs.
        n_inputs: how many of them are inputs.

    Returns:
        The address of a status for :meth:`sdt_deploy.ort_library.OrtLibrary.check`; 0: all is well.
    """
    n, names = len(tensors), graph[1:]
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
            (graph[0], 0, input_names, inputs, n_inputs, output_names, n - n_inputs, outputs),
        )
    for i in range(n):
        if values[i]:
            call(api[_RELEASE], (values[i],))
    return status


def space_size(n: int, batch: int, longest: int, n_heads: int, row_bytes: int) -> int:
    """Return the ``space`` of :func:`run_loop` for ``n`` tokens, whose states are ``row_bytes``."""
    states = 2 * words_of_states.py_func(n, row_bytes)
    return int(states + 3 * batch * longest * n_heads + (5 + n_heads) * n + 4 * batch)


@njit(cache=True)
def words_of_states(n: int, row_bytes: int) -> int:
    """Return how many int32 hold ``n`` rows, in whole lines of the caches."""
    return (n * row_bytes + 63) // 64 * 16


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
    depths[:] = 0
    for layer in range(n_layers):  # this way round both loops become vectors
        active = np.int32(0)
        for token in range(len(scores)):
            goes_on = np.int32(not scores[token] <= thresholds[layer])  # NaN goes all the way
            depths[token] += goes_on
            active += goes_on
        active_tokens[layer] = active
    next_row = np.zeros(n_layers + 1, dtype=np.int32)
    next_row[:n_layers] = active_tokens
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
    heads, step = np.int32(n_heads), np.int32(width)
    start = 0
    for i in range(n_sequences):
        first, count = i * n_heads * width, counts[i]
        own = rows[start : start + count]
        start += count
        first_head = gather_index[first:][:width]
        for k in range(count):  # in int32 and from 0 in each array, or loops become no vectors
            first_head[k] = own[k] * heads
        first_head[count:] = 0
        for head in range(1, n_heads):
            gather = gather_index[first + head * width :][:width]
            for k in range(width):
                gather[k] = first_head[k] + np.int32(head)
        if len(key_bias):
            for head in range(n_heads):
                bias = key_bias[first + head * width :][:width]
                bias[:count] = 0.0
                bias[count:] = HIDDEN
        if len(scatter_index):
            for k in range(count):
                scatter, place = scatter_index[own[k] * n_heads :][:n_heads], np.int32(first + k)
                for head in range(n_heads):
                    scatter[head] = place + np.int32(head) * step
    return n_sequences, width


@njit(
    types.int64(
        _WORDS,
        _WORDS,
        types.int64[:, ::1],
        _FIXED_FLOATS,
        _INTS,
        _INTS,
        _INTS,
        _INTS,
        types.float32[:, ::1],
        _FLOATS,
        _INTS,
        _INTS,
        types.float64[::1],
        types.int64,
    ),
    cache=True,
    nogil=True,
)
def run_loop(
    api: Int64,
    fixed: Int64,
    graphs: Int64,
    thresholds: Float32,
    input_ids: Int32,
    token_type_ids: Int32,
    cu_seqlens: Int32,
    space: Int32,
    output: Float32,
    scores: Float32,
    depths: Int32,
    usage: Int32,
    times: Float64,
    limit_ns: int,
) -> int:
    """Run a batch.

    Args:
        api: see :func:`run_graph`.
        fixed: the library's name for the caller's memory, the addresses of ``clock_gettime`` and
            ``memcpy``, whether all tokens are seen, heads, pooling (0: none, 1: cls, 2: mean),
            whether the entry takes positions, and token types, element type of the states, bytes of
            an element, elements of a row.
        graphs: ``[n_layers + 2, 8]``, of entry, stages and head: the session, and addresses of the
            names of its tensors, inputs first.
        thresholds: ``[n_layers]``.
        input_ids: ``[n_tokens]``.
        token_type_ids: ``[n_tokens]``; empty: they are zeros.
        cu_seqlens: ``[batch + 1]``.
        space: as many as :func:`space_size` says, overwritten.
        output: out, ``[rows, width]``.
        scores: out, ``[n_tokens]``.
        depths: out, ``[n_tokens]``.
        usage: out, ``[2 * n_layers + 1]``, tokens of each depth, then active ones of each layer.
        times: out, ``[n_layers + 4]``, zeros, milliseconds; see ``ENTRY``.
        limit_ns: nanoseconds after which no further stage is run; negative: there is no limit.

    Returns:
        The address of a status; 0: all is well; :data:`STOPPED`: the limit was reached.
    """
    memory, clock, copy, sees_all, n_heads = fixed[0], fixed[1], fixed[2], fixed[3], fixed[4]
    pooling, takes_positions, takes_types = fixed[5], fixed[6], fixed[7]
    element_type, item_bytes, d_model = fixed[8], fixed[9], fixed[10]
    n, batch, n_layers = len(input_ids), len(cu_seqlens) - 1, len(thresholds)
    row_bytes = d_model * item_bytes
    tensors, watch = np.zeros((8, ROW), np.int64), np.zeros(3, np.int64)

    longest = 0
    for sequence in range(batch):
        longest = max(longest, cu_seqlens[sequence + 1] - cu_seqlens[sequence])
    words, places = words_of_states(n, row_bytes), batch * longest * n_heads
    current = np.int64(space.ctypes.data)
    other = current + 4 * words
    space = space[2 * words :]
    bias, gather, seen = space[:places].view(np.float32), space[places:], space[2 * places :]
    space = space[3 * places :]
    order, row_of, positions, zeros = space[:n], space[n:], space[2 * n :], space[3 * n :][:n]
    scatter, space = space[4 * n :], space[(4 + n_heads) * n :]
    deepest, firsts, lengths, free = space, space[batch:], space[2 * batch :], space[3 * batch :]
    zeros[:] = 0
    for sequence in range(batch):
        start = cu_seqlens[sequence]
        lengths[sequence] = cu_seqlens[sequence + 1] - start
        for place in range(lengths[sequence]):
            positions[start + place] = place
    describe(tensors[0], input_ids.ctypes.data, _I32, 4, (n,))
    n_inputs = 1
    if takes_positions:
        describe(tensors[n_inputs], positions.ctypes.data, _I32, 4, (n,))
        n_inputs += 1
    if takes_types:
        types_at = token_type_ids.ctypes.data if len(token_type_ids) else zeros.ctypes.data
        describe(tensors[n_inputs], types_at, _I32, 4, (n,))
        n_inputs += 1
    describe(tensors[n_inputs], current, element_type, item_bytes, (n, d_model))
    describe(tensors[n_inputs + 1], scores.ctypes.data, _F32, 4, (n,))
    lap(clock, watch, times, ROUTE)
    times[ROUTE], begin = 0.0, watch[2]  # the watch was started
    status: int = run_graph(api, memory, graphs[0], tensors[: n_inputs + 2], n_inputs)
    if status:
        return status
    lap(clock, watch, times, ENTRY)

    active_tokens = usage[n_layers + 1 :]
    is_sorted = sort_rows(scores, thresholds, depths, order, row_of, active_tokens)
    usage[0], usage[1 : n_layers + 1] = n, active_tokens
    usage[:n_layers] -= active_tokens
    for sequence in range(batch):
        deepest[sequence] = depths[cu_seqlens[sequence] : cu_seqlens[sequence + 1]].max()
    lap(clock, watch, times, ROUTE)
    if not is_sorted:
        take_rows(copy, current, order[:n], other, row_bytes)
        current, other = other, current
    lap(clock, watch, times, MOVE)

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
        describe(tensors[0], current, element_type, item_bytes, (k, d_model))
        describe(tensors[1], gather.ctypes.data, _I32, 4, (sequences, n_heads, width))
        describe(tensors[2], scatter.ctypes.data, _I32, 4, (k, n_heads))
        n_inputs = 4
        key_width = width
        if sees_all:
            n_inputs, key_width = 6, seen_width
            describe(tensors[4], current, element_type, item_bytes, (n, d_model))
            describe(tensors[5], seen.ctypes.data, _I32, 4, (sequences, n_heads, seen_width))
        describe(tensors[3], bias.ctypes.data, _F32, 4, (sequences, n_heads, key_width, 1))
        describe(tensors[n_inputs], other, element_type, item_bytes, (k, d_model))
        lap(clock, watch, times, ROUTE)
        if 0 <= limit_ns <= watch[2] - begin:
            return STOPPED
        status = run_graph(api, memory, graphs[1 + layer], tensors[: n_inputs + 1], n_inputs)
        if status:
            return status
        lap(clock, watch, times, FIRST_STAGE + layer)
        if 2 * k < n:  # of active and finished rows, copy the fewer
            call(copy, (current, other, k * row_bytes))
        else:
            call(copy, (other + k * row_bytes, current + k * row_bytes, (n - k) * row_bytes))
            current, other = other, current
        lap(clock, watch, times, MOVE)

    n_inputs = 1
    if pooling == 1:
        for sequence in range(batch):
            firsts[sequence] = row_of[cu_seqlens[sequence]]
        describe(tensors[1], firsts.ctypes.data, _I32, 4, (batch,))
        n_inputs = 2
    elif pooling == 2:
        lay_out(  # all tokens, for one head
            depths, deepest, -1, True, cu_seqlens, row_of, 1, gather, none, no_bias, free
        )
        describe(tensors[1], gather.ctypes.data, _I32, 4, (batch, longest))
        describe(tensors[2], lengths.ctypes.data, _I32, 4, (batch,))
        n_inputs = 3
    lap(clock, watch, times, ROUTE)
    if not pooling and not is_sorted:
        take_rows(copy, current, row_of[:n], other, row_bytes)
        current, other = other, current
        lap(clock, watch, times, MOVE)
    describe(tensors[0], current, element_type, item_bytes, (n, d_model))
    describe(tensors[n_inputs], output.ctypes.data, _F32, 4, output.shape)
    status = run_graph(api, memory, graphs[1 + n_layers], tensors[: n_inputs + 1], n_inputs)
    lap(clock, watch, times, HEAD)
    return status
