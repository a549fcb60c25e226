#!/bin/sh
# 8B on C4: Llama 3's shape and vocabulary, grouped-query attention. Numbers: the released code's configurations.
#   [VARIANT=...] dev/recipes/8b.sh [--plan] [trainer's options]
. "$(dirname "$0")/common.sh"
if [ $SIZE = paper ]; then
    model="--model llama3-8B"
    length=2048 total=192 batch=auto            # 393K tokens a step; 3 x 8 micro-batches on 8 GPUs there
    steps=${STEPS:-20000} warmup=$((steps / 100)) # 7.9 billion tokens
    lr=${LR:-1e-3} decay=${DECAY:-0.05}
    data=c4-llama3
    prepare="Make them: dev/data/prepare.py --corpus c4 --tokenizer llama3/tokenizer.model --out data/c4-llama3"
else
    model="--dim 512 --layers 8 --heads 8 --kv-heads 2 --ffn-mult 1.3 --multiple-of 256 --rope-theta 5e5"
    model="$model --tokenizer bytes" # 28M parameters
    length=512 total=4 batch=4
    steps=${STEPS:-1000} warmup=$((steps / 20)) # 2 million tokens
    lr=${LR:-1e-3} decay=${DECAY:-0.05}
fi
recipe "$@"
