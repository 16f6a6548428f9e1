"""Texts to packed token ids."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Literal, Self, get_args

import numpy as np

from sdt_deploy.bundle import TOKENIZER, Bundle
from sdt_deploy.config import MAX_SIZE, shown
from sdt_deploy.errors import BackendError, BundleIntegrityError, CheckpointError, InputError
from sdt_deploy.extras import require
from sdt_deploy.files import read_bytes

Overflow = Literal["error", "truncate", "split"]
"""Texts that are too long: refused, cut to their beginning, or cut into windows."""
OVERFLOWS = get_args(Overflow)
MAX_TEXT_BYTES = 2**30
"""Largest text file that is read."""


class TextTokenizer:
    """A ``tokenizer.json``, given by its content; its own padding and truncation are off."""

    def __init__(self, content: bytes) -> None:
        tokenizers = require("tokenizers", extra="cpu", purpose="Reading texts")
        with _errors_of_the_library():
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()

    @classmethod
    def of(cls, bundle: Bundle) -> Self:
        """Open the tokenizer of a bundle.

        Raises:
            InputError: if it has none.
            BundleIntegrityError: if the bundle was removed or exported anew since it was opened.
            CheckpointError: if its file is no tokenizer.
        """
        if not bundle.has(TOKENIZER):
            raise InputError("this bundle has no tokenizer; pass token ids instead of texts")
        path = bundle.file(TOKENIZER)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BundleIntegrityError(f"{path} cannot be read: {error}") from error
        bundle.check_current()
        return cls(content)

    def encode(
        self,
        texts: Sequence[str],
        *,
        max_length: int | None = None,
        overflow: Overflow = "error",
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize ``texts``, special tokens included.

        Args:
            texts: at least one.
            max_length: the longest sequence allowed, in tokens.
            overflow: what to do with longer ones; ``split`` makes several sequences of one text,
                see :meth:`encode_windows`.

        Returns:
            ``input_ids [n_tokens]`` and ``cu_seqlens [batch + 1]``, int32.

        Raises:
            InputError: if a text is no string, gives no token, or is too long.
            CheckpointError: if the tokenizer fails.
        """
        return self.encode_windows(texts, max_length=max_length, overflow=overflow)[:2]

    def encode_windows(
        self,
        texts: Sequence[str],
        *,
        max_length: int | None = None,
        overflow: Overflow = "split",
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokenize ``texts``; cut long ones into windows with special tokens around each.

        Windows follow each other without overlap, as Hugging Face tokenizers cut with ``stride=0``;
        all but a text's last are full.

        Args:
            texts: at least one.
            max_length: the longest window, in tokens.
            overflow: ``truncate`` keeps a text's first window only.

        Returns:
            As :meth:`encode`, with one sequence per window, and ``cu_windows [n_texts + 1]``: text
            ``i`` became the sequences from ``cu_windows[i]`` to ``cu_windows[i + 1]``.

        Raises:
            InputError: as :meth:`encode`.
        """
        if not isinstance(overflow, str) or overflow not in OVERFLOWS:
            raise InputError(f"overflow must be one of {OVERFLOWS}, not {shown(overflow)}")
        texts = list(texts)
        if not texts:
            raise InputError("no texts were given")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"text {i} is {type(text).__name__}, not a string")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(f"text {i} cannot be written as UTF-8: {error}") from error
        with _errors_of_the_library():
            encodings = self._tokenizer.encode_batch_fast(texts)  # without offsets
        windows = [[encoding.ids] for encoding in encodings]
        for i, (ids,) in enumerate(windows):
            if not ids:
                raise InputError(f"text {i} gives no token: {shown(texts[i])}")
            if max(ids) > MAX_SIZE:
                raise CheckpointError(f"the tokenizer.json has an id above {MAX_SIZE}: {max(ids)}")
            if max_length is not None and len(ids) > max_length:
                if overflow == "error":
                    raise InputError(
                        f"text {i} has {len(ids)} tokens, {max_length} are allowed: shorten it or "
                        'pass overflow="truncate" or "split" (commands: --truncate)'
                    )
                windows[i] = self._windows(texts[i], max_length)
                if overflow == "truncate":
                    del windows[i][1:]
        sequences = [ids for rows in windows for ids in rows]
        input_ids = np.array(list(chain.from_iterable(sequences)), dtype=np.int32)
        return input_ids, _starts(sequences), _starts(windows)

    def _windows(self, text: str, max_length: int) -> list[list[int]]:
        room = max_length - self._tokenizer.num_special_tokens_to_add(False)
        if room < 1:
            raise InputError(f"{max_length} tokens leave no room beside the special ones")
        with _errors_of_the_library():
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            encoding.truncate(room)
            whole = self._tokenizer.post_process(encoding)
        return [window.ids for window in (whole, *whole.overflowing)]

    def tokens(self, input_ids: np.ndarray) -> list[str]:
        """Return the token of each id, as written in the vocabulary."""
        return [self._tokenizer.id_to_token(int(i)) or f"<{int(i)}>" for i in input_ids]

    def decode(self, input_ids: np.ndarray) -> str:
        """Return the text of ``input_ids [n_tokens]``, without special tokens."""
        with _errors_of_the_library():
            return str(self._tokenizer.decode([int(i) for i in input_ids]))

    def ends(self) -> tuple[list[int], list[int]]:
        """Return the special ids that are put before and after every text."""
        with _errors_of_the_library():
            encoding = self._tokenizer.encode("a")
        inner = [i for i, flag in enumerate(encoding.special_tokens_mask) if not flag]
        if not inner:
            raise CheckpointError('the tokenizer.json cannot be used: the text "a" gives no token')
        return encoding.ids[: inner[0]], encoding.ids[inner[-1] + 1 :]


def _starts(parts: Sequence[Sequence[object]]) -> np.ndarray:
    """Return ``[len(parts) + 1]`` int32, where each part starts and the last one ends."""
    return np.array([0, *accumulate(map(len, parts))], dtype=np.int32)


@contextlib.contextmanager
def _errors_of_the_library() -> Iterator[None]:
    """Make what the tokenizers library raises a :class:`CheckpointError`.

    It raises plain ``Exception``, what Python has for bad arguments, and ``PanicException``, which
    is none of these, where its own code fails. Anything else comes from a signal handler.
    """
    try:
        yield
    except BaseException as error:
        own = type(error) in (Exception, TypeError, ValueError, OverflowError, RuntimeError)
        if not own and type(error).__name__ != "PanicException":
            raise
        if "thread pool" in str(error):  # of the library's own threads
            raise BackendError(
                f"the tokenizers library could not start its threads: {error}. Allow this process "
                "more of them, or set TOKENIZERS_PARALLELISM=false"
            ) from error
        raise CheckpointError(f"the tokenizer.json cannot be used: {error}") from error


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text file that hold more than white space.

    Lines end at line feeds, as in other tools; a byte order mark is left out.

    Raises:
        InputError: if the file cannot be read or holds no such line.
    """
    try:
        lines = read_bytes(path, max_bytes=MAX_TEXT_BYTES).decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from error
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise InputError(f"{path} holds no text; one text per line is expected")
    return lines
