"""Tiny configs of the model families."""

from collections.abc import Callable
from typing import Any

import transformers as t

from tests.models.family_folders import Ids


def text(kind: str, size: int, ids: Ids, **more: Any) -> dict[str, Any]:
    """Config of a language model of two layers."""
    end, padding = ids("<|im_end|>"), ids("<|endoftext|>")
    return {
        "model_type": kind, "vocab_size": size, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
        "bos_token_id": None, "eos_token_id": end, "pad_token_id": padding, "initializer_range": 0.1,
    } | more  # fmt: skip


def text_only(kind: str, **more: Any) -> Callable[[int, Ids], Any]:
    """The config of a model without images, given the vocabulary's size and a function from a token to its id."""
    return lambda size, ids: t.CONFIG_MAPPING[kind](**text(kind, size, ids, **more))


def mistral(size: int, ids: Ids) -> dict[str, Any]:
    return text("mistral", size, ids, sliding_window=None)


def vision(**more: Any) -> dict[str, Any]:
    """Config of a vision tower of two layers for images of 56 pixels."""
    return {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
        "patch_size": 14, "initializer_range": 0.1,
    } | more  # fmt: skip


MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}


def _qwen_ids(ids: Ids) -> dict[str, int]:
    return {
        "image_token_id": ids("<|image_pad|>"), "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"), "vision_end_token_id": ids("<|vision_end|>"),
    }  # fmt: skip


def _qwen_vision(**more: Any) -> dict[str, Any]:
    return {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
        "initializer_range": 0.1,
    } | more  # fmt: skip


def qwen2_vl(size: int, ids: Ids) -> Any:
    picture = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "initializer_range": 0.1}
    return t.Qwen2VLConfig(
        text_config=text("qwen2_vl_text", size, ids, rope_parameters=MROPE), vision_config=picture, **_qwen_ids(ids)
    )


def qwen2_5_vl(size: int, ids: Ids) -> Any:
    words = text("qwen2_5_vl_text", size, ids, rope_parameters=MROPE)
    return t.Qwen2_5_VLConfig(
        text_config=words, vision_config=_qwen_vision(fullatt_block_indexes=[1]), tie_word_embeddings=True,
        **_qwen_ids(ids),
    )  # fmt: skip


def qwen2_5_omni_thinker(size: int, ids: Ids) -> Any:
    words = text("qwen2_5_omni_text", size, ids, rope_parameters=MROPE, tie_word_embeddings=True)
    sound = _audio_tower(output_dim=64, n_window=20)
    return t.Qwen2_5OmniThinkerConfig(
        text_config=words, vision_config=_qwen_vision(fullatt_block_indexes=[1]), audio_config=sound,
        audio_token_id=ids("<|AUDIO|>"), audio_start_token_id=ids("<|audio_bos|>"),
        audio_end_token_id=ids("<|audio_eos|>"), tie_word_embeddings=True, **_qwen_ids(ids),
    )  # fmt: skip


def qwen2_audio(size: int, ids: Ids) -> Any:
    sound = _audio_tower(model_type="qwen2_audio_encoder", max_source_positions=100)
    return t.Qwen2AudioConfig(
        text_config=text("qwen2", size, ids), audio_config=sound, audio_token_index=ids("<|AUDIO|>")
    )


def _audio_tower(**more: Any) -> dict[str, Any]:
    return {
        "num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "d_model": 32,
        "initializer_range": 0.1,
    } | more  # fmt: skip


def qwen3_vl(size: int, ids: Ids) -> Any:
    words = text("qwen3_vl_text", size, ids, rope_parameters=MROPE | {"mrope_interleaved": True})
    picture = _qwen_vision(patch_size=14, num_position_embeddings=16, deepstack_visual_indexes=[0, 1])
    return t.Qwen3VLConfig(text_config=words, vision_config=picture, **_qwen_ids(ids))


