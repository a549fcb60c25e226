#!/bin/sh
# The quick start, after `make`: data, about five minutes of training on 2 cores, a picture. `make run` calls it.
#   dev/recipes/quickstart.sh [TEXT]    TEXT: a file or folder to train on (the sources of Python's standard library)
# Environment: PYTHON, STEPS (default 900). Everything lands in data/ and runs/, which git ignores.
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
STEPS=${STEPS:-900}
if [ $# -gt 0 ] && [ -n "$1" ]; then
    data=data/text
    "$PYTHON" dev/data/prepare.py "$1" --out $data --prefix text
else
    data=data/quickstart
    [ -f $data/text_manifest.json ] || "$PYTHON" dev/data/prepare.py --stdlib --out $data --prefix text
fi
run=runs/$(date +%Y%m%d-%H%M%S)
mkdir -p runs
./train_gpt --dim 256 --layers 4 --heads 4 --multiple-of 64 --tokenizer bytes --seq-len 256 --batch-size 8 \
    --train-data "$data/text_train_*.bin" --val-data "$data/text_val_*.bin" --shuffle \
    --steps "$STEPS" --lr 3e-3 --warmup $((STEPS / 18)) --log-every 25 --val-every 150 --val-batches 16 \
    --sample-every 300 --prompt 'def ' --save-every 300 --export "$run.safetensors" --out "$run"
bigram=$("$PYTHON" -c "import json; print(json.load(open('$data/text_manifest.json'))['bigram_val_loss'])")
"$PYTHON" dev/look/plot.py "$run" --out "$run/loss.png" --baseline "bigram model=$bigram"
val=$(awk -F, 'NR > 1 && $6 != "" { v = $6 } END { print v }' "$run/log.csv")
echo "validation loss per byte: $val nats; a bigram model of the same data: $bigram"
echo "log $run/log.csv, picture $run/loss.png, checkpoints $run/step_*, weights $run.safetensors"
