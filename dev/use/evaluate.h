// Evaluation: validation loss, and questions of multiple choice.
#pragma once
#include <numeric>

#include "open.h"

struct Validation {
    double nats = 0;  // sum of the losses of all targets
    uint64_t tokens = 0, bytes = 0;
};

// Over the first `windows` windows of the data, read one at a time, evaluated m.B at a time. Bytes: of the text that
// the targets stand for, of which BOS and EOS are none; with a tokenizer only.
Validation validation(Model& m, DataLoader& data, uint64_t windows, const Tokenizer* tokenizer) {
    const int T = m.c.T;
    Validation v;
    std::vector<int32_t> batch;
    for (uint64_t done = 0; done < windows;) {
        const int rows = int(std::min<uint64_t>(m.B, windows - done));
        batch.clear();
        for (int r = 0; r < rows; r++) {
            const int32_t* window = data.next();
            batch.insert(batch.end(), window, window + T + 1);
            for (int t = 1; tokenizer && t <= T; t++)
                v.bytes += tokenizer->text_bytes(window[t], window[t - 1] == tokenizer->bos());
        }
        v.nats += double(evaluate(m, batch.data(), rows, T)) * rows * T;
        v.tokens += uint64_t(rows) * T;
        done += rows;
    }
    return v;
}

// A question: which of several texts goes on behind a context.
struct Question {
    int label;  // of the right one
    std::vector<int> context;
    std::vector<std::vector<int>> choices;
};

// Questions from a file of dev/data/hellaswag.py, little-endian int32: 256 of header (magic 20261125, version 1, number
// of questions, vocabulary size, number of int32 that follow), then for each K, label, n0, n1 .. nK, the n0 ids of the
// context and the ids of the K choices. Ids are below V; a choice fits into T tokens.
std::vector<Question> read_questions(const std::string& path, int V, int T) {
    const std::string bytes = read_file(path);
    auto fail = [&](const std::string& what) {
        throw Error(path + ": " + what + ". Make it again (dev/data/hellaswag.py).");
    };
    std::vector<int32_t> all(bytes.size() / 4);
    if (!all.empty()) memcpy(all.data(), bytes.data(), all.size() * 4);
    if (all.empty() || all[0] != 20261125) fail("is no file of questions");
    if (all.size() < 256 || bytes.size() % 4) fail("was cut short");
    if (all[1] != 1) fail(format("has version %d, known is 1", all[1]));
    if (all[3] > V) fail(format("is for a vocabulary of %d, the model has %d", all[3], V));
    if (all[4] != int64_t(all.size()) - 256)
        fail(format("header promises %d numbers, the file holds %zu", all[4], all.size() - 256));
    if (all[2] < 1) fail(format("header promises %d questions", all[2]));
    size_t at = 256;
    std::vector<Question> questions;
    for (int i = 0; i < all[2]; i++) {
        const std::string name = format("question %d", i + 1);
        // n numbers from least to most
        auto take = [&](int64_t n, int least, int most, const char* what) {
            if (n > int64_t(all.size() - at)) fail(name + " is cut short");
            for (size_t j = at; j < at + n; j++)
                if (all[j] < least || all[j] > most)
                    fail(name + format(": %s %d is not in %d..%d", what, all[j], least, most));
            at += n;
            return std::vector<int>(all.begin() + (at - n), all.begin() + at);
        };
        Question q;
        const int K = take(1, 2, INT_MAX, "number of choices")[0];
        q.label = take(1, 0, K - 1, "label")[0];
        const std::vector<int> lengths = take(int64_t(K) + 1, 1, INT_MAX, "length");
        q.context = take(lengths[0], 0, V - 1, "id");
        for (int k = 1; k <= K; k++) {
            q.choices.push_back(take(lengths[k], 0, V - 1, "id"));
            if (lengths[k] > T)
                throw Error(path + ": " + name +
                            format(" has a choice of %d tokens, the context is %d. Make it longer.", lengths[k], T));
        }
        questions.push_back(std::move(q));
    }
    if (at < all.size()) fail(format("%zu numbers follow the last question", all.size() - at));
    return questions;
}

// log p of each choice given its context, the sum over its tokens; one after another, as they stand in the questions. A
// context that does not fit into T is cut from the left. Texts of like length are run together, as many as the model
// has memory for, the shorter ones filled up behind their end, which what stands before does not see.
std::vector<double> log_likelihoods(Model& m, const std::vector<Question>& questions) {
    struct Text {
        const Question* q;
        const std::vector<int>* choice;
        size_t inputs;  // tokens that are run: all but the last
    };
    std::vector<Text> texts;
    for (const Question& q : questions)
        for (const std::vector<int>& choice : q.choices)
            texts.push_back({&q, &choice, std::min<size_t>(q.context.size() + choice.size() - 1, m.c.T)});
    std::vector<size_t> order(texts.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return texts[a].inputs > texts[b].inputs; });
    std::vector<double> scores(texts.size());
    for (size_t done = 0, rows; done < order.size(); done += rows) {
        const size_t T = texts[order[done]].inputs;  // the longest of those that are left
        rows = std::min(order.size() - done, m.N() / T);
        std::vector<int32_t> windows(rows * (T + 1), 0);
        for (size_t r = 0; r < rows; r++) {
            const Text& text = texts[order[done + r]];
            const size_t kept = text.inputs + 1 - text.choice->size();  // of the context
            auto to = std::copy(text.q->context.end() - kept, text.q->context.end(), &windows[r * (T + 1)]);
            std::copy(text.choice->begin(), text.choice->end(), to);
        }
        evaluate(m, windows.data(), int(rows), int(T));
        const std::vector<float> losses = get_floats(Flat(m.losses), 0, rows * T);
        for (size_t r = 0; r < rows; r++) {
            const Text& text = texts[order[done + r]];
            for (size_t t = text.inputs - text.choice->size(); t < text.inputs; t++)
                scores[order[done + r]] -= losses[r * T + t];
        }
    }
    return scores;
}

