"""Generation: one token after another, each through as many layers as its score says.

Every layer keeps keys and values of the tokens that it has seen, see
:class:`sdt_deploy.runtime.caches.LayerCache`. With ``context="active"`` these are the tokens that
it took, so the cache shrinks with the mean depth. With ``context="all"`` a token is seen by deeper
layers too, with its last state, and so has keys and values there: they are made when such a layer
is run again, and until then only its last state is kept, once.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from sdt_deploy.checks import plain
from sdt_deploy.combinations import can_generate
from sdt_deploy.config import MAX_SIZE, ModelConfig, compared, is_integer, is_number, shown
from sdt_deploy.errors import InputError
from sdt_deploy.runtime.caches import CacheUsage, IntArray, LayerCache, NewTokens, QueryLayout
from sdt_deploy.runtime.inputs import chosen_thresholds, read_batch, read_thresholds
from sdt_deploy.runtime.result import LayerUsage
from sdt_deploy.runtime.routing import Float32, Int32, depths_from_scores
from sdt_deploy.runtime.session import Session
from sdt_deploy.runtime.splitting import select, split_batch
from sdt_deploy.runtime.stopping import StopCheck, stop_check


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """What was generated. All arrays belong to the caller."""

    tokens: tuple[Int32, ...]
    """New tokens of each sequence, ``[n_new]``; the last one may end it."""
    prompts: tuple[Int32, ...]
    """The tokens before them, ``[n_prompt]``."""
    ended: npt.NDArray[np.bool_]
    """``[batch]``, whether an end token was generated."""
    active: tuple[npt.NDArray[np.bool_], ...]
    """``[n_run, n_layers]`` of each sequence, which layers took each of its tokens. All were run
    but the last new one, which nothing follows."""
    logits: tuple[Float32, ...] | None
    """``[n_new, vocab_size]`` of each sequence, what each new token was chosen from; None: not
    asked for."""
    layer_usage: LayerUsage
    """How deep the tokens went, prompts included."""
    cache: CacheUsage
    prefill_ms: float
    """Until the logits of the first new tokens were there."""
    decode_ms: float
    """All that followed."""
    n_steps: int
    """Times that new tokens went through the layers after the prompts."""


def generate(
    session: Session,
    inputs: npt.ArrayLike | str | Sequence[str],
    cu_seqlens: npt.ArrayLike | None = None,
    *,
    attention_mask: npt.ArrayLike | None = None,
    max_new_tokens: int = 64,
    eos_token_id: int | Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    thresholds: Sequence[float] | None = None,
    target_depth: float | None = None,
    return_logits: bool = False,
    timeout_s: float | None = None,
    cancel: threading.Event | None = None,
) -> GenerationResult:
    """Continue prompts, all of them together.

    A sequence that ended is not run any further. What it becomes does not depend on its neighbours,
    up to rounding. The graphs for generation are opened by the first call; ONNX Runtime then holds
    the weights of the layers once more in memory.

    At the model's own thresholds the session counts it, see
    :class:`sdt_deploy.runtime.statistics.SessionStatistics`.

    Args:
        session: of a causal bundle with head ``lm``, on a CPU.
        inputs: prompts, as in :meth:`sdt_deploy.runtime.session.Session.run`.
        cu_seqlens: likewise.
        attention_mask: likewise.
        max_new_tokens: new tokens of each sequence at most.
        eos_token_id: token, or tokens, that end a sequence; None: it has ``max_new_tokens``.
        temperature: 0: the likeliest token; else drawn from ``softmax(logits / temperature)``.
        top_k: draw among the likeliest ``top_k`` tokens only; None: among all.
        seed: of the draws; each sequence has its own, by its number in the batch.
        thresholds: one per layer, instead of the model's.
        target_depth: mean depth to aim at, instead of thresholds.
        return_logits: keep the logits, ``vocab_size`` numbers for each new token.
        timeout_s: seconds after which it stops, with an error; None: no limit.
        cancel: set from another thread, it stops generation.

    Raises:
        InputError: if the model cannot generate, or an argument is out of range.
        ConfigError: if ``thresholds`` or ``target_depth`` cannot be used.
        BackendError: if the engine fails or the session is closed.
        RunCancelledError: if ``cancel`` was set.
        DeadlineExceededError: if ``timeout_s`` have passed.
    """
    check = stop_check(timeout_s, cancel)
    config = session.manifest.model
    _check_model(session)
    sampling = Sampling(temperature=temperature, top_k=top_k, seed=seed)
    ends = _ends(eos_token_id, config)
    batch, _ = read_batch(
        inputs,
        cu_seqlens,
        attention_mask,
        None,
        config=config,
        overflow="error",
        tokenizer=lambda: session.tokenizer,
    )
    _check_length(max_new_tokens, batch.max_seqlen, config)
    limits = chosen_thresholds(thresholds, target_depth, session.manifest)
    values = compared(config.thresholds) if limits is None else read_thresholds(limits, config)
    n_sequences = len(batch.lengths)
    start = perf_counter()
    with session.backend.running():
        decoder = Decoder(session, values, n_sequences, check)
        last = np.empty((n_sequences, config.d_model), dtype=np.float32)
        everyone = np.arange(n_sequences)
        for group in split_batch(batch.lengths, config, session.part_limits) or [everyone]:
            part = select(batch, group)
            tokens = NewTokens(sequences=group.repeat(part.lengths), positions=part.position_ids)
            states = decoder.step(part.input_ids, tokens)
            last[group] = states[part.cu_seqlens[1:] - 1]
        logits = decoder.logits(last)
        prefill_ms = (perf_counter() - start) * 1e3
        chosen: list[list[int]] = [[] for _ in everyone]
        seen: list[list[Float32]] = [[] for _ in everyone]
        ended = np.zeros(n_sequences, dtype=bool)
        generators = [np.random.default_rng([seed, i]) for i in range(n_sequences)]
        alive, n_steps = everyone, 0
        while True:
            for i, row in zip(alive.tolist(), logits, strict=True):
                chosen[i].append(sampling.choose(row, generators[i]))
                ended[i] = chosen[i][-1] in ends
                if return_logits:
                    seen[i].append(row.copy())
            alive = np.flatnonzero(~ended)
            if not len(alive) or n_steps + 1 == max_new_tokens:
                break
            ids = np.array([chosen[i][-1] for i in alive], dtype=np.int32)
            positions = (batch.lengths[alive] + n_steps).astype(np.int32)
            states = decoder.step(ids, NewTokens(sequences=alive, positions=positions))
            logits = decoder.logits(states)
            n_steps += 1
    active = decoder.active()
    flat = np.concatenate(active)
    result = GenerationResult(
        tokens=tuple(np.array(ids, dtype=np.int32) for ids in chosen),
        prompts=tuple(np.split(batch.input_ids.copy(), batch.cu_seqlens[1:-1])),
        ended=ended,
        active=active,
        logits=tuple(map(np.stack, seen)) if return_logits else None,
        layer_usage=LayerUsage.of(flat.sum(axis=1, dtype=np.int32), flat, config.n_layers),
        cache=decoder.cache_usage(),
        prefill_ms=prefill_ms,
        decode_ms=(perf_counter() - start) * 1e3 - prefill_ms,
        n_steps=n_steps,
    )
    if limits is None:
        n_new = sum(map(len, chosen))
        session.count_generation(result.layer_usage.depth_histogram, n_new, result.cache)
    return result


class Decoder:
    """Runs new tokens through the layers, over the caches of the tokens before them.

    ::

        decoder = Decoder(session, thresholds, n_sequences=2)
        states = decoder.step(prompt_ids, NewTokens(sequences=..., positions=...))
        logits = decoder.logits(states[last_rows])  # choose a token for each sequence, and so on
    """

    def __init__(
        self,
        session: Session,
        thresholds: Sequence[float],
        n_sequences: int,
        check: StopCheck | None = None,
    ) -> None:
        self._config = config = session.manifest.model
        self._thresholds = thresholds
        self._check = check
        names = [f"decode-{number:02d}" for number in range(config.n_layers)]
        self._specs = [session.manifest.graphs[name] for name in names]
        self._graphs = [session.backend.graph(name) for name in names]
        self._entry, self._head = (session.backend.graph(name) for name in ("entry", "head"))
        width = config.n_key_heads * config.head_width
        self.caches = [LayerCache(n_sequences, width) for _ in names]
        """One for each layer."""
        self._token_bytes = 2 * width * 4
        self._n_sequences = n_sequences
        self._run: list[tuple[IntArray, npt.NDArray[np.bool_]]] = []

    def step(self, input_ids: Int32, tokens: NewTokens) -> Float32:
        """Run tokens that follow those of earlier steps; return their last states.

        Args:
            input_ids: ``[n_tokens]``.
            tokens: where they stand.

        Returns:
            ``[n_tokens, d_model]``, before the final norm.
        """
        config, n_tokens = self._config, len(input_ids)
        states = np.empty((n_tokens, config.d_model), dtype=np.float32)
        scores = np.empty((n_tokens, *config.score_axes), dtype=np.float32)
        ids: dict[str, Any] = {"input_ids": input_ids}
        if config.rotary is None:
            ids["position_ids"] = tokens.positions
        if config.n_token_types:
            ids["token_type_ids"] = np.zeros(n_tokens, dtype=np.int32)
        self._entry.bind(ids, {"hidden_states": states, "scores": scores})()
        active = np.zeros((n_tokens, config.n_layers), dtype=bool)
        left = np.ones(n_tokens, dtype=bool)
        pinned = np.isin(input_ids, config.pinned_token_ids)
        if config.routing == "once":
            depths = depths_from_scores(scores, self._thresholds)
            active[:] = depths[:, None] > np.arange(config.n_layers)
        for number, limit in enumerate(self._thresholds):
            if self._check is not None:
                self._check()
            if config.routing == "per_layer":
                above = np.where(pinned, np.float32(1), scores[:, number]) > np.float32(limit)
                active[:, number] = left & above
                left = active[:, number] if config.leaving == "exit" else left
            self._layer(number, states, active[:, number], tokens, scores)
        self._run.append((tokens.sequences, active))
        return states

    def _layer(
        self,
        number: int,
        states: Float32,
        taken: npt.NDArray[np.bool_],
        tokens: NewTokens,
        scores: Float32,
    ) -> None:
        """Run one layer for the rows that it takes; update ``states`` and ``scores`` in place."""
        config, cache = self._config, self.caches[number]
        rows = np.flatnonzero(taken)
        sees_all = config.context == "all"
        if not len(rows):
            if sees_all:  # who sits out one layer changes in the next
                cache.wait(states.copy() if config.leaving == "skip" else states, tokens)
            return
        mine, hidden = tokens.take(rows), states[rows]
        context, around, own = hidden, mine, np.arange(len(rows))
        if sees_all:
            context, around = cache.with_waiting(states, tokens)
            own = len(context) - len(states) + rows
        added = cache.extend(around.sequences)
        queries = QueryLayout.of(mine.sequences, added.places[own], config.n_heads)
        gather_index, key_bias = cache.layout(queries.sequences, config.n_key_heads)
        inputs: dict[str, Any] = {
            "hidden_states": hidden,
            "gather_index": queries.gather_index,
            "scatter_index": queries.scatter_index,
            "context_states": context,
            "past_keys": added.past_keys,
            "past_values": added.past_values,
            "context_gather_index": gather_index,
            "key_bias": key_bias,
            "query_places": queries.query_places,
        }
        if config.rotary is not None:
            inputs |= {"position_ids": mine.positions, "context_position_ids": around.positions}
        outputs: dict[str, Any] = {
            "updated_states": np.empty_like(hidden),
            "keys": added.keys,
            "values": added.values,
        }
        if len(self._specs[number].outputs) > len(outputs):
            outputs["scores"] = np.empty((len(rows), *config.score_axes), dtype=np.float32)
        self._graphs[number].bind(inputs, outputs)()
        states[rows] = outputs["updated_states"]
        if "scores" in outputs:
            scores[rows] = outputs["scores"]

    def logits(self, states: Float32) -> Float32:
        """Return ``[n_tokens, vocab_size]`` of last states ``[n_tokens, d_model]``."""
        logits = np.empty((len(states), self._config.vocab_size), dtype=np.float32)
        self._head.bind({"hidden_states": states}, {"output": logits})()
        return logits

    def active(self) -> tuple[npt.NDArray[np.bool_], ...]:
        """Return ``[n_run, n_layers]`` of each sequence, which layers took its tokens so far."""
        sequences = np.concatenate([sequences for sequences, _ in self._run])
        active = np.concatenate([active for _, active in self._run])
        order = sequences.argsort(kind="stable")
        counts = np.bincount(sequences, minlength=self._n_sequences)
        return tuple(np.split(active[order], counts.cumsum()[:-1]))

    def cache_usage(self) -> CacheUsage:
        """Return the memory that the caches take now."""
        waiting = {id(states): states.nbytes for cache in self.caches for states in cache.waiting}
        n_run = sum(len(sequences) for sequences, _ in self._run)
        return CacheUsage(
            n_bytes=sum(cache.n_bytes for cache in self.caches) + sum(waiting.values()),
            dense_bytes=n_run * len(self.caches) * self._token_bytes,
            layer_tokens=tuple(cache.n_tokens for cache in self.caches),
        )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen from logits."""

    temperature: float = 0.0
    """0: the likeliest token, of equally likely ones the first."""
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_k", "seed"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        if not is_number(self.temperature) or self.temperature < 0:
            raise InputError(f"temperature must be 0 or more, not {shown(self.temperature)}")
        if self.top_k is not None and not is_integer(self.top_k, 1):
            raise InputError(f"top_k must be in 1..{MAX_SIZE} or None, not {shown(self.top_k)}")
        if self.top_k is not None and self.temperature == 0:
            raise InputError("top_k is for draws: give a temperature above 0 as well")
        if not is_integer(self.seed, 0):
            raise InputError(f"seed must be in 0..{MAX_SIZE}, not {shown(self.seed)}")

    def choose(self, logits: Float32, generator: np.random.Generator) -> int:
        """Return a token for ``logits [vocab_size]``."""
        if self.temperature == 0:
            return int(logits.argmax())
        scaled = logits.astype(np.float64)
        with np.errstate(over="ignore", under="ignore"):  # then a token has no chance
            return self._drawn((scaled - scaled.max()) / self.temperature, generator)

    def _drawn(self, scaled: npt.NDArray[np.float64], generator: np.random.Generator) -> int:
        if self.top_k is not None and self.top_k < len(scaled):
            scaled[scaled < np.partition(scaled, -self.top_k)[-self.top_k]] = -np.inf
        shares = np.exp(scaled)
        return int(generator.choice(len(shares), p=shares / shares.sum()))


