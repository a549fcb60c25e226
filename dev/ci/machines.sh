#!/bin/bash
# The same source on other machines and with another compiler, built by the project's Makefile in copies of the tree:
#   dev/ci/machines.sh [arm64] [clang] [old]      all of them
#   arm64  g++ for arm64; tests, golden files, training and generate under qemu
#   clang  clang++ for this machine: the same tests but for the longest
#   old    an x86-64 without AVX: training and generate here, and under qemu on a processor without AVX and on one with
#          AVX2 of a model that nobody knows
# One line a step with its seconds; ends at the first that fails, whose log is build/machines/NAME.txt. What is missing
# is installed on Debian, if root. Libraries for arm64 are unpacked beside, the system has its own only.
set -u
cd "$(dirname "$0")/../.." || exit 1
root=$PWD machines=$PWD/build/machines
python=${PYTHON:-/usr/bin/python3}
unset MAKEFLAGS MAKELEVEL MFLAGS OPENBLAS_CORETYPE ONEDNN_MAX_CPU_ISA DNNL_MAX_CPU_ISA  # of who calls
mkdir -p "$machines"
count=0 begin=$SECONDS

fail() {
    echo "machines.sh: $*" >&2
    exit 1
}

step() {  # step NAME COMMAND...: in the copy
    local what=$part\ $1 start=$SECONDS log=$machines/$part-${1// /-}.txt
    shift
    if (cd "$machines/$part" && "$@") >"$log" 2>&1 </dev/null && ! grep -q -a ': 0 passed' "$log"; then
        count=$((count + 1))
        printf '%-28s %5d s  %s\n' "$what" $((SECONDS - start)) "$(grep -E -a "$tells" "$log" | tail -n 1)"
    else
        printf 'FAIL %s after %d s (%s): %s\n' "$what" $((SECONDS - start)) "${log#"$root/"}" \
            "$(grep -m 1 -E -a '^FAIL|warning: |[Ee]rror' "$log" || tail -n 1 "$log")"
        exit 1
    fi
}
tells='^[a-z_.]+: [0-9]+ passed, [0-9]+ failed$|^matmul: '

need() {  # need COMMAND PACKAGE ...
    local missing=
    while [ $# -gt 0 ]; do
        command -v "$1" >/dev/null || missing+=" $2"
        shift 2
    done
    [ -z "$missing" ] && return
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        fail "packages are missing. Install them: sudo apt-get install$missing"
    fi
    echo "installing$missing"
    { apt-get -o DPkg::Lock::Timeout=300 update && DEBIAN_FRONTEND=noninteractive \
        apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends $missing; } \
        >"$machines/apt.txt" 2>&1 || fail "apt-get failed (build/machines/apt.txt). Install by hand:$missing"
}

copy() {  # the tracked files as they are now; what was built from them stays
    mkdir -p "$machines/$part/build"
    find "$machines/$part" -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
    git ls-files -z | while IFS= read -r -d '' file; do [ -e "$file" ] && printf '%s\0' "$file"; done |
        tar -c --null -T - | tar -x -C "$machines/$part" || fail "no copy in build/machines/$part"
}

make_them() {  # make_them TARGET ...: with $flags; a warning is a failure
    make -j"$(nproc)" "${flags[@]}" "${@/#/build/}" >build/make.txt 2>&1
    local status=$?
    cat build/make.txt
    [ $status = 0 ] && ! grep -q 'warning: ' build/make.txt
}

unpack() {  # unpack APT TO PACKAGE ...: with apt's files in a folder of their own
    cd "$1" || return 1
    local to=$2 deb
    shift 2
    APT_CONFIG=conf apt-get -q update && APT_CONFIG=conf apt-get -q download "$@" || return 1
    for deb in *.deb; do dpkg -x "$deb" "$to" || return 1; done
    : >"$to/done"
}

emulated() {  # emulated NAME PROGRAM QEMU...: a script that runs it, and in which the program finds itself
    local script=$machines/$part/build/$1 program=$machines/$part/build/$2
    shift 2
    printf '#!/bin/sh\nexec %s -0 "%s" %s "$@"\n' "$*" "$script" "$program" >"$script"
    chmod +x "$script"
}

trains() {  # trains TRAINER [TEXT]: golden files, those whose name holds TEXT, and generate
    step "$1 trains" "$python" dev/test/test_cli.py "build/$1" dev/test/golden --filter "golden${2+ $2}"
    step "$1 generates" "$python" dev/test/test_generate.py "build/$1" --filter greedy
}

says() {  # says TRAINER PATTERN: in one step of training
    rm -rf build/run
    "$python" -c 'import sys; sys.path.insert(0, "dev/test"); import test_cli
test_cli.write_shard("build/data.bin", [*range(256)] * 2)'
    "build/$1" --dim 16 --heads 1 --layers 1 --multiple-of 16 --tokenizer bytes --seq-len 16 --batch-size 1 --steps 1 \
        --train-data build/data.bin --out build/run >build/says.txt 2>&1
    cat build/says.txt
    grep -q "$2" build/says.txt
}

arm64() {
    need aarch64-linux-gnu-g++ g++-aarch64-linux-gnu qemu-aarch64-static qemu-user-static
    local apt=$machines/apt to=$machines/arm64-root
    local lib=$to/usr/lib/aarch64-linux-gnu include=$to/usr/include
    if [ ! -e "$to/done" ]; then
        rm -rf "$apt" "$to"
        mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$to"
        printf '%s\n' "APT::Architectures { \"$(dpkg --print-architecture)\"; \"arm64\"; };" \
            'APT::Sandbox::User "root";' "Dir::State::Lists \"$apt/lists\";" "Dir::Cache \"$apt/cache\";" >"$apt/conf"
        step libraries unpack "$apt" "$to" \
            lib{openblas0-openmp,openblas-openmp-dev,gfortran5,gomp1,boost1.74-dev,boost-context1.74-dev}:arm64
    fi
    flags=(MPICXX= TUNE= "CXX=aarch64-linux-gnu-g++ -isystem $include -isystem \
$include/aarch64-linux-gnu/openblas-openmp -L$lib -L$lib/openblas-openmp -Wl,-rpath-link=$lib")
    local programs='test_standin_serial test_standin_exact train_gpt_cpu_fp32 test_serial_fp32 test_serial_bf16
        test_exact_fp32 test_exact_bf16'
    step build make_them $programs
    for program in $programs; do
        emulated "arm64_$program" "$program" qemu-aarch64-static -L /usr/aarch64-linux-gnu \
            -E "LD_LIBRARY_PATH=$lib/openblas-openmp:$lib"
    done
    step standin_serial build/arm64_test_standin_serial
    step standin_exact build/arm64_test_standin_exact
    step serial_fp32 build/arm64_test_serial_fp32 --quick
    step serial_bf16 build/arm64_test_serial_bf16 --quick
    step exact_fp32 build/arm64_test_exact_fp32 --quick
    step exact_bf16 build/arm64_test_exact_bf16 --quick
    trains arm64_train_gpt_cpu_fp32
}

clang() {
    need clang++ clang
    flags=(MPICXX= CXX=clang++)
    step build make_them test_standin_serial test_standin_exact test_serial_fp32 train_gpt_cpu_fp32
    step standin_serial build/test_standin_serial
    step standin_exact build/test_standin_exact
    step serial_fp32 build/test_serial_fp32
    trains train_gpt_cpu_fp32
}

old() {
    need qemu-x86_64-static qemu-user-static
    flags=(MPICXX= TUNE=-march=x86-64)
    step build make_them train_gpt_cpu_fp32
    trains train_gpt_cpu_fp32
    emulated nehalem train_gpt_cpu_fp32 qemu-x86_64-static -cpu Nehalem
    emulated unknown train_gpt_cpu_fp32 qemu-x86_64-static -cpu max,vendor=GenuineIntel,family=6,model=250
    step 'nehalem multiplies' says nehalem '^matmul: oneDNN .* SSE4.1'
    step 'unknown multiplies' says unknown '^matmul: oneDNN .* AVX2'
    trains nehalem simplegpt_hs
    trains unknown simplegpt_hs
}

for part in ${*:-arm64 clang old}; do
    case $part in
    arm64 | clang | old) copy && $part ;;
    *) fail "'$part' is none of arm64, clang, old." ;;
    esac
done
echo "machines: $count passed, 0 failed in $((SECONDS - begin)) s"
