"""Check the docstring of every public name: numpydoc's rules, and that its examples give what they show."""

import doctest
import inspect
import sys

from numpydoc.validate import validate

import dcn_np
import dcn_np.analysis
import dcn_np.analysis.plot

MODULES = dcn_np, dcn_np.analysis, dcn_np.analysis.plot

# Not asked of everyone: an extended summary and examples where the summary says it all (ES01, EX01), See Also
# where nothing is near (SA01, SA04), where the quotes stand (GL01, GL02), what a context yields (YD01).
WAIVED = {"ES01", "EX01", "GL01", "GL02", "SA01", "SA04", "YD01"}


def faults(name):
    found = validate(name)["errors"]
    return [f"{name}: {code} {text}" for code, text in found if code not in WAIVED]


def failed_examples(name, value):
    examples = doctest.DocTestFinder(recurse=False).find(value, name, globs={"dcn_np": dcn_np})
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    return sum(runner.run(test).failed for test in examples)


if __name__ == "__main__":
    public = {
        f"{module.__name__}.{name}": getattr(module, name) for module in MODULES for name in module.__all__
    }
    public = {name: value for name, value in public.items() if callable(value)}
    missing = [f"{name}: no docstring" for name, value in public.items() if not inspect.getdoc(value)]
    problems = missing + [fault for name in public for fault in faults(name)]
    print(*problems, sep="\n", end="\n" * bool(problems))
    sys.exit(bool(problems) + sum(failed_examples(*item) for item in public.items()) > 0)