def qwen3_5(size: int, ids: Ids) -> Any:
    words = text(
        "qwen3_5_text", size, ids, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
        linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
        rope_parameters=MROPE | {"mrope_interleaved": True, "partial_rotary_factor": 1.0},
    )  # fmt: skip
    picture = _qwen_vision(patch_size=14, num_position_embeddings=16)
    return t.Qwen3_5Config(text_config=words, vision_config=picture, **_qwen_ids(ids))


def llava(size: int, ids: Ids) -> Any:
    picture = vision(model_type="clip_vision_model", projection_dim=32)
    return t.LlavaConfig(
        vision_config=picture, text_config=text("llama", size, ids), image_token_index=ids("<image>"),
        image_seq_length=16,
    )  # fmt: skip


def llava_next(size: int, ids: Ids) -> Any:
    picture = vision(model_type="clip_vision_model", projection_dim=32)
    return t.LlavaNextConfig(
        vision_config=picture, text_config=mistral(size, ids), image_token_index=ids("<image>"),
        image_seq_length=16, image_grid_pinpoints=[[56, 112], [112, 56]],
    )  # fmt: skip


def llava_onevision(size: int, ids: Ids) -> Any:
    return t.LlavaOnevisionConfig(
        vision_config=vision(model_type="siglip_vision_model", vision_use_head=False),
        text_config=text("qwen2", size, ids, tie_word_embeddings=True), image_token_index=ids("<image>"),
        video_token_index=ids("<video>"), image_grid_pinpoints=[[56, 112], [112, 56]],
    )  # fmt: skip


def internvl(size: int, ids: Ids) -> Any:
    picture = vision(model_type="internvl_vision", image_size=[56, 56], patch_size=[14, 14])
    return t.InternVLConfig(
        vision_config=picture, text_config=text("qwen2", size, ids), image_token_id=ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )  # fmt: skip


def idefics3(size: int, ids: Ids) -> Any:
    return t.Idefics3Config(
        vision_config=vision(), text_config=text("llama", size, ids), image_token_id=ids("<image>"), scale_factor=2
    )


def smolvlm(size: int, ids: Ids) -> Any:
    return t.SmolVLMConfig(
        vision_config=vision(), text_config=text("llama", size, ids), image_token_id=ids("<image>"), scale_factor=2
    )


def mistral3(size: int, ids: Ids) -> Any:
    return t.Mistral3Config(
        vision_config=vision(model_type="pixtral", head_dim=16), text_config=mistral(size, ids),
        image_token_index=ids("[IMG]"), spatial_merge_size=2,
    )  # fmt: skip


