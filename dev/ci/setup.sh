#!/bin/sh
# Installs what `make run` or `make test` needs and this machine lacks; says nothing if all is there.
# usage: dev/ci/setup.sh run|test
# On Debian and Ubuntu by apt-get, if root; elsewhere names what is missing and exits with 1.
set -u

fail() {
    echo "setup.sh: $*" >&2
    exit 1
}

# what multiplies: oneDNN has its fast code for x86 only
[ "$(uname -m)" = x86_64 ] && blas=libdnnl-dev || blas=libopenblas-openmp-dev
needed="g++ $blas python3 python3-numpy python3-matplotlib"
case "${1-}" in
run) ;;
test) needed="$needed libopenblas-openmp-dev libboost-context-dev libopenmpi-dev openmpi-bin clang libclang-rt-dev" ;;
*) fail "'${1-}' is neither run nor test. Say what to set up for." ;;
esac

if command -v dpkg-query >/dev/null; then
    missing=
    for package in $needed; do
        case "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" in
        installed) ;;
        *) missing="$missing $package" ;;
        esac
    done
    [ -z "$missing" ] && exit 0
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        fail "packages are missing. Install them: sudo apt-get install$missing"
    fi
    echo "installing$missing"
    export DEBIAN_FRONTEND=noninteractive
    log=$(mktemp) || exit 1
    trap 'rm -f "$log"' EXIT
    # another apt-get at work is waited for
    { apt-get -o DPkg::Lock::Timeout=300 update &&
        apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends $missing; } >"$log" 2>&1 && exit 0
    fail "apt-get failed ($(sed -n 's/^E: //p' "$log" | head -n 1)). Install by hand:$missing"
fi

has() { printf '#include <%s>\n' "$1" | g++ -E -x c++ - >/dev/null 2>&1; }

missing=
if command -v g++ >/dev/null; then
    has oneapi/dnnl/dnnl.h || has cblas.h || missing="$missing, oneDNN (on x86) or OpenBLAS with cblas.h"
    [ "$1" = run ] || has boost/context/detail/fcontext.hpp || missing="$missing, Boost.Context"
else
    missing=", g++, oneDNN (on x86) or OpenBLAS with cblas.h"
fi
${PYTHON:-/usr/bin/python3} -c 'import numpy, matplotlib' 2>/dev/null ||
    missing="$missing, python3 with numpy and matplotlib"
[ "$1" = run ] || command -v mpirun >/dev/null || missing="$missing, Open MPI"
[ -z "$missing" ] || fail "missing: ${missing#, }. Install them with the system's package manager."
