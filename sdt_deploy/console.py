"""How the command line prints: tables, bars and colours."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import sys
import traceback
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Output(Console):
    """A console that leaves text for programs whole, and ends when its reader has gone."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print; where there is no terminal, text is not broken into lines of its width."""
        if not self.is_terminal and all(isinstance(one, str) for one in objects):
            options.setdefault("soft_wrap", True)
        super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """Exit with 128 + SIGPIPE, and leave nothing to be flushed."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + 13)


console = Output()
messages = Console(stderr=True)


def print_what_the_encoding_lacks() -> None:
    """Let characters that standard output cannot encode come out as escapes, as on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def be_quiet(quiet: bool) -> None:
    """Print errors and JSON only, or everything again."""
    console.quiet = quiet


def print_json(data: Any) -> None:
    """Print ``data`` on standard output, quiet or not; dataclasses are objects in it."""
    try:
        text = json.dumps(data, indent=1, default=dataclasses.asdict, allow_nan=False)
    except ValueError:
        fail("the result holds numbers that are not finite, and JSON has none; leave out --json")
    _write(text)


def _write(text: str) -> None:
    """Write ``text`` and a newline as they stand, for programs to read."""
    try:
        console.file.write(text + "\n")
        console.file.flush()
    except BrokenPipeError:
        console.on_broken_pipe()


def report_bug() -> NoReturn:
    """End the process with the traceback of the current exception and exit code 1."""
    traceback.print_exc()
    with suppress(OSError):
        messages.print("[bold red]This is a bug in sdt-deploy.[/bold red] Please report it.")
    raise SystemExit(1)


def fail(message: str) -> NoReturn:
    """End the process with one message and exit code 2."""
    with suppress(OSError):  # nobody may be listening
        text = f"[bold red]error:[/bold red] {escape(message)}"
        # A log or a pipe gets whole lines, so that a message can be searched for.
        messages.print(text, highlight=False, soft_wrap=not messages.is_terminal)
    raise SystemExit(2) from None


def clean_up_on_sigterm() -> None:
    """Let SIGTERM end the process as Ctrl-C does: what was half written is removed."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)


@contextmanager
def progress_bar(first: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar that vanishes when done, and nothing where there is no terminal."""
    from rich.progress import Progress

    if console.quiet or not messages.is_terminal:
        yield lambda what, done, total: None  # a disabled bar of older releases leaves a line
        return
    with Progress(console=messages, transient=True) as bar:
        task = bar.add_task(first, total=None)

        def advance(what: str, done: int, total: int) -> None:
            bar.update(task, description=escape(what), completed=done, total=total or None)

        yield advance


def print_histogram(histogram: tuple[int, ...]) -> None:
    """Print the share of tokens at each depth."""
    total = sum(histogram)
    for depth, count in enumerate(histogram):
        bar = "█" * round(40 * count / max(histogram))
        console.print(f"{depth:>4} {count / total:>6.1%} {bar}", highlight=False)


def print_graphs(graphs: Any) -> None:
    """Print a table; graphs of one topology show their inputs once."""
    from rich.table import Table

    table = Table()
    for name in ("graph", "layers", "inputs", "max error", "hash"):
        table.add_column(name)
    seen: dict[str, str] = {}
    for spec in graphs:
        first, end = spec.layers or (0, 0)
        layers = "–".join(map(str, sorted({first, end - 1}))) if end else ""
        inputs = ", ".join(f"{t.name}\\[{', '.join(map(str, t.axes))}]" for t in spec.inputs)
        if spec.graph_sha256 in seen:
            inputs = f"as {seen[spec.graph_sha256]}"
        seen.setdefault(spec.graph_sha256, spec.name)
        table.add_row(spec.name, layers, inputs, f"{spec.max_abs_error:.1g}", spec.graph_sha256[:8])
    console.print(table)


def print_tokens(texts: Any, n_layers: int) -> None:
    """Print explained texts: in colour in a terminal, one line a token elsewhere."""
    from rich.text import Text

    if console.quiet:
        return
    if not console.is_terminal:
        for number, text in enumerate(texts, 1):
            for token, score, taken in zip(text.tokens, text.scores, text.active, strict=True):
                scores = ",".join(f"{one:.4f}" for one in score.reshape(-1))
                marks = "".join("#" if one else "." for one in taken)
                _write(f"{number}\t{token}\t{scores}\t{taken.sum()}\t{marks}")
        return
    legend = Text("depth ")
    for depth in range(n_layers + 1):
        legend.append(f" {depth} ", style=f"{depth_colour(depth, n_layers)} reverse").append(" ")
    console.print(legend)
    for text in texts:
        console.print(_coloured(text.tokens, text.depths, n_layers))
        active = text.active.sum(axis=0)
        console.print(
            f"mean depth {text.mean_depth:.2f}; active tokens of each layer: "
            f"{' '.join(map(str, active))}",
            style="dim",
            highlight=False,
        )


