// How a token is drawn from logits.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

// How the next token is drawn: the logits are divided by the temperature (0: the likeliest is taken), the top_k
// likeliest tokens stay (0: all), of them the fewest likeliest that have top_p of their probability together.
struct Sampling {
    float temperature = 0.8f;
    int top_k = 50;
    float top_p = 1.0f;
};

struct Candidate {
    int id;
    float logit;
    double p;
};

// The tokens that may come next, with probabilities that sum to 1, of equal logits the lower id first; logits (V),
// finite.
inline std::vector<Candidate> candidates(const float* logits, int V, const Sampling& s) {
    auto likelier = [](const Candidate& a, const Candidate& b) {
        return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
    };
    std::vector<Candidate> all(V);
    for (int v = 0; v < V; v++) all[v] = {v, logits[v], 1.0};
    if (s.temperature == 0.0f) return {*std::min_element(all.begin(), all.end(), likelier)};
    if (s.top_k > 0 && s.top_k < V) {
        std::partial_sort(all.begin(), all.begin() + s.top_k, all.end(), likelier);
        all.resize(s.top_k);
    }
    const double top = std::min_element(all.begin(), all.end(), likelier)->logit;
    double sum = 0.0, mass = 0.0;
    for (Candidate& c : all) sum += c.p = exp((c.logit - top) / s.temperature);
    for (Candidate& c : all) c.p /= sum;
    if (s.top_p >= 1.0f) return all;
    // those below this have less than 1 - top_p together, so they are not needed: few are left to sort
    const double least = (1.0 - s.top_p) / double(all.size());
    all.erase(std::partition(all.begin(), all.end(), [&](const Candidate& c) { return c.p >= least; }), all.end());
    std::sort(all.begin(), all.end(), likelier);
    size_t n = 0;
    while (n < all.size() && mass < s.top_p) mass += all[n++].p;
    all.resize(n);
    for (Candidate& c : all) c.p /= mass;
    return all;
}

// The one where the sum of the probabilities passes u, 0 < u < 1.
inline int draw(const std::vector<Candidate>& all, double u) {
    for (const Candidate& c : all)
        if ((u -= c.p) <= 0.0) return c.id;
    return all.back().id;
}
