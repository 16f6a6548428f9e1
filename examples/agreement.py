"""How well do the embeddings of a sparse bundle agree with its dense baseline?

python examples/agreement.py BUNDLE TEXTS
"""

import sys
from pathlib import Path

import numpy as np

import sdt_deploy
from sdt_deploy.evaluation.agreement import agreement
from sdt_deploy.tokenization import read_lines

BATCH = 32


def main(bundle: str, texts: str) -> None:
    """Print the agreement over the first 256 held-out lines (every fifth) of ``texts``."""
    lines = read_lines(Path(texts))[::5][:256]
    with sdt_deploy.Session.open(bundle) as session:
        outputs = {
            path: np.concatenate(
                [
                    session.run(lines[i : i + BATCH], overflow="truncate", path=path).output
                    for i in range(0, len(lines), BATCH)
                ]
            )
            for path in ("sparse", "dense")
        }
    print(agreement(outputs["sparse"], outputs["dense"]).in_words())  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
