// The heads of attention: their sizes, and where their rows lie.
#pragma once
#include "base.cuh"

// B sequences of T tokens; q (B,NH,T,HS), k and v (B,NKV,room,HS), of which the rows past .. past + T are the tokens'
// own and those before them a cache's. Training has past 0 and room T. spans (B,T), on the device: of each token's
// document the first token and the one behind its last; a query sees its own document only. Null: no such bounds. Where
// it is given, past is 0.
struct Heads {
    int B, T, NH, NKV, HS;
    int past = 0, room = T;
    const int2* spans = nullptr;
    __host__ __device__ int width(int part) const { return (part == 0 ? NH : NKV) * HS; }  // part 0: q, 1: k, 2: v
    __host__ __device__ int begin(int part) const { return part == 0 ? 0 : part == 1 ? NH * HS : (NH + NKV) * HS; }
    __host__ __device__ int qkv() const { return (NH + 2 * NKV) * HS; }
    __host__ __device__ int rows(int part) const { return part == 0 ? T : room; }  // of a head, in memory
    // where row n = b T + t of a part begins; the next head is rows(part) HS further
    __host__ __device__ size_t at(int part, size_t n) const {
        const unsigned heads = part == 0 ? NH : NKV, b = unsigned(n) / T;
        const unsigned row = unsigned(n) % T + (part == 0 ? 0 : past);
        return (size_t(b * heads) * rows(part) + row) * HS;
    }
};
