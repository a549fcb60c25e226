#!/bin/sh
# Static analysis: clang-tidy and cppcheck over the C++ named below, shellcheck and pyflakes over the rest. `make lint`
# calls it.
#   dev/ci/lint.sh [tidy] [cppcheck] [shell] [python]      all of them
# Silent but for what it looks at; exit status 1 if anything was found or a tool is missing.
set -u
cd "$(dirname "$0")/../.." || exit 1
mkdir -p build/log
failed=0

tool() {  # tool COMMAND PACKAGE: is it there?
    command -v "$1" >/dev/null && return 0
    echo "lint.sh: $1 is missing. Install it: sudo apt-get install $2" >&2
    failed=1
    return 1
}

check() {  # check NAME COMMAND...: prints what it found
    name=$1
    shift
    echo "$name"
    if ! "$@" >build/log/lint.txt 2>build/log/lint_errors.txt || [ -s build/log/lint.txt ]; then
        cat build/log/lint.txt
        grep -E 'rror|: (warning|performance|portability):' build/log/lint_errors.txt >&2  # cppcheck finds to stderr
        failed=1
    fi
}

unused() {  # unused FILE...: pyflakes, which knows no noqa
    pyflakes3 "$@" 2>&1 | while IFS=: read -r file line rest; do
        sed -n "${line}p" "$file" | grep -q noqa || echo "$file:$line:$rest"
    done
}

sources="test_gpt.cu dev/test/test_channel.cu dev/cpu/test_standin.cu dev/bench/bench.cu"
make -s sources $(for f in $sources; do echo "build/src/$f"; done) || exit 1
mpi=$(mpicxx -show 2>/dev/null | tr ' ' '\n' | sed -n 's/^-I/-isystem/p')

tidy() {  # tidy FILE FLAGS...
    file=$1
    shift
    check "clang-tidy $file $*" clang-tidy-14 --quiet --warnings-as-errors='*' "$file" $more -- -x c++ -std=c++17 \
        -pthread -fno-strict-aliasing -Wno-unknown-pragmas -Idev/cpu/include -I. "$@"
}

for part in ${*:-tidy cppcheck shell python}; do
    case $part in
    tidy)
        tool clang-tidy-14 clang-tidy-14 || continue
        more=
        tidy build/src/dev/test/test_channel.cu ${mpi:+-DUSE_MPI} $mpi
        tidy dev/test/test_dataloader.cpp
        tidy dev/test/test_tokenizer.cpp
        # the paths of the trainer that these include were walked above, in longer programs it takes ten minutes; the
        # stand-in's tests do on purpose what must be noticed, and copy closures
        more='--checks=-clang-analyzer-*,-performance-unnecessary-value-param,-bugprone-suspicious-memory-comparison'
        more=$more,-cert-exp42-c,-cert-flp37-c,-readability-suspicious-call-argument
        tidy build/src/test_gpt.cu -DEXACT_GEOMETRY -DPRECISION_BF16
        tidy build/src/dev/bench/bench.cu
        tidy build/src/train_gpt.cu
        tidy build/src/dev/cpu/test_standin.cu
        tidy dev/cpu/test_nccl.cpp ${mpi:+-DUSE_MPI} $mpi
        more=$more,-performance-no-int-to-ptr  # its registers hold addresses
        for file in dev/ptx/*.cpp; do tidy "$file"; done
        ;;
    cppcheck)
        tool cppcheck cppcheck || continue
        for flags in "" "-DEXACT_GEOMETRY -DPRECISION_BF16"; do
            check "cppcheck $flags" cppcheck -q --std=c++17 --language=c++ --enable=warning,performance,portability \
                --suppressions-list=dev/ci/cppcheck.txt --error-exitcode=1 -Idev/cpu/include -I. $flags \
                build/src/train_gpt.cu dev/test/test_dataloader.cpp dev/test/test_tokenizer.cpp
        done
        ;;
    shell)
        tool shellcheck shellcheck || continue
        # files read beside (1091) and what they use (2034, 2154),
        # words that are to split (2046, 2048, 2086),
        # functions called by name (2317)
        check shellcheck shellcheck -e SC1091,SC2034,SC2154,SC2046,SC2048,SC2086,SC2317 $(git ls-files '*.sh')
        ;;
    python)
        tool pyflakes3 pyflakes3 || continue
        check pyflakes unused $(git ls-files '*.py')
        ;;
    *)
        echo "lint.sh: '$part' is none of tidy, cppcheck, shell, python." >&2
        exit 1
        ;;
    esac
done
exit $failed
