#!/bin/bash
# The Python tools' tests under each Python from 3.9 on that is here: in PATH, pyenv's or uv's. Packages from pip, in
# build/pythons. Without one older than the system's, vermin looks for what 3.9 lacks.
# usage: dev/ci/pythons.sh TRAIN_GPT
set -eu -o pipefail
cd "$(dirname "$0")/../.."
trainer=${1?pythons.sh: lacks the trainer.}
failed=0 old=0
for minor in 9 10 11 12 13 14; do
    found=
    for python in "$(command -v python3.$minor || :)" \
        "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor."*"/bin/python" \
        "$HOME/.local/share/uv/python/cpython-3.$minor."*"/bin/python3"; do
        [ -x "$python" ] && "$python" -c 'import ensurepip, ssl' 2>/dev/null && found=$python && break
    done
    [ -n "$found" ] || continue
    place=build/pythons/3.$minor
    [ -x "$place/bin/python" ] || "$found" -m venv "$place"
    "$place/bin/pip" install -q --disable-pip-version-check numpy matplotlib || {
        echo "skip python 3.$minor: pip gives no numpy or no matplotlib"
        continue
    }
    "$place/bin/pip" install -q --disable-pip-version-check tokenizers sentencepiece tiktoken zstandard pyarrow 2>/dev/null || :
    [ $minor -gt 10 ] || old=1
    for test in "test_prepare.py" "test_convert_tokenizer.py" "test_plot.py" "test_claim.py $trainer" \
        "test_experiments.py $trainer"; do
        echo "python 3.$minor, $test"
        # shellcheck disable=SC2086
        PYTHON="$PWD/$place/bin/python" "$place/bin/python" dev/test/$test | { grep -v '^ok' || :; } || failed=1
    done
done
if [ $old = 0 ]; then
    echo "no Python 3.9 or 3.10 here: vermin looks"
    python3 -m venv build/pythons/vermin && build/pythons/vermin/bin/pip install -q vermin
    build/pythons/vermin/bin/vermin --no-tips -t=3.9- --violations dev/look dev/data dev/hf dev/bench || failed=1
fi
exit $failed
