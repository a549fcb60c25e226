#!/bin/sh
# 1B on C4. Numbers: the released code's configurations; so are the steps of its smaller flavours, a hundredth of which
# is warm-up: MODEL=39M STEPS=7800, 67M 13400, 102M 20400, 162M 32400, 271M 54200.
#   [VARIANT=...] [MODEL=162M STEPS=32400] dev/recipes/1b.sh [--plan] [trainer's options]
. "$(dirname "$0")/common.sh"
if [ $SIZE = paper ]; then
    model="--model ${MODEL:-1B}"
    length=512 total=256 batch=auto             # 131K tokens a step; 16 x 2 micro-batches on 8 GPUs there
    steps=${STEPS:-200000} warmup=$((steps / 100)) # 26 billion tokens
    lr=${LR:-2e-3} decay=${DECAY:-0.1}
    data=c4 prepare="Make them: dev/data/prepare.py --corpus c4 --tokenizer llama2/tokenizer.model --out data/c4"
else
    model="--dim 384 --layers 12 --heads 6 --multiple-of 64 --tokenizer bytes" # 21M parameters
    length=256 total=8 batch=8
    steps=${STEPS:-1000} warmup=$((steps / 20)) # 2 million tokens
    lr=${LR:-2e-3} decay=${DECAY:-0.1}
fi
recipe "$@"
