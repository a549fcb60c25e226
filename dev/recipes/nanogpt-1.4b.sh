#!/bin/sh
# 1.4B on OpenWebText: nanoGPT's backbone, 48 layers. The released code has no configuration of this run: the shape is
# the paper's; batch, decay, warm-up, steps and the cosine to a tenth are of the kind that nanoGPT's GPT-2 run has; the
# rate is that run's 6e-4 times the 3 that the paper's abstract names as the least that SimpleGPT stands (prenorm:
# LR=6e-4).
#   [VARIANT=...] dev/recipes/nanogpt-1.4b.sh [--plan] [trainer's options]
. "$(dirname "$0")/common.sh"
if [ $SIZE = paper ]; then
    model="--model nanogpt-1.4B"
    length=1024 total=480 batch=auto            # 492K tokens a step
    steps=${STEPS:-100000} warmup=2000          # 49 billion tokens
    lr=${LR:-1.8e-3} decay=${DECAY:-0.1}
    data=openwebtext
    prepare="Make them: dev/data/prepare.py --corpus openwebtext --tokenizer gpt2/tokenizer.json --out data/openwebtext"
else
    model="--backbone nanogpt --dim 384 --layers 12 --heads 6 --tokenizer bytes" # 21M parameters
    length=256 total=8 batch=8
    steps=${STEPS:-1000} warmup=$((steps / 20)) # 2 million tokens
    lr=${LR:-2e-3} decay=${DECAY:-0.1}
fi
recipe --schedule cosine "$@"
