"""python -m examples.digits.run: run the trained networks with NumPy alone, and compare with training."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import dcn_np

from .data import count_right, test_set
from .numpy_network import Network
from .runs import WEIGHTS, read_weights

# Sums in another order turn a logit's last bits, and so, rarely, an answer.
ALLOWED_DIFFERENCE = 3


def main(arguments: list[str] | None = None) -> int:
    """Count the right answers of each network; 0 when they are those that training counted."""
    parser = argparse.ArgumentParser(prog="python -m examples.digits.run", description=__doc__)
    parser.add_argument("weights", nargs="?", type=Path, default=WEIGHTS, help=f"default: {WEIGHTS.name}")
    states, counts, originals = read_weights(parser.parse_args(arguments).weights)
    digits = test_set(originals)
    print(f"{len(digits.labels)} warped digits, {dcn_np.get_num_threads()} threads, {dcn_np.isa()}")
    differences = []
    for variant, state in states.items():
        network = Network(variant, state=state)
        begin = time.perf_counter()
        right = count_right(network.logits, digits)
        seconds = time.perf_counter() - begin
        differences.append(abs(right - counts[variant]))
        print(
            f"{variant:<6} {right} right ({100 * right / len(digits.labels):.1f} %), after training "
            f"{counts[variant]}; {1e6 * seconds / len(digits.labels):.0f} us for a digit"
        )
    print(f"torch was {'' if 'torch' in sys.modules else 'not '}imported")
    return int(max(differences) > ALLOWED_DIFFERENCE)


if __name__ == "__main__":
    sys.exit(main())
