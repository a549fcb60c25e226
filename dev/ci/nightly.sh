#!/bin/bash
# The tests that are too long for `make test`: properties at random shapes for hours, fuzzing, kills, every fault.
# One line a check below: its name and its command. Each prints its own result; one that fails does not stop the rest.
#
# usage: dev/ci/nightly.sh [--list] [--only TEXT] [--hours H] [--seed S]
#   --list       the checks and their commands, and no more
#   --only TEXT  those whose line holds TEXT
#   --hours H    how long the properties and the fuzzing may take together (2)
#   --seed S     of the random shapes (the date: another each night)
# Logs: build/nightly/NAME.txt. Exit status 1 if any failed.
cd "$(dirname "$0")/../.." || exit 1

list=0 only='' hours=2 seed=$(date +%Y%m%d)
while [ $# -gt 0 ]; do
    case "$1" in
        --list) list=1 ;;
        --only) only=${2?--only: lacks its text.} && shift ;;
        --hours) hours=${2?--hours: lacks its number.} && shift ;;
        --seed) seed=${2?--seed: lacks its number.} && shift ;;
        --help | -h) sed -n 's/^# \{0,1\}//p;/^cd/q' dev/ci/nightly.sh | tail -n +2 && exit 0 ;;
        *) echo "nightly.sh: unknown option $1. See --help." >&2 && exit 1 ;;
    esac
    shift
done
expr "$hours" : '[0-9.]*$' >/dev/null || { echo "nightly.sh: --hours: '$hours' is no number." >&2; exit 1; }
share=$(awk "BEGIN { print int($hours * 3600 / 7) }")  # seconds of each random check

export OMP_NUM_THREADS=1 CUBLASLT_CPU_ALGORITHMS=3 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 CUDA_CPU_SEED=$seed
python=${PYTHON:-/usr/bin/python3} trainer=build/train_gpt_cpu_fp32 half=build/train_gpt_cpu_bf16

# name | targets of make | command
checks() {
    cat <<END
test               |                                | $python dev/test/run.py
exact_fp32         | build/properties_fp32          | build/properties_fp32 --seconds $share --seed $seed
exact_bf16         | build/properties_bf16          | build/properties_bf16 --seconds $share --seed $seed
serial_fp32        | build/properties_serial_fp32   | build/properties_serial_fp32 --seconds $share --seed $seed
serial_bf16        | build/properties_serial_bf16   | build/properties_serial_bf16 --seconds $share --seed $seed
sanitized_fp32     | build/properties_sanitized_fp32 | build/properties_sanitized_fp32 --seconds $share --seed $seed
sanitized_bf16     | build/properties_sanitized_bf16 | build/properties_sanitized_bf16 --seconds $share --seed $seed
serial_tests16     | build/test_serial_bf16         | env CUBLASLT_CPU_ALGORITHMS= build/test_serial_bf16
exact_tests        | build/test_exact_fp32          | build/test_exact_fp32
sanitized_tests    | build/test_sanitized_fp32      | build/test_sanitized_fp32
sanitized_tests16  | build/test_sanitized_bf16      | env CUBLASLT_CPU_ALGORITHMS= build/test_sanitized_bf16
properties_ranks   | $trainer | $python dev/test/properties_ranks.py $trainer --cases 60 --full --seed $seed
properties_ranks16 | $half | $python dev/test/properties_ranks.py $half --cases 60 --full --bf16 --seed $seed
fuzz               |                                | $python dev/fuzz/run.py --seconds $share
kill               | $trainer | $python dev/test/kill.py $trainer --kills 200 --seed $seed
ranks_fp32         | $trainer | $python dev/test/test_ranks.py $trainer --full
ranks_bf16         | $half | $python dev/test/test_ranks.py $half --full --bf16
disk               | $trainer | $python dev/test/test_disk.py $trainer --full
faults             | $trainer | $python dev/test/test_faults.py $trainer --full
clean_asan         | build/train_gpt_asan_fp32     | $python dev/test/clean_run.py build/train_gpt_asan_fp32
clean_asan16       | build/train_gpt_asan_bf16     | $python dev/test/clean_run.py build/train_gpt_asan_bf16 --bf16
clean_tsan         | build/train_gpt_tsan_fp32     | $python dev/test/clean_run.py build/train_gpt_tsan_fp32 --alone
clean_valgrind     | build/train_gpt_valgrind_fp32 | $python dev/test/clean_run.py build/train_gpt_valgrind_fp32 --alone --valgrind
lint               |                                | dev/ci/lint.sh
pythons            | $trainer                       | dev/ci/pythons.sh $trainer
leak               | $trainer | $python dev/test/clean_run.py $trainer --leak 10000
leak_2_ranks       | $trainer | $python dev/test/clean_run.py $trainer --leak 3000 --ranks 2
build              |                                | $python dev/test/test_build.py --full
ptx                |                                | $python dev/ptx/check.py --seeds 4 --seed $seed
ptx_plant          |                                | $python dev/ptx/plant.py --seeds 3
sass               |                                | $python dev/test/test_sass.py --fetch
cuda_headers       |                                | dev/ci/cuda_headers.sh
arm64              |                                | dev/ci/machines.sh arm64
clang              |                                | dev/ci/machines.sh clang
old_x86            |                                | dev/ci/machines.sh old
house              |                                | $python dev/test/test_house.py --full
mutations          |                                | $python dev/test/mutate.py --seed $seed --least 0.8
END
}

mkdir -p build/nightly
summary='' failed=0
while IFS='|' read -r name targets command; do
    name=${name// /} targets=${targets// /} command=${command# }
    case "$name $command" in *"$only"*) ;; *) continue ;; esac
    if [ $list = 1 ]; then
        printf '%-18s %s\n' "$name" "$command"
        continue
    fi
    log=build/nightly/$name.txt begin=$SECONDS
    : >"$log"
    if [ -n "$targets" ] && ! make --no-print-directory "$targets" >>"$log" 2>&1 </dev/null; then
        verdict="FAILED: $targets did not build ($log)" failed=1
    elif $command >>"$log" 2>&1 </dev/null; then
        verdict="ok: $(tail -n 1 "$log")"
    else
        verdict="FAILED with status $? ($log): $(grep -m 1 -E '^ *(FAIL|SURVIVED)' "$log" || tail -n 1 "$log")" failed=1
    fi
    line=$(printf '%-18s %6d s  %s' "$name" $((SECONDS - begin)) "$verdict")
    echo "$line"
    summary+="$line"$'\n'
done < <(checks)
[ $list = 1 ] && exit 0
[ -n "$summary" ] || { echo "nightly.sh: no check holds '$only'." >&2; exit 1; }
echo
echo "nightly: $(grep -c ' ok: ' <<<"$summary") ok, $(grep -c ' FAILED' <<<"$summary") failed; seed $seed"
grep ' FAILED' <<<"$summary"
exit $failed