def _check_model(session: Session) -> None:
    config = session.manifest.model
    if not can_generate(config):
        raise InputError(
            "generation needs causal attention, head 'lm' and selection 'threshold' (a capacity "
            "ranks the tokens of a whole sequence); this model has causal "
            f"{config.causal}, head {config.head.kind!r} and selection {config.selection!r}"
        )
    if not session.backend.has("decode-00"):
        raise InputError(
            f"{session.bundle.path} holds no graphs for generation: export the model again"
        )


def _check_length(max_new_tokens: object, longest: int, config: ModelConfig) -> None:
    if not is_integer(max_new_tokens, 1):
        raise InputError(f"max_new_tokens must be a positive integer, not {shown(max_new_tokens)}")
    assert isinstance(max_new_tokens, int)
    left = config.max_positions - longest
    if max_new_tokens > left:
        fewer = f", or take max_new_tokens={left} at most" if left > 0 else ""
        raise InputError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's "
            f"{config.max_positions} positions: shorten the prompt{fewer}"
        )


def _ends(values: object, config: ModelConfig) -> frozenset[int]:
    if values is None:
        return frozenset()
    listed: list[Any] = [values]
    if isinstance(values, list | tuple | set | frozenset):
        listed = list(values)
    for value in listed:
        if not is_integer(value, 0, config.vocab_size - 1):
            raise InputError(
                f"eos_token_id must be a token below {config.vocab_size}, or several, not "
                f"{shown(values)}"
            )
    return frozenset(listed)
