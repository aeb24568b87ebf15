"""The tiny model of each family of `distill/models/families.py`, by `model_type`."""

from typing import Any

from tests.models import family_configs as configs
from tests.models.family_folders import TinyFamily

QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def _processor(
    name: str,
    image: str,
    video: str = "",
    *,
    options: dict[str, Any] | None = None,
    frames: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    parts: dict[str, Any] = {"processor_class": name, "image_processor": {"image_processor_type": image} | settings}
    if video:
        parts["video_processor"] = {"video_processor_type": video} | (frames or {})
    return parts | (options or {})


SQUARE = {"height": 56, "width": 56}
CROP = {"size": {"shortest_edge": 56}, "crop_size": SQUARE}
PATCHES = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
QWEN_IMAGES = {"patch_size": 14, "size": {"shortest_edge": 784, "longest_edge": 3136}}
QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
WHISPER = {
    "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 16, "chunk_length": 2,
    "return_attention_mask": True,
}  # fmt: skip
AUDIO_TOKENS = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "audio_token": "<|AUDIO|>",
    "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
}  # fmt: skip
QWEN_FRAMES = {"size": {"shortest_edge": 784, "longest_edge": 50176}}
QWEN_VISION = ("Qwen2VLImageProcessor", "Qwen2VLVideoProcessor")
OMNI = _processor("Qwen2_5OmniProcessor", *QWEN_VISION, options={"feature_extractor": WHISPER})
QWEN3 = _processor(
    "Qwen3VLProcessor", "Qwen2VLImageProcessor", "Qwen3VLVideoProcessor", frames=QWEN_IMAGES | QWEN_FRAMES,
    **QWEN_IMAGES,
)  # fmt: skip
PIXTRAL = _processor(
    "PixtralProcessor", "PixtralImageProcessor", patch_size=14, size={"longest_edge": 56},
    options={"patch_size": 14, "image_token": "[IMG]"},
)  # fmt: skip
PIXTRAL_TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
IDEFICS = {
    "size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 56}, "do_image_splitting": False,
    "options": {"image_seq_len": 4},
}  # fmt: skip
SMOLVLM = _processor(
    "SmolVLMProcessor", "SmolVLMImageProcessor", "SmolVLMVideoProcessor", **IDEFICS,
    frames={"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 56}},
)  # fmt: skip
IDEFICS_TOKENS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", "<row_1_col_1>")
MOLMO_TOKENS = (
    "<|image|>", "<|video|>", "<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>", "<im_low>",
    "<frame_start>", "<frame_end>", *(f"<unused_{index}>" for index in range(6)),
)  # fmt: skip
MINICPM_TOKENS = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "image_start_token": "<image>",
    "image_end_token": "</image>", "slice_start_token": "<slice>", "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>",
}  # fmt: skip
PALIGEMMA = _processor("PaliGemmaProcessor", "SiglipImageProcessor", size=SQUARE, image_seq_length=16)
INTERNVL = _processor(
    "InternVLProcessor", "GotOcr2ImageProcessor", "InternVLVideoProcessor", size=SQUARE, options={"image_seq_length": 4}
)
MINICPM = _processor(
    "MiniCPMV4_6Processor",
    "MiniCPMV4_6ImageProcessor",
    "MiniCPMV4_6VideoProcessor",
    scale_resolution=56,
    max_slice_nums=1,
    slice_mode=False,
)
MOLMO2 = _processor(
    "Molmo2Processor",
    "Molmo2ImageProcessor",
    "Molmo2VideoProcessor",
    size=SQUARE,
    max_crops=1,
    overlap_margins=[0, 0],
    patch_size=14,
)
MLLAMA = _processor("MllamaProcessor", "MllamaImageProcessor", size=SQUARE, max_image_tiles=4)

