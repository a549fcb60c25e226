# The SimpleGPT trainer. `make help` lists what can be made.
#   PRECISION=fp32|bf16   of ./train_gpt (fp32 on a CPU, bf16 on a GPU)
#   MATMUL=onednn|openblas  what multiplies on a CPU (oneDNN on x86, if it is there, else OpenBLAS)
#   TEXT=path             a file or folder to train on with `make run` (the sources of Python's standard library)
#   PART=ceilings|kernels|steps|all, MODEL=flavour   of `make bench` (all; flavours that fit the device)

CUDA     ?= /usr/local/cuda
NVCC     ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard $(CUDA)/bin/nvcc))
PYTHON   ?= /usr/bin/python3
# Code for the GPUs that are there, of those that nvcc knows; without one for all of these, and PTX for later ones.
# Hopper's kernels need the a of 90a.
KNOWN     = $(patsubst compute_%,%,$(shell $(NVCC) --list-gpu-arch 2>/dev/null))
THERE     = $(filter $(KNOWN),$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | \
                sed -n -E 's/^([89]|1[0-9])\.([0-9])$$/\1\2/p' | sort -u))
ARCHS     = $(or $(THERE),80 90 $(filter $(KNOWN),100 120))
GPU_ARCH ?= $(foreach a,$(ARCHS:90=90a),-gencode=arch=compute_$a,code=sm_$a) \
            $(if $(THERE),,-gencode=arch=compute_80,code=compute_80)
