// The GPU that a process works on: found, and refused in one line if the driver or this build are not for it.
#pragma once
#include "hopper.cuh"

// Whether the code that the device runs has Hopper's instructions: it lacks them if built for sm_90 without the a.
__global__ void hopper_code_kernel(int* there) { *there = HOPPER_CODE; }

// The GPUs that this process is shown, at least one.
inline int count_devices() {
    int count = 0, driver = 0, runtime = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaSuccess && count > 0) return count;
    CHECK(cudaDriverGetVersion(&driver));
    CHECK(cudaRuntimeGetVersion(&runtime));
    const std::string there = driver ? format("the driver is of CUDA %d.%d", driver / 1000, driver % 1000 / 10)
                                     : std::string("there is no driver");
    const bool old = status == cudaErrorInsufficientDriver && driver > 0;
    throw Error(format(
        "device: no CUDA device is visible: %s; %s, this build of CUDA %d.%d. %s", cudaGetErrorString(status),
        there.c_str(), runtime / 1000, runtime % 1000 / 10,
        old ? "Update the driver, or build with an older CUDA." : "Check nvidia-smi, or build for the CPU: make cpu."));
}

// Throws if this build has no code that the current device runs.
inline void check_code(const cudaDeviceProp& device) {
    cudaFuncAttributes code;
    const cudaError_t status = cudaFuncGetAttributes(&code, hopper_code_kernel);
    if (status != cudaErrorNoKernelImageForDevice && status != cudaErrorInvalidDeviceFunction &&
        status != cudaErrorUnsupportedPtxVersion)
        return check_cuda(status, "cudaFuncGetAttributes(hopper_code_kernel)", __FILE__, __LINE__);
    const int sm = device.major * 10 + device.minor;
    if (sm < 80)
        throw Error(format("device: %s is sm_%d, the kernels need sm_80 or newer. Build for the CPU: make cpu.",
                           device.name, sm));
    std::string built;
    for (int arch : {__CUDA_ARCH_LIST__}) built += format("%ssm_%d", built.empty() ? "" : ", ", arch / 10);
    throw Error(
        format("device: %s is sm_%d, this build is for %s. Build it there, or with GPU_ARCH=-arch=sm_%d%s: make gpu.",
               device.name, sm, built.c_str(), sm, sm == 90 ? "a" : ""));
}

// The GPU of number `local`, which is this process's on its node, or the only one it is shown.
inline Gpu find_device(int local) {
    const int count = count_devices();
    if (count > 1 && local >= count)
        throw Error(format("device: local rank %d, but this node shows %d GPUs. Start a process a GPU.", local, count));
    cudaDeviceProp device;
    const int mine = count > 1 ? local : 0;
    CHECK(cudaSetDevice(mine));
    CHECK(cudaGetDeviceProperties(&device, mine));
    check_code(device);
    Gpu gpu;
    gpu.sms = device.multiProcessorCount;
    gpu.shared = device.sharedMemPerBlockOptin;
    if (device.major == 9 && device.minor == 0) {
        int code = 0, *there = nullptr;
        CHECK(cudaMalloc((void**)&there, sizeof(int)));
        hopper_code_kernel<<<1, 1>>>(there);
        CHECK(cudaMemcpy(&code, there, sizeof(int), cudaMemcpyDeviceToHost));
        CHECK(cudaFree(there));
        gpu.hopper = code;
        if (!code) warn("device: built without sm_90a, so without Hopper's kernels. Build by make gpu.");
    }
    return gpu;
}
