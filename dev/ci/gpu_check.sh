#!/bin/sh
# Everything that needs a GPU, in one go; `make gpu-check` calls it.
#   dev/ci/gpu_check.sh [STAGE ...]     build tests sanitize train ranks bench; each takes under nine minutes, but bench
# stands for: kernels steps-162M steps-1B steps-7B steps-llama3-8B report, each under nine minutes.
# Environment: NVCC, PYTHON, RESULTS (default dev/bench/results: where reports land, with date and device in them),
# MINUTES (8.5: of each steps-MODEL).
# Exit status 1 if a stage failed; the others run all the same.
set -u
cd "$(dirname "$0")/../.." || exit 1
NVCC=${NVCC:-nvcc} PYTHON=${PYTHON:-python3} RESULTS=${RESULTS:-dev/bench/results}
stages=$(echo " ${*:-build tests sanitize train ranks bench} " |
    sed 's/ bench / kernels steps-162M steps-1B steps-7B steps-llama3-8B report /')
device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
[ -n "$device" ] || { echo "gpu_check: no GPU is visible to nvidia-smi. Run it on a machine that has one." >&2; exit 1; }
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
[ "$capability" = 90 ] && capability=90a
mkdir -p "$RESULTS" build/log
report=$RESULTS/$(date +%Y-%m-%d)-gpu-check.txt
echo "$(date -u +%Y-%m-%dT%H:%MZ) $device, sm_$capability, $(git describe --always --dirty 2>/dev/null)" | tee -a "$report"
failed=0

check() {  # check NAME COMMAND...: runs it, keeps its log, writes one line
    name=$1
    shift
    begin=$(date +%s)
    if "$@" >"build/log/gpu_$name.txt" 2>&1; then verdict=ok; else verdict=FAILED failed=1; fi
    echo "$verdict $name ($(($(date +%s) - begin)) s): $(tail -n 1 "build/log/gpu_$name.txt")" | tee -a "$report"
}

train() {  # train NAME SECONDS FLAGS...: a short run on the sources of Python's library; its last step's line
    name=$1 limit=$2
    shift 2
    rm -rf "build/gpu_run_$name"
    timeout "$limit" ./build/train_gpt_gpu_bf16 --train-data 'data/gpu/text_train_*.bin' --vocab-size 32000 \
        --out "build/gpu_run_$name" "$@" && tail -n 1 "build/gpu_run_$name/log.csv"
}

ranks() {  # ranks ZERO FLAGS...: a short run on all GPUs, a process each, that meet by TCP; what it sent and its last step
    zero=$1
    shift
    rm -rf build/gpu_run_ranks
    for rank in $(seq 0 $((gpus - 1))); do
        RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=$gpus MASTER_ADDR=127.0.0.1 MASTER_PORT=29517 timeout 100 \
            ./build/train_gpt_gpu_bf16 --train-data 'data/gpu/text_train_*.bin' --vocab-size 32000 --zero "$zero" \
            --timeout 60 --check-every 5 --out build/gpu_run_ranks "$@" &
        started="${started-} $!"
    done
    for pid in $started; do wait "$pid" || return 1; done
    tail -n 1 build/gpu_run_ranks/log.csv
}

for stage in $stages; do
    case $stage in
    build)
        check build make -j4 NVCC="$NVCC" GPU_ARCH="-gencode=arch=compute_$capability,code=sm_$capability" \
            build/train_gpt_gpu_bf16 build/train_gpt_gpu_fp32 build/test_gpu_bf16 build/test_gpu_fp32 build/bench_gpu_bf16
        ;;
    tests)
        check test_fp32 build/test_gpu_fp32
        check test_bf16 build/test_gpu_bf16
        check cli_fp32 "$PYTHON" dev/test/test_cli.py build/train_gpt_gpu_fp32 dev/test/golden
        check cli_bf16 "$PYTHON" dev/test/test_cli.py build/train_gpt_gpu_bf16 dev/test/golden --bf16
        check generate_fp32 "$PYTHON" dev/test/test_generate.py build/train_gpt_gpu_fp32
        check generate_bf16 "$PYTHON" dev/test/test_generate.py build/train_gpt_gpu_bf16 --bf16
        ;;
    sanitize)
        for tool in memcheck racecheck synccheck; do
            check $tool timeout 170 compute-sanitizer --tool $tool --error-exitcode 1 build/test_gpu_bf16 --quick
        done
        ;;
    train)
        [ -f data/gpu/text_manifest.json ] || "$PYTHON" dev/data/prepare.py --stdlib --out data/gpu --prefix text
        check train_162M train 162M 160 --model 162M --seq-len 1024 --batch-size 16 --steps 40
        check train_1B train 1B 160 --model 1B --seq-len 512 --batch-size 16 --steps 20
        check train_1.4B train 1.4B 160 --model nanogpt-1.4B --seq-len 1024 --batch-size 4 --steps 20
        check train_7B train 7B 200 --model 7B --seq-len 2048 --batch-size auto --recompute norm --moments bf16 --steps 4
        check train_llama3-8B train llama3-8B 200 --model llama3-8B --vocab-size 128256 --seq-len 2048 \
            --batch-size auto --recompute norm --moments bf16 --steps 4
        ;;
    ranks)
        gpus=$(nvidia-smi -L | wc -l)
        if [ "$gpus" -lt 2 ]; then
            echo "skipped ranks: there is one GPU" | tee -a "$report"
        else
            for zero in 0 1 2 3; do
                check "ranks_zero$zero" ranks $zero --model 1B --seq-len 512 --batch-size 16 --steps 20
            done
        fi
        ;;
    kernels)
        check kernels_1B timeout 260 build/bench_gpu_bf16 --part kernels --model 1B --results "$RESULTS"
        check kernels_7B timeout 260 build/bench_gpu_bf16 --part kernels --model 7B --results "$RESULTS"
        ;;
    steps-*)
        check "$stage" "$PYTHON" dev/bench/step.py --trainer build/train_gpt_gpu_bf16 --bench build/bench_gpu_bf16 \
            --device cuda --model "${stage#steps-}" --minutes "${MINUTES:-8.5}" --results "$RESULTS"
        ;;
    report)
        check bench_report "$PYTHON" dev/bench/report.py --trainer build/train_gpt_gpu_bf16 --results "$RESULTS"
        cp build/log/gpu_bench_report.txt "$RESULTS/$(date +%Y-%m-%d)-bench.md"
        "$PYTHON" dev/bench/report.py --map --results "$RESULTS" > "$RESULTS/costs.md" || failed=1
        ;;
    *)
        echo "gpu_check: '$stage' is no stage. The head of dev/ci/gpu_check.sh lists them." >&2
        exit 1
        ;;
    esac
done
exit $failed
