// Generation: the text that a model writes on, a token at a time over a cache of keys and values.
#pragma once
#include "open.h"
#include "sampling.h"

// Runs T tokens of each of B sequences, tokens (B,T), behind the m.past ones in the cache, if it is in use.
void forward_tokens(Model& m, const int* tokens, int B, int T) {
    CHECK(cudaMemcpyAsync(m.tokens, tokens, size_t(B) * T * sizeof(int), cudaMemcpyHostToDevice, m.gpu.stream));
    forward(m, B, T);
}

// Logits (rows,V) of `rows` rows of m.normed from row0 on.
std::vector<float> get_logits(Model& m, size_t row0, int rows) {
    const size_t V = m.c.V, Vp = m.c.Vp();
    std::vector<float> logits(rows * V);
    std::vector<floatX> raw(std::min(rows, m.logit_rows) * Vp);
    for (int done = 0; done < rows; done += m.logit_rows) {
        const int count = std::min(rows - done, m.logit_rows);
        head_forward(m, row0 + done, count);
        CHECK(cudaMemcpyAsync(raw.data(), m.logits, count * Vp * sizeof(floatX), cudaMemcpyDeviceToHost, m.gpu.stream));
        CHECK(cudaStreamSynchronize(m.gpu.stream));
        for (int r = 0; r < count; r++) std::copy_n(&raw[r * Vp], V, &logits[(done + r) * V]);
    }
    return logits;
}

// While it lives the layers' keys and values are the cache's: forward() puts those of its tokens behind the m.past rows
// that are there.
struct UseCache {
    Model& m;
    std::vector<std::pair<floatX*, floatX*>> own;  // k and v of each layer
    explicit UseCache(Model& m) : m(m) {
        const size_t layer = size_t(m.cache.sequences) * m.c.NKV * m.cache.room * m.c.HS();
        for (LayerActivations& a : m.acts) {
            const size_t at = own.size() * layer;
            own.push_back({a.k, a.v});
            a.k = m.cache.k + at, a.v = m.cache.v + at;
        }
        m.past = 0, m.room = m.cache.room;
    }
    ~UseCache() {
        for (size_t l = 0; l < own.size(); l++) m.acts[l].k = own[l].first, m.acts[l].v = own[l].second;
        m.past = 0, m.room = 0;
    }
    UseCache(const UseCache&) = delete;

    // the first sequence's rows, to all others
    void share() {
        const size_t one = size_t(m.c.NKV) * m.cache.room * m.c.HS();
        for (const LayerActivations& a : m.acts)
            for (floatX* rows : {a.k, a.v})
                for (int b = 1; b < m.cache.sequences; b++)
                    CHECK(cudaMemcpyAsync(rows + b * one, rows, one * sizeof(floatX), cudaMemcpyDeviceToDevice,
                                          m.gpu.stream));
    }
};

// Writes m.cache.sequences texts on from one prompt, n tokens each or up to and with `eos`: the prompt in one forward,
// then a token of each at a time. Calls got(sequence, token) for each token as it comes. Sequence b draws its token i
// with random number i of stream 1 + b. The cache has room for all but the last token. False: logits are not finite.
template <typename F>
bool generate(Model& m, const std::vector<int>& prompt, int n, int vocabulary, const Sampling& s, uint64_t seed,
              int eos, F got) {
    const int B = m.cache.sequences, P = int(prompt.size());
    std::vector<int> last(B, eos);
    std::vector<bool> ended(B);
    UseCache cache(m);
    forward_tokens(m, prompt.data(), 1, P);
    std::vector<float> logits = get_logits(m, P - 1, 1);
    cache.share();
    m.past = P;
    for (int i = 0;; i++) {
        if (!all_finite(logits)) return false;
        for (int b = 0; b < B; b++) {
            if (ended[b]) continue;  // it goes on as ballast
            const float* row = &logits[i > 0 ? size_t(b) * m.c.V : 0];
            last[b] = draw(candidates(row, vocabulary, s), random_uniform(seed, 1 + b, i));
            ended[b] = last[b] == eos;
            got(b, last[b]);
        }
        if (i + 1 >= n || std::all_of(ended.begin(), ended.end(), [](bool e) { return e; })) return true;
        forward_tokens(m, last.data(), B, 1);
        logits = get_logits(m, 0, B);
        m.past++;
    }
}