// Share of the questions whose right choice has the highest score, of equal ones the first; length(choice) divides.
template <typename F>
double accuracy(const std::vector<Question>& questions, const std::vector<double>& scores, F length) {
    size_t at = 0, right = 0;
    for (const Question& q : questions) {
        std::vector<double> score;
        for (const std::vector<int>& choice : q.choices) score.push_back(scores[at++] / length(choice));
        for (double x : score)
            if (!std::isfinite(x)) return NAN;  // else the first choice would be the highest
        right += std::max_element(score.begin(), score.end()) - score.begin() == q.label;
    }
    return double(right) / double(questions.size());
}

// `train_gpt eval`: a line of JSON on stdout, the same for people on stderr.
void run_eval(Options& o) {
    std::unique_ptr<Tokenizer> tokenizer;
    if (o.val_data.empty() && o.choices.empty())
        throw Error("--val-data: is missing, and so is --choices. Give what to evaluate on.");
    if (o.val_batches > 0 && o.val_data.empty()) throw Error("--val-batches: needs --val-data. Give it.");
    if (!o.batch_size) throw Error("--batch-size: auto is for training. Give a number.");
    const std::string weights = settle_weights(o, tokenizer);
    const Config& c = o.config;
    std::unique_ptr<DataLoader> data;
    if (!o.val_data.empty()) data.reset(new DataLoader(o.val_data, 1, c.T, c.V));
    std::vector<Question> questions;
    if (!o.choices.empty()) questions = read_questions(o.choices, c.V, c.T);
    Model m;
    const Gpu gpu = open_device();
    as_options([&] { plan(m, gpu, c, o.batch_size, false); });
    open_weights(m, weights);
    std::string json = "{\"weights\": " + json_text(weights) + format(", \"seq_len\": %d", c.T);
    auto put = [&](const char* key, double value) { json += format(", \"%s\": ", key) + json_number(value); };
    if (data) {
        uint64_t windows = data->windows();
        if (o.val_batches > 0) windows = std::min(windows, uint64_t(o.val_batches) * m.B);
        if (o.separate && !tokenizer)
            warn(weights + ": was trained with --documents separate, which takes a tokenizer. They are joined here.");
        if (o.separate && tokenizer) m.storage.bos = tokenizer->bos();
        const Validation v = validation(m, *data, windows, tokenizer.get());
        m.storage.bos = -1;
        const double loss = v.nats / double(v.tokens);
        json += format(", \"tokens\": %llu", (unsigned long long)v.tokens);
        put("loss", loss), put("perplexity", exp(loss));
        fprintf(stderr, "validation: loss %.4f nats a token, perplexity %.4g, %llu tokens", loss, exp(loss),
                (unsigned long long)v.tokens);
        if (tokenizer) {
            const double bits = v.nats / log(2.0) / double(v.bytes);
            json += format(", \"bytes\": %llu", (unsigned long long)v.bytes);
            put("bits_per_byte", bits);
            fprintf(stderr, "; %.4f bits a byte, %llu bytes", bits, (unsigned long long)v.bytes);
        }
        fprintf(stderr, "\n");
    }
    if (!questions.empty()) {
        const std::vector<double> scores = log_likelihoods(m, questions);
        const double n = double(questions.size());
        json += format(", \"questions\": %zu", questions.size());
        fprintf(stderr, "choices: %zu questions", questions.size());
        auto report = [&](const std::string& key, const char* name, auto length) {
            const double a = accuracy(questions, scores, length), error = sqrt(a * (1 - a) / (n - 1));
            put(key.c_str(), a), put((key + "_stderr").c_str(), error);
            fprintf(stderr, "; %s %.4f%s", name, a, n > 1 ? format(" +- %.4f", error).c_str() : "");
        };
        using Ids = std::vector<int>;
        report("acc", "accuracy", [](const Ids&) { return 1.0; });
        report("acc_per_token", "by tokens", [](const Ids& ids) { return double(ids.size()); });
        if (tokenizer)
            report("acc_per_byte", "by bytes", [&](const Ids& ids) {
                const std::string text = tokenizer->decode(ids);
                return std::max(1.0, double(text.size()) - (text[0] == ' '));
            });
        fprintf(stderr, "\n");
    }
    put_text(json + "}\n");
    close_weights(m);
}
