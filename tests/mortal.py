"""``sdt-deploy`` in processes that die, or whose disk fails, at a given step on the file system.

Run as a module it imports torch and traces the graphs of a model once; they are not verified:
neither writes anything, and both take seconds. Then it forks a child for each line on stdin, a JSON
object: ``arguments`` of the command line, ``directory`` whose files count, ``step`` at which
something happens, and ``failure``: the errno of an OSError, or 0 for SIGKILL. For each line it
prints one: the exit status, negative for a signal, and the messages of the child.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Any

WRITES = ("open", "os.mkdir", "os.chmod", "os.rename")
REMOVALS = ("os.remove", "os.rmdir")
STRUCK = "the step was reached"


class Doom:
    """Counts steps on the files of a directory, and strikes at one of them."""

    def __init__(self, directory: str, step: int, failure: int) -> None:
        self.directory, self.left, self.failure = os.path.realpath(directory), step, failure
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in WRITES or (event in REMOVALS and not self.failure):
            path = arguments[0]
            reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if isinstance(path, str | bytes | os.PathLike) and not reads:
                self.count(os.fsdecode(path))

    def count(self, path: str) -> None:
        if path.startswith(self.directory) and self.left > 0:
            self.left -= 1
            if self.left == 0:
                self.strike(path)

    def strike(self, path: str) -> None:
        os.write(2, f"{STRUCK}\n".encode())
        if self.failure:
            raise OSError(self.failure, os.strerror(self.failure), path)
        os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Count a step before ``function`` and one after it, which has no audit event."""

        @functools.wraps(function)
        def counted(*arguments: Any) -> Any:
            self.count(self.directory)
            result = function(*arguments)
            self.count(self.directory)
            return result

        return counted


def run(arguments: list[str], directory: str, step: int, failure: int) -> None:
    """Run the command line to its end, whichever it is."""
    from sdt_deploy import cli, files
    from sdt_deploy.exporters.onnx import WeightsWriter

    doom = Doom(directory, step, failure)
    os.fsync = doom.around(os.fsync)
    WeightsWriter.fill = doom.around(WeightsWriter.fill)  # type: ignore[method-assign]
    if not failure:
        files._exchange = doom.around(files._exchange)
    sys.argv = ["sdt-deploy", *arguments]
    cli.main()


def in_a_child(order: dict[str, Any]) -> tuple[int, str]:
    with tempfile.TemporaryFile() as messages:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for stream in (1, 2):
                    os.dup2(messages.fileno(), stream)
                run(**order)
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        messages.seek(0)
        return os.waitstatus_to_exitcode(status), messages.read().decode()


def main(native: str) -> None:
    from pathlib import Path

    import torch

    from sdt_deploy.config import ExportConfig
    from sdt_deploy.exporters import export
    from sdt_deploy.exporters.partition import partition
    from sdt_deploy.model.checkpoints import load

    torch.set_num_threads(1)  # threads do not survive a fork
    modules = {
        type(module): module
        for part in partition(load(Path(native)).model, ExportConfig())
        for module in (part.module, part.repeated)
        if module is not None
    }
    opset = ExportConfig().opset
    traced = {kind: export.trace(module, opset=opset) for kind, module in modules.items()}
    export.trace = lambda module, *, opset: traced[type(module)]
    export.verify_graph = lambda *arguments: 0.0
    print("ready", flush=True)  # noqa: T201
    for line in sys.stdin:
        print(json.dumps(in_a_child(json.loads(line))), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
