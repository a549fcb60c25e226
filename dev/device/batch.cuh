// What the host makes of a batch's tokens, for kernels that need to know where they are.
#pragma once
#include <algorithm>
#include <vector>

#include "base.cuh"

// The places of each token that occurs, made on the host, where the tokens come from: with it a block sums all rows of
// one token in order, and no atomics are needed.
struct TokenPlaces {
    std::vector<int> places;  // (N) positions n, sorted by token, then by n
    std::vector<int> begin;   // (U+1) where the u-th token's places begin
};

TokenPlaces token_places(const int* tokens, int N) {
    TokenPlaces p;
    p.places.resize(N);
    for (int n = 0; n < N; n++) p.places[n] = n;
    std::stable_sort(p.places.begin(), p.places.end(), [&](int a, int b) { return tokens[a] < tokens[b]; });
    for (int i = 0; i < N; i++)
        if (i == 0 || tokens[p.places[i]] != tokens[p.places[i - 1]]) p.begin.push_back(i);
    p.begin.push_back(N);
    return p;
}

// The spans of a batch's tokens (B,T): a document begins with `bos`, or where the sequence begins.
inline void document_spans(int2* spans, const int* tokens, int B, int T, int bos) {
    for (int b = 0; b < B; b++, spans += T, tokens += T)
        for (int first = 0, end; first < T; first = end) {
            for (end = first + 1; end < T && tokens[end] != bos;) end++;
            for (int t = first; t < end; t++) spans[t] = make_int2(first, end);
        }
}
