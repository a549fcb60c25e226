"""SimpleGPT (arXiv 2602.01212) for Hugging Face's transformers: norms, variants and both backbones of the paper's runs.

    simplegpt   h = x + No Wo A(Nq Wq x, Nk Wk x, Nv Wv x)    y = h + N2 W2( silu(N1 W1 h) * (N3 W3 h) )
    prenorm     h = x + Wo A(Wq n, Wk n, Wv n), n = N(x)      y = h + W2( silu(W1 n) * (W3 n) ), n = N'(h)
    preqknorm   prenorm with a norm on the whole q row and on the whole k row, before RoPE
The nanogpt backbone has learned positions instead of RoPE, gelu(fc) and proj instead of w1, w3, w2, and the embedding
as its head. Tensors have the names of the paper's released code: a folder that save_pretrained writes is one from which
./train_gpt --init-from goes on. In shapes: B sequences, T tokens, C width, NH heads of HS, NKV key/value heads, S keys.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_simplegpt import SimpleGPTConfig

# keys and values of earlier tokens are `cache` to newer transformers, `past_key_values` to older ones
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class Norm(nn.Module):
    """g x / sqrt(mean(x^2) + eps) over a row; layernorm takes the row's mean off first"""

    def __init__(self, width, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.center = config.norm_eps, config.norm == "layernorm"

    def forward(self, x):
        y = x.float()
        if self.center:
            y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * y).type_as(x)


class SimpleNorm(nn.Module):
    """Psi(x) = Norm(W x)"""

    def __init__(self, inputs, outputs, config):
        super().__init__()
        self.lin = nn.Linear(inputs, outputs, bias=False)
        self.norm = Norm(outputs, config)

    def forward(self, x):
        return self.norm(self.lin(x))


def linear(inputs, outputs, config):
    if config.variant == "simplegpt":
        return SimpleNorm(inputs, outputs, config)
    return nn.Linear(inputs, outputs, bias=False)


def angles(positions, config):
    """cos and sin (B,1,T,HS/2) of position theta^(-2i/HS); scaled, of Llama 3.1's frequencies"""
    i = torch.arange(0, config.head_dim, 2, device=positions.device).float()
    frequency = config.rope_theta ** (-i / config.head_dim)
    if config.rope_llama3:
        factor, low, high, original = config.rope_llama3
        kept = ((original * frequency / (2 * torch.pi) - low) / (high - low)).clamp(0, 1)
        frequency = (1 - kept) * frequency / factor + kept * frequency
    turn = positions[:, None, :, None].float() * frequency
    return turn.cos(), turn.sin()


def rotate(x, turn):
    """RoPE: the neighbours (2i, 2i+1) of each head turned by angle i. x (B,H,T,HS)"""
    cos, sin = turn
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).type_as(x)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.group = config.num_attention_heads // config.num_key_value_heads  # query heads that share a key/value head
        prefix = "" if config.backbone == "nanogpt" else "sn" if config.variant == "simplegpt" else "w"
        self.names = [prefix + name for name in "qkvo"]
        C, KV = config.hidden_size, config.num_key_value_heads * config.head_dim
        for name, outputs in zip(self.names, (C, KV, KV, C)):
            setattr(self, name, linear(C, outputs, config))
        self.qk_norm = config.variant == "preqknorm"
        if self.qk_norm:
            self.q_norm, self.k_norm = Norm(C, config), Norm(KV, config)

    def attention(self, x, mask, turn, cache, slots):
        wq, wk, wv, wo = (getattr(self, name) for name in self.names)
        q, k, v = wq(x), wk(x), wv(x)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))  # (B,H,T,HS)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        if cache is not None:
            k, v = cache.update(k, v, self.layer, {"cache_position": slots})  # (B,NKV,S,HS), of all tokens so far
        k, v = (t.repeat_interleave(self.group, 1) for t in (k, v))
        mask = F.pad(mask, (0, k.shape[2] - mask.shape[3]))  # a cache of fixed size has room behind the tokens
        return wo(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))

    forward = attention


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        prefix = "sn" if config.variant == "simplegpt" else "w"
        self.names = [prefix + name for name in "123"]
        C, H = config.hidden_size, config.intermediate_size
        for name, (inputs, outputs) in zip(self.names, ((C, H), (H, C), (C, H))):
            setattr(self, name, linear(inputs, outputs, config))

    def forward(self, x):
        w1, w2, w3 = (getattr(self, name) for name in self.names)
        return w2(F.silu(w1(x)) * w3(x))


