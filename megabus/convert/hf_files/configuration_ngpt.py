"""transformers' configuration of a megabus nGPT. Goes with the weights; needs nothing but transformers."""

from transformers import PretrainedConfig


class NGPTConfig(PretrainedConfig):
    """Names follow LlamaConfig; alpha_init is the initial eigen learning rate, s_z_init the logits' initial scale:
    their gains act as raw * that * sqrt(hidden_size)."""

    model_type = "megabus_ngpt"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        rope_frequencies=None,
        alpha_init=0.05,
        s_z_init=1.0,
        max_position_embeddings=2048,
        use_cache=True,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.rope_frequencies = rope_frequencies or [10000.0 ** (-i / head_dim) for i in range(0, head_dim, 2)]
        self.alpha_init = alpha_init
        self.s_z_init = s_z_init
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
