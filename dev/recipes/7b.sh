#!/bin/sh
# 7B on C4, the paper's main comparison. Its losses after 20K, 40K and 60K steps: prenorm 4.115, 2.345, 2.311; preqknorm
# 2.393, 2.320, 2.290; simplegpt 2.331, 2.243, 2.208; dev/look/plot.py --paper 7B draws over them. Numbers: the released
# code's configurations, which train all variants at one rate, though they call 1e-3 unstable for prenorm and recommend
# 3e-4 with decay 0.1 there: LR=3e-4 DECAY=0.1.
#   [STEPS=20000|40000|60000] [VARIANT=...] dev/recipes/7b.sh [--plan] [trainer's options]
. "$(dirname "$0")/common.sh"
if [ $SIZE = paper ]; then
    model="--model 7B"
    length=2048 total=192 batch=auto            # 393K tokens a step; 4 x 6 micro-batches on 8 GPUs there
    steps=${STEPS:-60000} warmup=$((steps / 100)) # 7.9, 15.7 or 23.6 billion tokens
    lr=${LR:-1e-3} decay=${DECAY:-0.05}
    data=c4 prepare="Make them: dev/data/prepare.py --corpus c4 --tokenizer llama2/tokenizer.model --out data/c4"
else
    model="--dim 512 --layers 8 --heads 8 --multiple-of 256 --tokenizer bytes" # 27M parameters
    length=512 total=4 batch=4
    steps=${STEPS:-1000} warmup=$((steps / 20)) # 2 million tokens
    lr=${LR:-1e-3} decay=${DECAY:-0.05}
fi
recipe "$@"