class LlamaBlock(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attention, self.feed_forward = Attention(config, layer), FeedForward(config)
        self.pre = config.variant != "simplegpt"
        if self.pre:
            self.attention_norm, self.ffn_norm = Norm(config.hidden_size, config), Norm(config.hidden_size, config)

    def forward(self, x, mask, turn, cache, slots):
        h = x + self.attention(self.attention_norm(x) if self.pre else x, mask, turn, cache, slots)
        return h + self.feed_forward(self.ffn_norm(h) if self.pre else h)


class NanoBlock(Attention):
    """nanogpt's tensors lie flat in the layer"""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.pre = config.variant != "simplegpt"
        if self.pre:
            self.norm1, self.norm2 = Norm(config.hidden_size, config), Norm(config.hidden_size, config)
        self.fc = linear(config.hidden_size, config.intermediate_size, config)
        self.proj = linear(config.intermediate_size, config.hidden_size, config)

    def forward(self, x, mask, turn, cache, slots):
        h = x + self.attention(self.norm1(x) if self.pre else x, mask, turn, cache, slots)
        return h + self.proj(F.gelu(self.fc(self.norm2(h) if self.pre else h)))


class SimpleGPTForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = SimpleGPTConfig
    base_model_prefix = ""
    _no_split_modules = ["LlamaBlock", "NanoBlock"]
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.llama = config.backbone == "llama"
        V, C = config.vocab_size, config.hidden_size
        if self.llama:
            self.tok_embeddings = nn.Embedding(V, C)
            self.output = nn.Linear(C, V, bias=False)
        else:
            self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(config.max_position_embeddings, C)
        block = LlamaBlock if self.llama else NanoBlock
        self.layers = nn.ModuleList([block(config, i) for i in range(config.num_hidden_layers)])
        self.norm = Norm(C, config)
        self.post_init()

    def _init_weights(self, module):  # of what a checkpoint lacks
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0, self.config.initializer_range)
        elif isinstance(module, Norm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self):
        return self.tok_embeddings if self.llama else self.wte

    def set_input_embeddings(self, value):
        setattr(self, "tok_embeddings" if self.llama else "wte", value)

    def get_output_embeddings(self):
        return self.output if self.llama else None

    def set_output_embeddings(self, value):
        self.output = value

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=None, cache=None, logits_to_keep=0, return_dict=None, **kwargs):
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        B, T, _ = x.shape
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache) and labels is None:
            cache = DynamicCache()
        past = int(cache.get_seq_length()) if cache is not None else 0
        slots = torch.arange(past, past + T, device=x.device)  # of these tokens among the S keys
        positions = slots[None].expand(B, T) if position_ids is None else position_ids
        mask = self.mask(attention_mask, slots, past + T)
        if not self.llama:
            x = x + self.wpe(positions)
        turn = angles(positions, self.config) if self.llama else None
        for layer in self.layers:
            x = layer(x, mask, turn, cache, slots)
        x = self.norm(x)
        x = x[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else x[:, logits_to_keep]
        logits = F.linear(x, (self.output if self.llama else self.wte).weight)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
        return result.to_tuple() if return_dict is False else result

    @staticmethod
    def mask(attention_mask, slots, S):
        """(B or 1,1,T,S), true where a token looks: at itself and what is before it, but not at padding"""
        if attention_mask is not None and attention_mask.dim() == 4:  # made by generate
            return attention_mask
        keys = torch.arange(S, device=slots.device)
        seen = (keys <= slots[:, None])[None, None]
        if attention_mask is not None:
            # padding sees itself, for a row without keys would be NaN
            seen = seen & attention_mask[:, None, None, :S].bool() | (keys == slots[:, None])
        return seen