FAMILIES: dict[str, TinyFamily] = {
    "qwen2_vl": TinyFamily(
        configs.qwen2_vl, _processor("Qwen2VLProcessor", *QWEN_VISION, frames=QWEN_FRAMES), QWEN_IMAGE, video=QWEN_VIDEO
    ),
    "qwen2_5_vl": TinyFamily(
        configs.qwen2_5_vl, _processor("Qwen2_5_VLProcessor", *QWEN_VISION, frames=QWEN_FRAMES), QWEN_IMAGE,
        video=QWEN_VIDEO,
    ),
    "qwen2_5_omni_thinker": TinyFamily(
        configs.qwen2_5_omni_thinker, OMNI, QWEN_IMAGE, AUDIO_TOKENS, audio="<|audio_bos|><|AUDIO|><|audio_eos|>"
    ),
    "qwen2_audio": TinyFamily(
        configs.qwen2_audio, {"processor_class": "Qwen2AudioProcessor", "feature_extractor": WHISPER}, "",
        {"audio_token": "<|AUDIO|>"}, ("<|audio_bos|>", "<|audio_eos|>"), pictures=(0, 0, 0, 0),
        audio="<|audio_bos|><|AUDIO|><|audio_eos|>",
    ),
    "qwen3_vl": TinyFamily(
        configs.qwen3_vl, QWEN3, QWEN_IMAGE, video=QWEN_VIDEO
    ),
    "qwen3_5": TinyFamily(configs.qwen3_5, QWEN3, QWEN_IMAGE),
    "llava": TinyFamily(
        configs.llava, _processor("LlavaProcessor", "CLIPImageProcessor", **CROP, options=PATCHES), "<image>",
        {"image_token": "<image>"},
    ),
    "llava_next": TinyFamily(
        configs.llava_next,
        _processor(
            "LlavaNextProcessor", "LlavaNextImageProcessor", **CROP, image_grid_pinpoints=[[56, 112], [112, 56]],
            options=PATCHES,
        ),
        "<image>", {"image_token": "<image>"},
    ),
    "llava_onevision": TinyFamily(
        configs.llava_onevision,
        _processor(
            "LlavaOnevisionProcessor", "LlavaOnevisionImageProcessor", "LlavaOnevisionVideoProcessor", size=SQUARE,
            frames={"size": SQUARE},
            image_grid_pinpoints=[[56, 112], [112, 56]],
            options={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        ),
        "<image>", {"image_token": "<image>", "video_token": "<video>"}, video="<video>",
    ),
    "internvl": TinyFamily(
        configs.internvl,
        INTERNVL,
        "<IMG_CONTEXT>",
        {
            "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "idefics3": TinyFamily(
        configs.idefics3, _processor("Idefics3Processor", "Idefics3ImageProcessor", **IDEFICS), "<image>",
        more_tokens=IDEFICS_TOKENS,
    ),
    "smolvlm": TinyFamily(
        configs.smolvlm, SMOLVLM, "<image>",
        more_tokens=IDEFICS_TOKENS, video="<video>",
    ),
    "mistral3": TinyFamily(
        configs.mistral3, PIXTRAL | {"spatial_merge_size": 2}, "[IMG]", more_tokens=PIXTRAL_TOKENS
    ),
    "pixtral": TinyFamily(configs.pixtral, PIXTRAL, "[IMG]", more_tokens=PIXTRAL_TOKENS),
    "gemma3": TinyFamily(
        configs.gemma3,
        _processor("Gemma3Processor", "Gemma3ImageProcessor", size=SQUARE, options={"image_seq_length": 4}),
        "<start_of_image>",
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        bos="<bos>",
    ),
    "gemma3n": TinyFamily(
        configs.gemma3n,
        _processor(
            "Gemma3nProcessor", "SiglipImageProcessor", size=SQUARE, options={
                "feature_extractor": {"feature_extractor_type": "Gemma3nAudioFeatureExtractor", "feature_size": 16},
                "image_seq_length": 4, "audio_seq_length": 188,
            },
        ),
        "<image_soft_token>",
        {
            "boi_token": "<start_of_image>", "boa_token": "<start_of_audio>", "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>", "eoa_token": "<end_of_audio>", "audio_token": "<audio_soft_token>",
        },
        bos="<bos>", audio="<audio_soft_token>",
    ),
    "paligemma": TinyFamily(configs.paligemma("gemma"), PALIGEMMA, "<image>", {"image_token": "<image>"},
        bos="<bos>", pictures=(1, 2, 1, 1),
    ),
    "paligemma2": TinyFamily(
        configs.paligemma("gemma2", final_logit_softcapping=0.5, query_pre_attn_scalar=16, sliding_window=8),
        PALIGEMMA, "<image>", {"image_token": "<image>"}, bos="<bos>", attention="eager", pictures=(1, 2, 1, 1),
    ),
    "minicpmv4_6": TinyFamily(
        configs.minicpm,
        MINICPM,
        "<|image_pad|>", MINICPM_TOKENS,
    ),
    "molmo2": TinyFamily(
        configs.molmo2,
        MOLMO2,
        "<|image|>", {"image_token": "<|image|>", "video_token": "<|video|>"}, MOLMO_TOKENS,
    ),
    "lfm2_vl": TinyFamily(
        configs.lfm2_vl,
        _processor(
            "Lfm2VlProcessor", "Lfm2VlImageProcessor", tile_size=56, encoder_patch_size=14, min_image_tokens=4,
            max_image_tokens=4, do_image_splitting=False, use_thumbnail=False,
        ),
        "<image>", {"image_token": "<image>"}, ("<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"),
    ),
    "mllama": TinyFamily(
        configs.mllama, MLLAMA, "<|image|>",
        {"image_token": "<|image|>"}, ("<|python_tag|>",), bos="<|begin_of_text|>", pictures=(1, 1, 1, 1),
    ),
    "phi4_multimodal": TinyFamily(
        configs.phi4_multimodal,
        _processor(
            "Phi4MultimodalProcessor", "Phi4MultimodalImageProcessor",
            options={
                "feature_extractor": {"feature_extractor_type": "Phi4MultimodalFeatureExtractor", "feature_size": 16},
            },
        ),
        "<|endoftext10|>", {"image_token": "<|endoftext10|>", "audio_token": "<|endoftext11|>"},
        audio="<|endoftext11|>", pictures=(1, 0, 2, 1),
    ),
    "llama": TinyFamily(configs.text_only("llama"), {}, "", pictures=(0, 0, 0, 0)),
    "qwen3": TinyFamily(configs.text_only("qwen3"), {}, "", pictures=(0, 0, 0, 0)),
    "gemma3_text": TinyFamily(
        configs.text_only("gemma3_text", sliding_window=24, layer_types=["sliding_attention", "full_attention"]),
        {}, "", bos="<bos>", pictures=(0, 0, 0, 0),
    ),
    "smollm3": TinyFamily(configs.text_only("smollm3"), {}, "", pictures=(0, 0, 0, 0)),
}  # fmt: skip
