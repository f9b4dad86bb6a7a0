#!/usr/bin/env bash
# The tests under AddressSanitizer and UndefinedBehaviorSanitizer, after proof that a planted fault is caught.
# usage: tools/sanitize.sh <folder of the virtual environment's programs> [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1/python")
shift
export DCN_NP_SANITIZE=address,undefined
# A sanitized case takes ten times as long; the sweep as a whole runs in the ordinary tests.
export DCN_NP_FUZZ_CASES=${DCN_NP_FUZZ_CASES:-500}
folder=build/sanitized
# Not test_runtime.py: under a sanitizer a failed operator new ends the process.
tests=("$@")
if [ ${#tests[@]} -eq 0 ]; then
    tests=(
        tests/test_arguments.py tests/test_semantics.py tests/test_gradients.py tests/test_fuzz.py
        tests/test_gpu_kernels.py tests/test_gpu_fused.py tests/test_gpu_regions.py
        tests/test_roi_arguments.py tests/test_roi_semantics.py tests/test_roi_fuzz.py
    )
fi

"$python" setup.py --quiet build --build-base "$folder" --build-lib "$folder/lib"

# libasan alone aborts at the first C++ exception, hence libstdc++ beside it. The threads of the emulated GPU have
# stacks of their own, which it would take for stacks in use after return.
compiler=${CXX:-g++}
sanitized() {
    env LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libstdc++.so)" \
        ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc \
        PYTHONSAFEPATH=1 PYTHONPATH="$folder/lib" "$@"
}

"$python" tools/canaries.py build "$folder"
for fault in $("$python" tools/canaries.py list); do
    report=$(sanitized "$python" tools/canaries.py run "$folder" "$fault" 2>&1) && status=0 || status=$?
    if [ "$status" -eq 0 ] || ! grep -qE 'AddressSanitizer|runtime error' <<<"$report"; then
        echo "the planted fault '$fault' was not caught: $report" >&2
        exit 1
    fi
    echo "planted fault caught: $fault"
done

sanitized "$python" tools/canaries.py instrumented "$folder"
sanitized "$python" -m pytest -p no:cacheprovider -n auto --maxprocesses 4 --hypothesis-profile quick "${tests[@]}"
