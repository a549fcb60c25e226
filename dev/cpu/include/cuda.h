// The part of the CUDA driver's interface that the trainer uses: tensor maps of the bulk copy engine, here a plain
// struct. Only what tensor_map asks for exists: 16-bit elements, rank 4, rows of 128 bytes, swizzled.
#pragma once
#include "cuda_runtime.h"

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
typedef uint32_t cuuint32_t;
typedef uint64_t cuuint64_t;
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE = 0, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_NONE = 0, CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

// The conditions of the driver's manual, as far as they concern these maps.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                       const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                       CUtensorMapFloatOOBfill fill) {
    if (type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || rank != 4 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
        swizzle != CU_TENSOR_MAP_SWIZZLE_128B || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE ||
        (uintptr_t)map % 64 != 0 || (uintptr_t)base % 16 != 0 || box[0] != 64)
        return CUDA_ERROR_INVALID_VALUE;
    for (int i = 0; i < 4; i++)
        if (dims[i] == 0 || dims[i] > (uint64_t)1 << 32 || box[i] == 0 || box[i] > 256 || steps[i] != 1 ||
            (i < 3 && (strides[i] % 16 != 0 || strides[i] == 0 || strides[i] >= (uint64_t)1 << 40)))
            return CUDA_ERROR_INVALID_VALUE;
    *map = {(char*)base, {dims[0], dims[1], dims[2], dims[3]}, {2, strides[0], strides[1], strides[2]},
            {box[0], box[1], box[2], box[3]}, CUDA_TENSOR_MAP_MADE};
    return CUDA_SUCCESS;
}

enum { cudaEnableDefault = 0 };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result = nullptr) {
    bool known = strcmp(name, "cuTensorMapEncodeTiled") == 0;
    *function = known ? (void*)cuTensorMapEncodeTiled : nullptr;
    if (result) *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
