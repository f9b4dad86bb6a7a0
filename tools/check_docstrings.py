"""Check the docstring of every public name: numpydoc's rules, and that its examples give what they show."""

import doctest
import inspect
import sys

from numpydoc.validate import validate

import dcn_np

# Not asked of everyone: an extended summary and examples where the summary says it all (ES01, EX01), See Also
# where nothing is near (SA01, SA04), where the quotes stand (GL01, GL02), what a context yields (YD01).
WAIVED = {"ES01", "EX01", "GL01", "GL02", "SA01", "SA04", "YD01"}


def faults(name):
    found = validate(f"dcn_np.{name}")["errors"]
    return [f"dcn_np.{name}: {code} {text}" for code, text in found if code not in WAIVED]


def failed_examples(name):
    value = getattr(dcn_np, name)
    examples = doctest.DocTestFinder(recurse=False).find(value, name, globs={"dcn_np": dcn_np})
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    return sum(runner.run(test).failed for test in examples)


if __name__ == "__main__":
    names = [name for name in dcn_np.__all__ if callable(getattr(dcn_np, name))]
    missing = [f"dcn_np.{name}: no docstring" for name in names if not inspect.getdoc(getattr(dcn_np, name))]
    problems = missing + [fault for name in names for fault in faults(name)]
    print(*problems, sep="\n", end="\n" * bool(problems))
    sys.exit(bool(problems) + sum(failed_examples(name) for name in names) > 0)