SOURCES   = train_gpt.cu simplenorm.cuh dataloader.h tokenizer.h $(wildcard dev/device/*.cuh dev/run/*.h dev/use/*.h)
STANDIN   = $(wildcard dev/cpu/include/*.h)

NVCCFLAGS = -std=c++17 -O3 --threads 0 -Xcompiler -fopenmp,-pthread,-Wall $(GPU_ARCH)
# NCCL's folder, with include/ and a lib: beside the toolkit, the system's, or what pip has installed with PyTorch.
# Without it (NCCL=) the build is for one GPU.
NCCL     ?= $(or $(patsubst %/include/nccl.h,%,$(firstword \
                $(wildcard $(CUDA)/include/nccl.h /usr/include/nccl.h /usr/local/include/nccl.h))),$(shell \
                for p in $(PYTHON) python3; do $$p -c 'import nvidia.nccl as n; print(*n.__path__)' 2>/dev/null && break; done))
NCCL_LIBS = $(if $(NCCL),$(addprefix -L,$(wildcard $(NCCL)/lib $(NCCL)/lib64)) -l:libnccl.so.2 \
            $(if $(filter-out /usr,$(NCCL)),$(patsubst %,-Xlinker -rpath=%,$(wildcard $(NCCL)/lib $(NCCL)/lib64))))
# Sums may be reordered, so that they vectorise; NaN and infinity keep their meaning.
OPTIMIZE ?= -O3
# CXX=clang++ builds as well, CXX=aarch64-linux-gnu-g++ for another machine. TUNE: the processor to build for.
TARGET   := $(shell $(CXX) -dumpmachine 2>/dev/null)
TUNE     ?= $(if $(filter x86_64%,$(TARGET)),-march=native -mprefer-vector-width=512,-mcpu=native)
# Loops with a choice in them are split into one loop a way, so that each vectorises; gcc's limit is too low for some.
# From 128 MB on gcc collects its own garbage, which costs a sixteenth of the time and saves 0.3 to 0.5 of 1.4 GB.
GNU      := $(if $(findstring clang,$(CXX)),,--param max-unswitch-insns=200 \
                --param ggc-min-heapsize=1000000 -fopenmp)
# What multiplies on a CPU (dev/cpu/include/gemm.h), onednn or openblas.
ifndef MATMUL
MATMUL   := $(if $(filter x86_64%,$(TARGET)),$(shell \
                echo '\#include <oneapi/dnnl/dnnl.h>' | $(CXX) -E -x c++ - >/dev/null 2>&1 && echo onednn))
endif
ONEDNN    = $(if $(filter onednn,$(MATMUL)),-DUSE_ONEDNN)
GEMM      = $(if $(filter onednn,$(MATMUL)),-ldnnl -lgomp,-lopenblas)
CXXFLAGS  = -std=c++17 $(OPTIMIZE) $(TUNE) $(GNU) $(ONEDNN) \
            -pthread -fno-strict-aliasing -fno-math-errno -fno-trapping-math -fassociative-math \
            -fno-signed-zeros -Wall -Wextra -Wno-unknown-pragmas -Werror=format -Idev/cpu/include -I.
bf16      = -DPRECISION_BF16

# Several ranks on the CPU go over MPI, if there is one; test builds under the sanitizers do without. On GPUs MPI only
# carries NCCL's id. MPICXX=mpicxx.mpich takes another than the first: Open MPI's and MPICH's know -show.
MPICXX   := $(shell command -v mpicxx 2>/dev/null)
ifneq ($(MPICXX),)
MPI_SHOW := $(shell $(MPICXX) -show 2>/dev/null)
MPI_INC  := $(patsubst -I%,-isystem %,$(filter -I%,$(MPI_SHOW)))
MPI_LIB  := $(filter -L% -l% -Wl%,$(MPI_SHOW))
MPI      := $(if $(MPI_LIB),-DUSE_MPI $(MPI_INC))
endif
CPU_STAMP = build/cpu.flags
GPU_STAMP = build/gpu.flags

HAVE_GPU := $(if $(NVCC),$(shell nvidia-smi -L 2>/dev/null | grep -m 1 '^GPU'))

.PHONY: FORCE all cpu gpu run test lint ptx-check gpu-check bench ptx-costs clean help sources nccl
.DELETE_ON_ERROR:
.SECONDARY:

all:  ## build ./train_gpt for what is there: the GPU if there is one and nvcc, else the CPU
ifneq ($(HAVE_GPU),)
	@echo "building for the GPU ($(HAVE_GPU))"
	@$(MAKE) --no-print-directory gpu
else
	@echo "no nvcc with a GPU here: building for the CPU (make gpu forces the GPU)"
	@$(MAKE) --no-print-directory cpu
endif

cpu: build/train_gpt_cpu_$(or $(PRECISION),fp32)  ## build ./train_gpt for the CPU
	ln -sf $< train_gpt

gpu: build/train_gpt_gpu_$(or $(PRECISION),bf16)  ## build ./train_gpt for the GPUs that are there, or for all
	ln -sf $< train_gpt

run:  ## the quick start: prepare real text, train for about five minutes, draw the loss
	@dev/ci/setup.sh run
	@$(MAKE) --no-print-directory all
	@PYTHON=$(PYTHON) dev/recipes/quickstart.sh '$(TEXT)'

test:  ## all tests that need no GPU
	@dev/ci/setup.sh test
	@$(PYTHON) dev/test/run.py

lint:  ## clang-tidy, cppcheck, shellcheck and pyflakes over everything
	@dev/ci/lint.sh

ptx-check:  ## every test of the kernels on what nvcc makes of them, on a CPU: sm_80 and sm_90a, both precisions (needs nvcc)
	@NVCC=$(NVCC) $(PYTHON) dev/ptx/check.py --table $(RESULTS)/ptx-check.md

gpu-check:  ## on a machine with a GPU: build, tests, short runs, benches, compute-sanitizer; one page of all
	@NVCC=$(NVCC) $(PYTHON) dev/ci/gpu_check.py

DEVICE  := $(if $(HAVE_GPU),gpu_bf16,cpu_fp32)
PART    ?= all
RESULTS ?= dev/bench/results

bench:  ## the machine's limits, every kernel beside them, whole steps beside PyTorch (with torch): PART=, MODEL=
	@[ -n '$(filter ceilings kernels steps all,$(PART))' ] || \
	    { echo "make bench: PART '$(PART)' is none of ceilings, kernels, steps, all." >&2; exit 1; }
	@$(MAKE) --no-print-directory build/train_gpt_$(DEVICE) build/bench_$(DEVICE)
ifneq ($(filter ceilings kernels all,$(PART)),)
	@for model in $(or $(MODEL),$(if $(HAVE_GPU),1B 7B,60M)); do \
	    build/bench_$(DEVICE) --part $(PART:all=kernels) --model $$model --results $(RESULTS) || exit 1; \
	done
	@$(PYTHON) dev/bench/report.py --results $(RESULTS) --map > $(RESULTS)/costs.new
	@mv $(RESULTS)/costs.new $(RESULTS)/costs.md
endif
ifneq ($(filter steps all,$(PART)),)
	@$(PYTHON) dev/bench/step.py --trainer build/train_gpt_$(DEVICE) --bench build/bench_$(DEVICE) \
	    --device $(if $(HAVE_GPU),cuda,cpu) --results $(RESULTS) $(if $(MODEL),--model $(MODEL))
endif

COUNTS = $(patsubst %,build/%.ptx_counts,1B 7B)

ptx-costs: build/bench.sm_90a.bf16.ptxas $(COUNTS)  ## what nvcc makes of each kernel, counted on a CPU: least times on an H100
	@$(PYTHON) dev/bench/ptx_costs.py --ptx build/bench.sm_90a.bf16.ptx --ptxas $< $(COUNTS) > $(RESULTS)/ptx-costs.new
	@mv $(RESULTS)/ptx-costs.new $(RESULTS)/ptx-costs.md

clean:  ## remove everything that make has built (not runs/ and data/)
	rm -rf build train_gpt

help:  ## this list
	@sed -n -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 20
	@sed -n -E 's/^#   ([A-Z]+=.*)/  \1/p' Makefile

# --- CPU: the stand-in's sed script turns CUDA's launches and shared memory into C++, line by line

build/src/%: % dev/cpu/rewrite.sed
	@mkdir -p $(@D)
	@(echo '#line 1 "$<"'; sed -E -f dev/cpu/rewrite.sed $<) > $@

sources: $(SOURCES:%=build/src/%)
nccl:
	@echo $(GPU_INC)

# these change when a library, the GPUs or a flag come or go, so that what was built otherwise is built again
$(CPU_STAMP): STAMP = $(CXX) $(OPTIMIZE) $(TUNE) $(GEMM) $(MPI) $(MPI_LIB)
$(GPU_STAMP): STAMP = $(GPU_ARCH) $(GPU_INC) $(GPU_LIBS)
$(CPU_STAMP) $(GPU_STAMP): FORCE
	@mkdir -p $(@D)
	@echo '$(STAMP)' | cmp -s - $@ || echo '$(STAMP)' > $@

CPU_SOURCES = $(SOURCES:%=build/src/%) $(STANDIN) $(CPU_STAMP)

build/train_gpt_cpu_%: $(CPU_SOURCES)
	$(CXX) $(CXXFLAGS) $($*) $(MPI) -x c++ build/src/train_gpt.cu $(GEMM) $(MPI_LIB) -o $@

# without NCCL, as for one GPU, and without oneDNN
build/train_gpt_alone_%: private MATMUL = openblas
build/train_gpt_alone_%: $(CPU_SOURCES)
	$(CXX) $(CXXFLAGS) -O0 -DNO_NCCL $($*) $(MPI) -x c++ build/src/train_gpt.cu $(GEMM) $(MPI_LIB) -o $@

# tests, in both geometries and both precisions; exact ones at -O1, what they check is not speed
build/test_serial_%: build/src/test_gpt.cu dev/test/frame.h $(CPU_SOURCES)
	$(CXX) $(CXXFLAGS) $($*) $(MPI) -x c++ build/src/test_gpt.cu $(GEMM) $(MPI_LIB) -o $@

# built in three fifths of the time; the tolerances of sums are those of loops that vectorise
build/test_serial_o1_%: build/src/test_gpt.cu dev/test/frame.h $(CPU_SOURCES)
	$(CXX) $(CXXFLAGS) $(if $(GNU),-O1 -ftree-loop-vectorize) $($*) $(MPI) -x c++ build/src/test_gpt.cu \
	    $(GEMM) $(MPI_LIB) -o $@

# the exact one also runs PTX (CUDA_CPU_PTX), by the kernels' names
build/test_exact_%: build/src/test_gpt.cu dev/test/frame.h $(CPU_SOURCES) build/ptx.o
	$(CXX) $(CXXFLAGS) -O1 -DEXACT_GEOMETRY -DUSE_PTX -rdynamic $($*) $(MPI) -x c++ build/src/test_gpt.cu \
	    -x none build/ptx.o $(GEMM) $(MPI_LIB) -lboost_context -ldl -o $@

# the machine that runs PTX: floats exactly as written
build/ptx.o: $(wildcard dev/ptx/*.h) dev/ptx/machine.cpp
	@mkdir -p build
	$(CXX) -std=c++17 -O2 -ftree-vectorize $(TUNE) -ffp-contract=off -fno-math-errno -Wall -Wextra -c dev/ptx/machine.cpp -o $@

# what nvcc makes of a program's kernels: build/test_gpt.sm_90a.bf16.ptx
define PTX
build/%.$1.$2.ptx: %.cu $$(SOURCES)
	@mkdir -p build
	$$(NVCC) -std=c++17 -O3 -ptx -lineinfo -arch=$1 $$($2) $$(GPU_INC) $$< -o $$@
endef
$(foreach arch,sm_80 sm_90a,$(foreach precision,fp32 bf16,$(eval $(call PTX,$(arch),$(precision)))))

# what `make ptx-costs` is made of
build/bench.sm_90a.bf16.ptx: dev/bench/bench.cu $(SOURCES)
	@mkdir -p build
	$(NVCC) -std=c++17 -O3 -ptx -lineinfo -arch=sm_90a $(bf16) $(GPU_INC) $< -o $@
build/%.ptxas: build/%.ptx
	$(dir $(NVCC))ptxas -arch=$(word 2,$(subst ., ,$(@F))) -v $< -o /dev/null 2> $@
build/bench_ptx_%: build/src/dev/bench/bench.cu $(CPU_SOURCES) build/ptx.o
	$(CXX) $(CXXFLAGS) -O1 -DEXACT_GEOMETRY -DUSE_PTX -rdynamic $($*) $(MPI) -x c++ $< \
	    -x none build/ptx.o $(GEMM) $(MPI_LIB) -lboost_context -ldl -o $@
build/%.ptx_counts: build/bench_ptx_bf16 build/bench.sm_90a.bf16.ptx
	@rm -f $@
	CUDA_CPU_PTX=build/bench.sm_90a.bf16.ptx CUDA_CPU_PTX_COUNTS=$@ $< --part counts --model $*

build/test_counts: dev/ptx/test_counts.cpp dev/cpu/expect.h build/ptx.o
	$(CXX) $(CXXFLAGS) $< build/ptx.o -o $@

# null and object-size: AddressSanitizer stops there too, and they cost a sixth of the build
SANITIZED = -g1 -fsanitize=address,undefined -fno-sanitize=null,object-size -fno-sanitize-recover=undefined

build/test_sanitized_%: build/src/test_gpt.cu dev/test/frame.h $(CPU_SOURCES)
	$(CXX) $(CXXFLAGS) -O1 $(SANITIZED) -DEXACT_GEOMETRY $($*) -x c++ build/src/test_gpt.cu $(GEMM) -lboost_context -o $@

# properties at random shapes
PROPERTIES = build/src/dev/test/properties.cu dev/test/reference.h dev/test/frame.h $(CPU_SOURCES)

build/properties_%: $(PROPERTIES)
	$(CXX) $(CXXFLAGS) -O1 -DEXACT_GEOMETRY $($*) -x c++ $< $(GEMM) -lboost_context -o $@

build/properties_serial_%: $(PROPERTIES)
	$(CXX) $(CXXFLAGS) $($*) -x c++ $< $(GEMM) -o $@

build/properties_sanitized_%: $(PROPERTIES)
	$(CXX) $(CXXFLAGS) -O1 $(SANITIZED) -DEXACT_GEOMETRY $($*) -x c++ $< $(GEMM) -lboost_context -o $@

build/test_standin_serial: build/src/dev/cpu/test_standin.cu dev/cpu/expect.h $(STANDIN) $(CPU_STAMP)
	$(CXX) $(CXXFLAGS) -x c++ $< $(GEMM) -o $@

# -O0: its run takes 2 s more, its build 9 s less
build/test_standin_exact: build/src/dev/cpu/test_standin.cu dev/cpu/expect.h $(STANDIN) $(CPU_STAMP)
	$(CXX) $(CXXFLAGS) -O0 -DEXACT_GEOMETRY -x c++ $< $(GEMM) -lboost_context -o $@

# what has threads of its own runs under ThreadSanitizer: the channel, the loader, and the trainer that clean_run.py
# watches. It does not know libgomp.
THREADED = $(filter-out -fopenmp,$(CXXFLAGS)) -O1 -g1 -fsanitize=thread

build/test_channel: build/src/dev/test/test_channel.cu dev/test/frame.h $(CPU_SOURCES)
	$(CXX) $(THREADED) -x c++ build/src/dev/test/test_channel.cu $(GEMM) -o $@

build/train_gpt_tsan_%: $(CPU_SOURCES)
	$(CXX) $(THREADED) $($*) -x c++ build/src/train_gpt.cu $(GEMM) -o $@

build/test_dataloader_tsan: dev/test/test_dataloader.cpp dataloader.h
	$(CXX) -std=c++17 -O1 -g1 -pthread -Wall -Wextra -fsanitize=thread -I. $< -o $@

# the other trainers that clean_run.py watches. At -O0 AddressSanitizer's is built in half the time; valgrind knows no
# AVX-512
build/train_gpt_asan_%: $(CPU_SOURCES)
	$(CXX) $(CXXFLAGS) -O0 $(SANITIZED) $($*) $(MPI) -x c++ build/src/train_gpt.cu $(GEMM) $(MPI_LIB) -o $@

build/train_gpt_valgrind_%: $(CPU_SOURCES)
	$(CXX) $(CXXFLAGS) -O1 -g1 -march=x86-64-v3 $($*) -x c++ build/src/train_gpt.cu $(GEMM) -o $@

build/test_nccl: dev/cpu/test_nccl.cpp dev/cpu/expect.h $(STANDIN) $(CPU_STAMP)
	$(CXX) $(CXXFLAGS) $(MPI) $< $(MPI_LIB) -o $@

# the machine that executes PTX: each instruction by the manual, and what it must report
build/test_ptx: dev/ptx/test_ptx.cpp dev/ptx/test_async.cpp dev/ptx/test_checks.cpp dev/ptx/test.h dev/ptx/ptx.h \
                dev/test/frame.h build/ptx.o
	$(CXX) -std=c++17 -O1 -g1 -Wall -Wextra $(filter %.cpp %.o,$^) -o $@

build/bench_cpu_%: build/src/dev/bench/bench.cu $(CPU_SOURCES)
	$(CXX) $(CXXFLAGS) $($*) $(MPI) -x c++ build/src/dev/bench/bench.cu $(GEMM) $(MPI_LIB) -o $@

# the readers under libFuzzer. -O0: at -O1 clang takes minutes
FUZZ_FLAGS = -std=c++17 -O0 -g1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined -fno-access-control \
    -pthread -w $(ONEDNN) -Idev/cpu/include -I.
build/fuzz: build/src/dev/fuzz/fuzz.cu $(CPU_SOURCES)
	clang++ $(FUZZ_FLAGS) -x c++ $< $(GEMM) -o $@

# what test_bench.py runs: it looks at the program, not at times. -O0: its run takes 3 s more, its build 9 s less
build/test_bench: build/src/dev/bench/bench.cu $(CPU_SOURCES)
	$(CXX) $(CXXFLAGS) -O0 $(MPI) -x c++ build/src/dev/bench/bench.cu $(GEMM) $(MPI_LIB) -o $@

build/test_dataloader: dev/test/test_dataloader.cpp dataloader.h
	$(CXX) -std=c++17 -O1 -g1 -pthread -Wall -Wextra -fsanitize=address,undefined -fno-sanitize-recover=undefined -I. $< -o $@

build/test_tokenizer: dev/test/test_tokenizer.cpp tokenizer.h
	$(CXX) -std=c++17 -O1 -g1 -Wall -Wextra -fsanitize=address,undefined -fno-sanitize-recover=undefined -I. $< -o $@

# --- GPU

# /usr/include named once more would hide the C++ headers; nvcc knows neither -pthread nor -Wl,
GPU_INC   = $(if $(NCCL),$(if $(filter-out /usr,$(NCCL)),-isystem $(NCCL)/include),-DNO_NCCL) \
            $(filter-out -pthread,$(MPI))
GPU_LIBS  = -lcublasLt $(NCCL_LIBS) $(patsubst -Wl$(comma)%,-Xlinker %,$(filter-out -pthread,$(MPI_LIB)))
comma    := ,

build/train_gpt_gpu_%: $(SOURCES) $(GPU_STAMP)
	@test -n "$(NVCC)" || { echo "make gpu: nvcc is missing. Install the CUDA Toolkit, or: make cpu" >&2; exit 1; }
	@test -n "$(NCCL)" || echo "make gpu: for one GPU, without NCCL. For more install libnccl-dev, or: NCCL=folder" >&2
	@mkdir -p build
	$(NVCC) $(NVCCFLAGS) $($*) $(GPU_INC) train_gpt.cu $(GPU_LIBS) -o $@

build/test_gpu_%: test_gpt.cu dev/test/frame.h $(SOURCES) $(GPU_STAMP)
	@mkdir -p build
	$(NVCC) $(NVCCFLAGS) $($*) $(GPU_INC) test_gpt.cu $(GPU_LIBS) -o $@

build/bench_gpu_%: dev/bench/bench.cu $(SOURCES) $(GPU_STAMP)
	@mkdir -p build
	$(NVCC) $(NVCCFLAGS) $($*) $(GPU_INC) dev/bench/bench.cu $(GPU_LIBS) -o $@
