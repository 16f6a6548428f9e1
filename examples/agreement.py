"""How well do the embeddings of a sparse bundle agree with its dense baseline?

python examples/agreement.py BUNDLE TEXTS
"""

import argparse
from pathlib import Path

import numpy as np

import sdt_deploy
from sdt_deploy.evaluation.agreement import agreement
from sdt_deploy.tokenization import read_lines

BATCH = 32


def main() -> None:
    """Print the agreement over the first 256 held-out lines (every fifth) of a text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("texts", type=Path, help="one text per line")
    options = parser.parse_args()
    lines = read_lines(options.texts)[::5][:256]
    with sdt_deploy.Session.open(options.bundle) as session:
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
    main()