// A sample of a model in training, on the terminal. Every rank runs as many tokens, whatever it draws: with weights
// that are cut, a forward is a collective.
void print_sample(Model& m, const Tokenizer& tokenizer, const Options& o, int64_t step) {
    std::vector<int> prompt = tokenizer.encode(o.prompt), drawn;
    prompt.insert(prompt.begin(), tokenizer.bos());
    if (int(prompt.size()) > m.c.T) prompt.erase(prompt.begin(), prompt.end() - m.c.T);
    const int n = std::min(o.sample_tokens, m.c.T - int(prompt.size()) + 1);
    generate(m, prompt, n, tokenizer.vocab_size(), Sampling(), o.seed + uint64_t(step), -1,
             [&](int, int id) { drawn.push_back(id); });
    std::vector<int> text(prompt.begin() + (prompt[0] == tokenizer.bos()), prompt.end());
    text.insert(text.end(), drawn.begin(), std::find(drawn.begin(), drawn.end(), tokenizer.eos()));
    printf("--- sample at step %lld\n%s\n---\n", (long long)step, tokenizer.decode(text).c_str());
}

// `train_gpt generate`: text on stdout, all else on stderr.
void run_generate(Options& o) {
    std::unique_ptr<Tokenizer> tokenizer;
    if (!o.prompt.empty() && !o.prompt_file.empty())
        throw Error("--prompt-file: --prompt is the prompt already. Leave one of them out.");
    if (o.sampling.temperature == 0.0f && o.num_samples > 1)
        throw Error(
            "--num-samples: at --temperature 0 all texts are the same. Leave it out, or raise the temperature.");
    const std::string weights = settle_weights(o, tokenizer);
    if (!tokenizer)
        throw Error(weights + ": does not say which tokenizer its data had. Add --tokenizer bytes or its file.");
    const std::string text = o.prompt_file.empty() ? o.prompt : read_file(o.prompt_file, true);
    const std::vector<int> encoded = tokenizer->encode(text);
    std::vector<int> prompt = {tokenizer->bos()};
    prompt.insert(prompt.end(), encoded.begin(), encoded.end());
    const int P = int(prompt.size()), T = o.config.T, B = o.num_samples;
    if (P > T)
        throw Error(format("--prompt: has %d tokens with BOS, the context %d. Shorten it%s.", P, T,
                           o.config.gated() ? ", or raise --seq-len" : ""));
    const int n = std::min(o.max_tokens, T - P + 1);  // the last one is not run

    Model m;
    m.cache.sequences = B, m.cache.room = P + n - 1;
    Config c = o.config;
    c.T = m.cache.room;  // tables and activations need no more
    const Gpu gpu = open_device();
    // a forward has at most max(prompt, texts) rows, which so many sequences of c.T hold
    as_options([&] { plan(m, gpu, c, ceil_div(B, c.T), false); });
    open_weights(m, weights);

    // the first text as it comes, the others when it is complete
    std::vector<std::string> texts(B);
    std::vector<Tokenizer::Stream> streams(B, Tokenizer::Stream(*tokenizer));
    for (int b = 0; b < B; b++)
        for (int id : prompt) streams[b].put(id, texts[b]);
    put_text(texts[0]);
    const double begin = now();
    double first = 0.0;
    int written = 0, ends = 0;
    auto got = [&](int b, int id) {
        if (!written++) first = now();
        ends += id == tokenizer->eos();
        if (b == 0) texts[0].clear();
        streams[b].put(id, texts[b]);
        if (b == 0) put_text(texts[0]);
    };
    if (!generate(m, prompt, n, tokenizer->vocab_size(), o.sampling, o.seed, tokenizer->eos(), got))
        throw Error("generate: the model's logits are not finite. Take an earlier checkpoint.");
    const double end = now();
    texts[0].clear();
    for (int b = 0; b < B; b++) {
        streams[b].end(texts[b]);
        put_text((b ? "---\n" : "") + texts[b] + "\n");
    }
    fprintf(stderr, "prompt: %d tokens in %.3f s, %.0f tokens/s; text: %d tokens", P, first - begin,
            P / (first - begin), written);
    if (written > B)
        fprintf(stderr, ", %.1f tokens/s", (written - B) / (end - first));  // the first of each came at once
    if (ends < B)
        fprintf(stderr, "; cut off %s",
                n < o.max_tokens ? format("at the end of the context of %d", T).c_str() : "at --max-tokens");
    fprintf(stderr, "\n");
    close_weights(m);
}
