"""python -m dcn_np {doctor,demo,bench,see}: the command line."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import dcn_np

COMMANDS = {
    "doctor": "show what this installation is made of, and check that it computes correctly",
    "demo": "convolve a photograph forward and backward, check the result and draw it",
    "bench": "time the operators on the layers of real networks, every result checked first",
    "see": "draw what nodes of a network see in an image: samples, receptive fields, saliency regions",
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each command's module adds its own options."""
    parser = argparse.ArgumentParser(
        prog="python -m dcn_np", description="Deformable convolution for arrays."
    )
    parser.add_argument("--version", action="version", version=f"dcn_np {dcn_np.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="{" + ",".join(COMMANDS) + "}", required=True)
    for name, purpose in COMMANDS.items():
        command = importlib.import_module(f"dcn_np.commands.{name}")
        subparser = commands.add_parser(
            name, help=purpose, description=purpose[0].upper() + purpose[1:] + "."
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.main)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 when everything it checked is right."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.command != "doctor":  # which reports it
        try:
            dcn_np.get_num_threads()
        except ValueError as error:
            parser.error(str(error))
    return int(args.run(args) or 0)


if __name__ == "__main__":
    sys.exit(main())