def depth_colour(depth: int, n_layers: int) -> str:
    """Return the colour that a depth is shown in."""
    colours = ("grey50", "blue", "cyan", "green", "yellow", "dark_orange", "red")
    return colours[round(int(depth) / n_layers * (len(colours) - 1))]


def print_depths(texts: Any, n_layers: int) -> None:
    """Print every token in the colour of its depth, which stands behind it.

    ``texts``: of each sequence, the names and the depths of its tokens.
    """
    for tokens, depths in texts:
        console.print(_coloured(tokens, depths, n_layers))


def _coloured(tokens: Any, depths: Any, n_layers: int) -> Any:
    from rich.text import Text

    line = Text()
    for token, depth in zip(tokens, depths, strict=True):
        line.append(token, style=depth_colour(depth, n_layers)).append(f"·{depth} ", style="dim")
    return line


def print_profile(profile: Any, top: int) -> None:
    """Print where the time of a batch goes, with its ``top`` longest operators."""
    from rich.table import Table

    table = Table(
        title=f"{profile.path}: {profile.batch} sequences, {profile.n_tokens} tokens, mean depth "
        f"{profile.mean_depth:.2f}; {profile.total_ms:.2f} ms, median of {profile.n_runs} runs"
    )
    table.add_column("part")
    for name in ("ms", "share", "active tokens"):
        table.add_column(name, justify="right")

    engine, host = sum(profile.engine_ms.values()), sum(profile.host_ms.values())

    def row(name: str, ms: float, active: str = "", style: str = "") -> None:
        table.add_row(name, f"{ms:.3f}", f"{ms / (engine + host):.1%}", active, style=style)

    for name, ms in profile.engine_ms.items():
        row(name, ms, str(profile.active_tokens.get(name, "")))
    row("engine", engine, style="bold")
    table.add_section()
    for name, ms in profile.host_ms.items():
        row(name, ms)
    row("host", host, style="bold")
    console.print(table)
    if not profile.operators:
        console.print("operators are not timed on this backend; its pieces are NVTX ranges")
        return
    total = sum(one.ms for one in profile.operators)
    table = Table(title=f"operators: {total:.2f} ms of {profile.operator_run_ms:.2f} ms a run")
    for name in ("graph", "operator"):
        table.add_column(name)
    for name in ("calls", "ms", "share"):
        table.add_column(name, justify="right")
    for one in profile.operators[:top]:
        calls = f"{one.n_calls:.0f}"
        table.add_row(one.graph, one.operator, calls, f"{one.ms:.3f}", f"{one.ms / total:.1%}")
    rest = sum(one.ms for one in profile.operators[top:])
    if rest:
        count = len(profile.operators) - top
        table.add_row("", f"{count} more", "", f"{rest:.3f}", f"{rest / total:.1%}")
    console.print(table)


def print_engines(engines: Any) -> None:
    """Print the engine sets of a bundle."""
    from rich.table import Table

    for one in engines:
        attention = "packed (untested)" if one.attention == "packed" else one.attention
        precision = "" if one.precision is None else f"{one.precision}, "
        limit = "" if one.workspace_mb is None else f", workspace {one.workspace_mb} MB"
        console.print(
            f"[bold]{one.name}[/bold], version {one.version}, {precision}attention {attention}"
            f"{limit}",
            highlight=False,
        )
        profiles = Table("profile", "n_tokens", "batch", "max_seqlen")
        for number, profile in enumerate(one.profiles):
            sizes = (profile.n_tokens, profile.batch, profile.max_seqlen)
            cells = [f"{each.min}–{each.opt}–{each.max}" for each in sizes]
            profiles.add_row(str(number), *cells)
        console.print(profiles)
        table = Table("engine", "attention", "MB", "built in", "scratch", "layers", "hash")
        for spec in one.engines.values():
            scratch = "" if spec.scratch_bytes is None else f"{spec.scratch_bytes / 2**20:.1f} MB"
            table.add_row(
                spec.graph,
                spec.attention or "",
                f"{spec.size_bytes / 1e6:.1f}",
                f"{spec.build_s:.2f} s",
                scratch,
                "" if spec.layers is None else str(len(spec.layers)),
                spec.sha256[:8],
            )
        console.print(table)
        reasons: dict[str, list[str]] = {}
        for spec in one.engines.values():
            if spec.attention_reason is not None:
                reasons.setdefault(spec.attention_reason, []).append(spec.graph)
        for reason, graphs in reasons.items():
            console.print(
                f"fused attention could not be built, decomposed was, in {', '.join(graphs)}: "
                f"{escape(reason)}",
                highlight=False,
            )
