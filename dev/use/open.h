// Weights opened for use: the model's shape and the tokenizer, as a checkpoint has them or the options say.
#pragma once
#include "../run/job.h"
#include "plan.h"

// The tokenizer that --tokenizer or else the checkpoint names. Eval does without one that is gone.
std::unique_ptr<Tokenizer> open_tokenizer(const Options& o, const Manifest& manifest) {
    const Json *name = manifest.json.find("tokenizer"), *hash = manifest.json.find("tokenizer_xxh64");
    const bool given = !o.tokenizer.empty();
    const std::string path = given ? o.tokenizer : name ? name->string : "";
    std::unique_ptr<Tokenizer> tokenizer;
    std::string trouble;
    if (path.empty()) return tokenizer;
    try {
        tokenizer.reset(new Tokenizer(Tokenizer::load(path)));
        if (hash && hash->string != tokenizer_hash(path)) trouble = path + ": is not the tokenizer that the run had.";
    } catch (const std::runtime_error& e) {
        trouble = e.what();
    }
    if (tokenizer && tokenizer->vocab_size() > o.config.V)
        throw Error(format("%s: has %d tokens, the model %d. Give the data's tokenizer with --tokenizer.", path.c_str(),
                           tokenizer->vocab_size(), o.config.V));
    if (trouble.empty()) return tokenizer;
    if (given ? !tokenizer : o.command == GENERATE)  // one that is given is taken, if it can be
        throw Error(trouble + " Give the data's tokenizer with --tokenizer.");
    warn(trouble + (given ? "" : " Without bits per byte; give the data's tokenizer with --tokenizer."));
    if (!given) tokenizer.reset();
    return tokenizer;
}

// Settles what runs: the model's shape and the tokenizer, as the checkpoint has them or the options say. Returns where
// the weights are.
std::string settle_weights(Options& o, std::unique_ptr<Tokenizer>& tokenizer) {
    Config& c = o.config;
    if (o.checkpoint.empty() == o.init_from.empty())
        throw Error(o.checkpoint.empty() ? "--checkpoint: is missing. Give the folder of a checkpoint or a run, or "
                                           "--init-from with the model's options."
                                         : "--init-from: --checkpoint has weights already. Leave one of them out.");
    if (o.checkpoint.empty()) {
        settle_model(o, tokenizer);
        return o.init_from;
    }
    if (!o.shape.empty()) throw Error(format("--%s: the checkpoint has its own. Leave it out.", o.shape[0]));
    std::string dir = find_weights(o.checkpoint);
    const Manifest manifest = read_manifest(dir);
    c = config_of(manifest, dir);
    for (auto& [key, value] : manifest.state.training) o.separate |= key == "documents" && value == "separate";
    if (o.seq_len && !c.gated() && o.seq_len > c.max_T)
        throw Error(format("--seq-len: the model has %d learned positions. Give at most that.", c.max_T));
    if (o.seq_len) c.T = o.seq_len;
    tokenizer = open_tokenizer(o, manifest);
    return dir;
}

// Memory and weights for what `m` plans; says on stderr what runs.
void open_weights(Model& m, const std::string& weights) {
    create_or_advise(m);
    import_weights(m, weights);
    fprintf(stderr, "%s: %s %s, %zu parameters, %s; memory %.1f MiB\n", weights.c_str(),
            BACKBONES[int(m.c.backbone)].c_str(), VARIANTS[int(m.c.variant)].c_str(), m.table.parameters, PRECISION,
            m.arena.used / 1048576.0);
}

void close_weights(Model& m) {
    destroy(m);
    matmul.close();
}
