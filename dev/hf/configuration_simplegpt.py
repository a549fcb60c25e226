"""Configuration of modeling_simplegpt.py."""
from transformers import PretrainedConfig


class SimpleGPTConfig(PretrainedConfig):
    model_type = "simplegpt"

    def __init__(self, backbone="llama", variant="simplegpt", norm="rmsnorm", vocab_size=32000, hidden_size=256,
                 intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=None,
                 head_dim=None, max_position_embeddings=1024, rope_theta=1e4, rope_llama3=None, norm_eps=1e-5,
                 initializer_range=0.02, use_cache=True, bos_token_id=None, eos_token_id=None, pad_token_id=None,
                 tie_word_embeddings=False, **more):
        self.backbone = backbone  # llama: RoPE, SwiGLU, own head; nanogpt: learned positions, GELU, tied head
        self.variant = variant    # simplegpt, prenorm, preqknorm
        self.norm = norm          # rmsnorm, layernorm (without bias)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.rope_llama3 = rope_llama3  # None, or of scaled RoPE: factor, low and high frequency factor, positions
        self.norm_eps = norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        # the model ties its own head where it has none; transformers has nothing to tie
        super().__init__(bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id,
                         tie_word_embeddings=tie_word_embeddings, **more)
