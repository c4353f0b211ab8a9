"""Small configurations of transformers, by what the models call their sizes."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

SMALL: Config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
WORDS: Config = {
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
BERT: Config = SMALL | WORDS
DISTILBERT: Config = WORDS | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
DEBERTA: Config = BERT | {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "max_relative_positions": 16,
}
MOBILEBERT: Config = BERT | {"embedding_size": 16, "true_hidden_size": 24, "intra_bottleneck_size": 24}
XLNET: Config = {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
FUNNEL: Config = XLNET | {"block_sizes": [1, 1, 1], "d_head": 8, "num_decoder_layers": 1}

LLM: Config = BERT | {"num_key_value_heads": 2, "head_dim": 8, "use_cache": False}
GPT: Config = WORDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "use_cache": False}
GPT_NEO: Config = BERT | {
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 4,
    "use_cache": False,
}
MPT: Config = WORDS | {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "use_cache": False}
# Grouped matrix products exist in float32 alone.
EXPERTS: Config = LLM | {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "experts_implementation": "eager",
}
MAMBA: Config = BERT | {"state_size": 4, "use_cache": False}
MAMBA2: Config = MAMBA | {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4}

T5: Config = WORDS | {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_experts": 2,
    "use_cache": False,
    "decoder_start_token_id": 0,
}
SEQ: Config = WORDS | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "use_cache": False,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
WHISPER: Config = SEQ | {"max_source_positions": 30, "max_target_positions": 32, "num_mel_bins": 16}
SPEECH: Config = SEQ | {
    "max_source_positions": 64,
    "max_target_positions": 32,
    "conv_channels": 16,
    "num_conv_layers": 2,
    "input_feat_per_channel": 16,
}
WAV: Config = BERT | {
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 3, 2),
    "conv_kernel": (10, 3, 3),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,  # numpy would choose the steps to mask
}
SPECTROGRAM: Config = SMALL | {
    "num_mel_bins": 16,
    "max_length": 24,
    "patch_size": 8,
    "frequency_stride": 8,
    "time_stride": 8,
}

PATCHES: Config = SMALL | {"image_size": 32, "patch_size": 8}
MAE: Config = PATCHES | {
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 32,
}
STAGES: Config = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 24, 32, 48]}
HEADS: Config = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 2, 4]}
SWIFTFORMER: Config = {"depths": [1, 1, 1, 1], "embed_dims": [16, 24, 32, 48]}
SWIN: Config = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
SWIN2SR: Config = {
    "image_size": 16,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
    "upscale": 2,
}
LEVIT: Config = {
    "image_size": 64,
    "hidden_sizes": [32, 48, 64],
    "num_attention_heads": [2, 2, 2],
    "depths": [1, 1, 1],
    "key_dim": [8, 8, 8],
}
FOCALNET: Config = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 1],
    "focal_levels": [2, 2],
    "focal_windows": [3, 3],
}
HIERA: Config = {
    "image_size": [32, 32],
    "embed_dim": 16,
    "depths": [1, 1, 1],
    "num_heads": [1, 2, 4],
    "patch_stride": [2, 2],
    "masked_unit_size": [4, 4],
    "num_query_pool": 2,
}
MOBILEVIT: Config = {
    "hidden_sizes": [24, 32, 40],
    "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
    "num_attention_heads": 2,
}
DPT: Config = PATCHES | {
    "num_hidden_layers": 4,
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [8, 8, 16, 16],
    "fusion_hidden_size": 16,
}
DETR: Config = SEQ | {
    "num_queries": 5,
    "backbone_config": STAGES | {"model_type": "resnet", "embedding_size": 16, "out_features": ["stage4"]},
}
CLIP: Config = {"text_config": BERT, "vision_config": PATCHES}
BLIP: Config = CLIP | {"text_config": BERT | {"encoder_hidden_size": 32}, "image_text_hidden_size": 16}
PATCHTST: Config = {
    "num_input_channels": 3,
    "context_length": 32,
    "prediction_length": 4,
    "patch_length": 8,
    "patch_stride": 8,
    "d_model": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "ffn_dim": 24,
    "loss": "mse",
}
