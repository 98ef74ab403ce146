"""Fuzzing by hand and in the test command; see README.md.

python -m tests.fuzz run [--minutes N] [TARGET...]   the kept corpus, then new inputs; fails on a finding
python -m tests.fuzz replay TARGET INPUT             one input, with what it finds
python -m tests.fuzz keep TARGET...                  what runs have found interesting becomes the corpus, minimised
python -m tests.fuzz coverage                        lines and branches of c/ that the corpus reaches
python -m tests.fuzz mutants [NAME...]               removed checks, each of which must be found
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import mutants, targets
from .build import BuildError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="the kept corpus, then new inputs")
    run.add_argument("--minutes", type=float, default=60, help="of fuzzing in all, both processors at work")
    run.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(targets.NAMES))
    replay = verbs.add_parser("replay", help="one input")
    replay.add_argument("target", choices=targets.NAMES)
    replay.add_argument("input", type=Path)
    keep = verbs.add_parser("keep", help="minimise what was found into the kept corpus")
    keep.add_argument("targets", nargs="*", metavar="TARGET")
    verbs.add_parser("coverage", help="of c/ by the kept corpus")
    removed = verbs.add_parser("mutants", help="checks that are taken away")
    removed.add_argument("--seconds", type=float, default=60, help="in which each must be found")
    removed.add_argument("names", nargs="*", metavar="NAME")
    arguments = parser.parse_args()
    try:
        match arguments.verb:
            case "run":
                return targets.run(arguments.targets or targets.NAMES, arguments.minutes)
            case "replay":
                return targets.replay(arguments.target, arguments.input)
            case "keep":
                return targets.keep(arguments.targets or targets.NAMES)
            case "coverage":
                return targets.coverage()
            case _:
                return mutants.run(arguments.names, arguments.seconds)
    except BuildError as error:
        print(f"a fuzz target does not compile: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
