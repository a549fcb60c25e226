#!/bin/sh
# The least CUDA that README.md promises and those after it: nvcc takes the trainer and the bench with the headers of
# each. pip fetches these, and nvcc, of which it has that of CUDA 13 alone: this reads the older headers too.
#   dev/ci/cuda_headers.sh [VERSION ...]      12.0 12.1 12.4 12.6 12.9 13.0 13.5
# What was fetched lies in build/cuda; the headers of cuBLAS and NCCL are those of a major version's first. No code is
# made. Exit status 1 if anything failed.
set -u
cd "$(dirname "$0")/../.." || exit 1

packages() {  # packages VERSION: where its headers are, in 13 also the compiler
    case $1 in
    12.0) echo runtime-cu12==12.0.146 nvcc-cu12==12.0.140 ;;
    12.1) echo runtime-cu12==12.1.105 nvcc-cu12==12.1.105 ;;
    12.4) echo runtime-cu12==12.4.127 nvcc-cu12==12.4.131 ;;
    12.6) echo runtime-cu12==12.6.77 nvcc-cu12==12.6.85 ;;
    12.9) echo runtime-cu12==12.9.79 nvcc-cu12==12.9.86 ;;
    13.0) echo runtime==13.0.96 nvcc==13.0.88 crt==13.0.88 cccl==13.0.85 nvvm==13.0.88 ;;
    13.5) echo runtime==13.5.37 nvcc==13.5.37 crt==13.5.37 cccl==13.3.5.0.6 nvvm==13.5.37 ;;
    libraries-12) echo cublas-cu12==12.0.2.224 nccl-cu12==2.18.3 ;;
    libraries-13) echo cublas==13.0.0.19 nccl-cu13==2.27.7 ;;
    *) return 1 ;;
    esac
}

fetch() {  # fetch VERSION: to build/cuda/VERSION, unless it is there
    to=build/cuda/$1
    [ -e "$to/done" ] && return 0
    rm -rf "$to" && mkdir -p "$to/wheels" || return 1
    for package in $(packages "$1"); do
        case $package in nvvm* | cublas* | nccl*) package=nvidia-$package ;; *) package=nvidia-cuda-$package ;; esac
        python3 -m pip download -q --disable-pip-version-check --no-cache-dir --no-deps -d "$to/wheels" "$package" ||
            return 1
    done
    mkdir "$to/include"
    for wheel in "$to"/wheels/*.whl; do
        python3 -m zipfile -e "$wheel" "$to/all" || return 1
        rm "$wheel"
    done
    cp -rf "$to"/all/nvidia/*/include/. "$to/include"
    chmod -f +x "$to"/all/nvidia/cu13/bin/* "$to"/all/nvidia/cu13/nvvm/bin/*
    # of 12 the headers are enough, but for that which knows what nvcc makes of a launch
    case $1 in 12.*) rm -r "$to/all" "$to/include/crt/host_runtime.h" ;; esac
    : >"$to/done"
}

passed=0 failed=0
for version in ${*:-12.0 12.1 12.4 12.6 12.9 13.0 13.5}; do
    packages "$version" >/dev/null || { echo "cuda_headers.sh: '$version' is no version that it knows." >&2; exit 1; }
    libraries=libraries-${version%.*} compiler=13.0
    case $version in 13.*) compiler=$version ;; esac
    for part in $compiler $version $libraries; do
        fetch $part || { echo "cuda_headers.sh: $part cannot be fetched. It takes pip and the network." >&2; exit 1; }
    done
    for source in train_gpt.cu dev/bench/bench.cu; do
        if build/cuda/$compiler/all/nvidia/cu13/bin/nvcc -std=c++17 -cuda -fdevice-syntax-only -arch=sm_90a \
            -DPRECISION_BF16 -Xcompiler -fopenmp,-pthread -Ibuild/cuda/$version/include \
            -Ibuild/cuda/$libraries/include $source -o /dev/null; then
            passed=$((passed + 1))
            echo "ok $source with CUDA $version"
        else
            failed=$((failed + 1))
            echo "FAIL $source with CUDA $version"
        fi
    done
done
echo "cuda_headers: $passed passed, $failed failed"
[ $failed = 0 ]
