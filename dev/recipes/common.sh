# shellcheck shell=sh
# What the recipes share; each sets its numbers and calls `recipe "$@"`, whose arguments go to the trainer too.
# Environment:
#   VARIANT   simplegpt, prenorm or preqknorm (simplegpt)
#   SIZE      paper, or small: a twin for one GPU or a CPU (paper)
#   STEPS     updates (the recipe's)
#   LR, DECAY peak learning rate and weight decay (the recipe's); MODEL, of 1b.sh, a smaller flavour
#   GPUS      processes, one a GPU (paper: 8, small: 1)
#   LAUNCH    what starts them (mpirun -n $GPUS; nothing for one)
#   DATA      folder of token shards (data/NAME, as the recipe says)
#   OUT       the run's folder (runs/RECIPE-SIZE-VARIANT-STEPS)
# --plan prints memory, time and GPU hours, and starts nothing.
set -eu
cd "$(dirname "$0")/../.."
name=$(basename "$0" .sh)
VARIANT=${VARIANT:-simplegpt} SIZE=${SIZE:-paper}

fail() {
    echo "$name.sh: $*" >&2
    exit 1
}

case "${1-}" in
-h | --help)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    sed -n '3,/^set/s/^# \{0,1\}//p' dev/recipes/common.sh
    exit 0
    ;;
esac
case "$VARIANT" in
simplegpt | prenorm | preqknorm) ;;
*) fail "VARIANT '$VARIANT' is none of simplegpt, prenorm, preqknorm." ;;
esac
case "$SIZE" in paper | small) ;; *) fail "SIZE '$SIZE' is neither paper nor small." ;; esac

# The small twins train on what every machine has, the sources of Python's standard library, as bytes.
small_data() {
    data=python prepare="Make them: dev/data/prepare.py --stdlib --out data/python --prefix text"
    [ -n "${DATA:-}" ] || ls data/python/text_train_*.bin >/dev/null 2>&1 || [ "$planning" ] ||
        "${PYTHON:-/usr/bin/python3}" dev/data/prepare.py --stdlib --out data/python --prefix text
}

recipe() {
    planning=
    for argument in "$@"; do [ "$argument" != --plan ] || planning=yes; done
    [ -x ./train_gpt ] || fail "./train_gpt is missing. Build it: make."
    [ $SIZE = paper ] || small_data
    DATA=${DATA:-data/$data}
    GPUS=${GPUS:-$([ $SIZE = paper ] && echo 8 || echo 1)}
    OUT=${OUT:-runs/$name-$SIZE-$VARIANT-$steps}
    set -- $model --seq-len $length --total-batch $total --batch-size $batch --steps $steps --warmup $warmup \
        --lr $lr --weight-decay $decay --variant $VARIANT "$@"
    [ -z "$planning" ] || exec ./train_gpt --ranks "$GPUS" "$@"
    ls "$DATA"/*_train_*.bin >/dev/null 2>&1 || fail "$DATA: holds no training shards. $prepare"
    ls "$DATA"/*_val_*.bin >/dev/null 2>&1 && set -- --val-data "$DATA/*_val_*.bin" "$@"
    for file in "$DATA"/*_tokenizer.bin; do  # of the data; prepare.py puts it there
        [ $SIZE = small ] || [ ! -f "$file" ] || set -- --tokenizer "$file" "$@"
    done
    [ "$GPUS" = 1 ] || LAUNCH=${LAUNCH:-mpirun -n $GPUS}
    exec ${LAUNCH:-} ./train_gpt --train-data "$DATA/*_train_*.bin" --out "$OUT" --resume --save-every 1000 \
        --save-async "$@"
}
