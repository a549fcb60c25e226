// Whether the ranks' weights agree: a hash of each rank's, and who differs from the others.
#pragma once
#include "../../train_gpt.cu"

// parts[block] = sum of the mixed words of the block's CHUNK of the weights, as they lie in memory, modulo 2^64: the
// same in any order. words (count), parts (chunks(count)).
__global__ void weights_hash_kernel(unsigned long long* parts, const unsigned* words, size_t count) {
    size_t begin = blockIdx.x * CHUNK, end = min(begin + CHUNK, count);
    unsigned long long sum = 0;
    for (size_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
        unsigned long long x = (words[i] + 0x9e3779b97f4a7c15ull * (i + 1)) * 0xbf58476d1ce4e5b9ull;
        sum += (x ^ (x >> 29)) * 0x94d049bb133111ebull;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}
// hash = sum of parts; one block
__global__ void hash_sum_kernel(unsigned long long* hash, const unsigned long long* parts, int count) {
    unsigned long long sum = 0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += parts[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *hash = sum;
}

// Each rank's hash of the weights, which must be the same on all, to m.hashes. Not with weights that are cut.
void hash_weights(Model& m) {
    const size_t words = m.table.size * sizeof(floatX) / sizeof(unsigned);
    for (const cudaEvent_t& there : m.gathered) CHECK(cudaStreamWaitEvent(m.gpu.stream, there, 0));
    weights_hash_kernel<<<chunks(words), 256, 0, m.gpu.stream>>>(m.hash_parts, reinterpret_cast<unsigned*>(m.params),
                                                                 words);
    CHECK(cudaGetLastError());
    hash_sum_kernel<<<1, 512, 0, m.gpu.stream>>>(m.hashes + ranks.rank, m.hash_parts, chunks(words));
    CHECK(cudaGetLastError());
    ranks.order(ranks.stream, m.gpu.stream);
    ranks.all_gather(m.hashes, m.hashes + ranks.rank, 1, ncclUint64, sizeof(*m.hashes));
    ranks.order(m.gpu.stream, ranks.stream);
}

// The ranks whose weights are not those of the most. Without a majority nobody knows who is wrong.
void compare_hashes(const unsigned long long* hashes, int64_t step) {
    std::map<unsigned long long, int> votes;
    for (int r = 0; r < ranks.size; r++) votes[hashes[r]]++;
    if (votes.size() == 1) return;
    auto fewer = [](auto& a, auto& b) { return a.second < b.second; };
    const auto most = std::max_element(votes.begin(), votes.end(), fewer);
    const bool majority = 2 * most->second > ranks.size;
    std::string others;
    for (int r = 0; r < ranks.size; r++)
        if (!majority || hashes[r] != most->first) others += format(others.empty() ? "%d" : ", %d", r);
    throw Error(
        format("training: the ranks' weights differ after step %lld: %s. Nothing was saved; look for a bad GPU or "
               "network there and resume from the last checkpoint.",
               (long long)step,
               majority ? format("rank %s from the others", others.c_str()).c_str()
                        : format("ranks %s, and no majority tells which is wrong", others.c_str()).c_str()));
}

// Compares the ranks' weights where all ranks are between steps.
void check_weights(Model& m, int64_t step) {
    if (ranks.size == 1 || m.storage.cut_weights()) return;
    std::vector<unsigned long long> hashes(ranks.size);
    hash_weights(m);
    wait_for_device(m);
    CHECK(cudaMemcpy(hashes.data(), m.hashes, ranks.size * sizeof(hashes[0]), cudaMemcpyDeviceToHost));
    compare_hashes(hashes.data(), step);
}