def pixtral(size: int, ids: Ids) -> Any:
    return t.LlavaConfig(
        vision_config=vision(model_type="pixtral", head_dim=16), text_config=mistral(size, ids),
        image_token_index=ids("[IMG]"), vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip


def gemma3(size: int, ids: Ids) -> Any:
    words = text(
        "gemma3_text", size, ids, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
        bos_token_id=ids("<bos>"), query_pre_attn_scalar=16,
    )  # fmt: skip
    return t.Gemma3Config(
        text_config=words, vision_config=vision(model_type="siglip_vision_model"), mm_tokens_per_image=4,
        boi_token_index=ids("<start_of_image>"), eoi_token_index=ids("<end_of_image>"),
        image_token_index=ids("<image_soft_token>"),
    )  # fmt: skip


def gemma3n(size: int, ids: Ids) -> Any:
    # the last four tokens: two of the vision tower's vocabulary, two of the audio tower's
    words = text(
        "gemma3n_text", size, ids, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2,
        bos_token_id=ids("<bos>"), num_hidden_layers=4, num_kv_shared_layers=2, vocab_size_per_layer_input=size - 4,
        hidden_size_per_layer_input=8, laurel_rank=4, altup_num_inputs=2,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
    )  # fmt: skip
    picture = {
        "hidden_size": 2048, "vocab_size": 2, "vocab_offset": size - 4,
        "model_args": {"channel_multiplier": 0.01, "msfa_output_resolution": 2},
    }  # fmt: skip
    sound = {
        "hidden_size": 32, "vocab_size": 2, "vocab_offset": size - 2, "input_feat_size": 16,
        "conf_num_attention_heads": 2, "conf_num_hidden_layers": 2, "sscp_conv_channel_size": [8, 4],
    }  # fmt: skip
    return t.Gemma3nConfig(
        text_config=words, vision_config=picture, audio_config=sound, vision_soft_tokens_per_image=4,
        boi_token_id=ids("<start_of_image>"), eoi_token_id=ids("<end_of_image>"),
        image_token_id=ids("<image_soft_token>"), boa_token_id=ids("<start_of_audio>"),
        eoa_token_id=ids("<end_of_audio>"), audio_token_id=ids("<audio_soft_token>"),
    )  # fmt: skip


def paligemma(kind: str, **more: Any) -> Any:
    def config(size: int, ids: Ids) -> Any:
        size += 1152  # the processor adds tokens of places and segments
        words = text(kind, size, ids, bos_token_id=ids("<bos>"), **more)
        return t.PaliGemmaConfig(
            text_config=words, vision_config=vision(model_type="siglip_vision_model", projection_dim=64),
            image_token_index=ids("<image>"), projection_dim=64, hidden_size=64, vocab_size=size,
        )  # fmt: skip

    return config


def minicpm(size: int, ids: Ids) -> Any:
    words = text(
        "qwen3_5_text", size, ids, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
        linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    )  # fmt: skip
    return t.MiniCPMV4_6Config(
        text_config=words, vision_config=vision(insert_layer_id=0), insert_layer_id=0, image_size=56,
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
    )  # fmt: skip


def molmo2(size: int, ids: Ids) -> Any:
    words = text("molmo2_text", size - 16, ids, additional_vocab_size=16)
    picture = vision(image_size=[56, 56], num_key_value_heads=2, head_dim=16, num_position_embeddings=16)
    adapter = {
        "vision_feature_layer": [-1], "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 16, "intermediate_size": 48, "text_hidden_size": 64, "initializer_range": 0.1,
    }  # fmt: skip
    return t.Molmo2Config(
        text_config=words, vision_config=picture, adapter_config=adapter, image_patch_id=ids("<im_patch>"),
        image_start_token_id=ids("<im_start>"), image_end_token_id=ids("<im_end>"),
        low_res_image_start_token_id=ids("<low_res_im_start>"), frame_start_token_id=ids("<frame_start>"),
        frame_end_token_id=ids("<frame_end>"),
    )  # fmt: skip


def lfm2_vl(size: int, ids: Ids) -> Any:
    words = text("lfm2", size, ids, layer_types=["conv", "full_attention"], block_multiple_of=32)
    return t.Lfm2VlConfig(
        text_config=words, vision_config=vision(model_type="siglip2_vision_model", num_patches=16),
        image_token_id=ids("<image>"), projector_hidden_size=48,
    )  # fmt: skip


def mllama(size: int, ids: Ids) -> Any:
    # the embeddings have eight more rows than the head; the image token, the last one, is one of them
    words = text(
        "mllama_text_model",
        size - 1,
        ids,
        bos_token_id=ids("<|begin_of_text|>"),
        num_hidden_layers=3,
        cross_attention_layers=[1],
    )
    words["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    picture = vision(num_global_layers=1, intermediate_layers_indices=[0, 1], vision_output_dim=96, attention_heads=2)
    picture.pop("num_attention_heads")
    return t.MllamaConfig(text_config=words, vision_config=picture, image_token_index=ids("<|image|>"))


def phi4_multimodal(size: int, ids: Ids) -> Any:
    words = text("phi4_multimodal", size, ids)
    words.pop("head_dim"), words.pop("model_type")
    sound = {
        "hidden_size": 32, "intermediate_size": 48, "num_blocks": 2, "num_attention_heads": 2, "input_size": 16,
        "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 8,
        "audio_token_id": ids("<|endoftext11|>"),
    }  # fmt: skip
    picture = vision(image_size=448, image_token_id=ids("<|endoftext10|>"))
    picture.pop("initializer_range")
    return t.Phi4MultimodalConfig(**words, vision_config=picture, audio_config=sound)
