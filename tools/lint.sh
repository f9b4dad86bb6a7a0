#!/usr/bin/env bash
# Style of Python, Cython, C++ and docstrings. usage: tools/lint.sh <folder of the tools' programs>
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$(realpath -s "$1"):$PATH

ruff check
ruff format --check
cython-lint dcn_np
find src dcn_np/kernels tests/emulation tests/frameworks tools \( -name '*.[ch]pp' -o -name '*.cu' \) -print0 | xargs -0 clang-format --dry-run --Werror
python tools/check_docstrings.py
