"""The zoo: one row for each family of models and its options, with the smallest members of the family."""

from __future__ import annotations

from tests.zoo import configurations as small
from tests.zoo.entries import (
    Entry,
    captioned,
    hf,
    pixels,
    text,
    text_pair,
    timm,
    torchvision,
    transcribed,
    values,
)

# Of vision transformers in timm: fewer and narrower blocks, and smaller images.
VIT = {"embed_dim": 64, "depth": 3, "num_heads": 2, "img_size": 64}
VIT14 = VIT | {"img_size": 56}
SHALLOW = {"depths": (1, 1, 2, 1)}

CONVOLUTIONAL: list[Entry] = [
    *timm("resnet", "resnet10t resnet18 resnet18d resnet50_gn resnetblur18 test_resnet"),
    *timm("resnext", "resnext50_32x4d resnext26ts"),
    *timm("seresnet", "seresnet18 legacy_seresnet18 seresnext26ts gcresnet33ts"),
    *timm("ecaresnet", "ecaresnet26t ecaresnext26t_32x4d"),
    *timm("skresnet", "skresnet18 resnest14d"),
    *timm("res2net", "res2net50_48w_2s res2next50"),
    *timm("regnet", "regnetx_002 regnety_002 regnetz_005 regnetv_040"),
    *timm("densenet", "densenet121 rdnet_tiny"),
    *timm("dla", "dla34 dla46_c dla60_res2net dpn48b"),
    *timm("hrnet", "hrnet_w18_small"),
    *timm("inception", "inception_v3", size=96),
    *timm("xception", "legacy_xception xception41p"),
    *timm("cspnet", "cspresnet50 cs3darknet_s darknet17 cspnext_tiny"),
    *timm("vovnet", "ese_vovnet19b_dw eca_vovnet39b selecsls42 tresnet_m"),
    *timm("weight standardised", "nf_regnet_b0 nf_resnet26 eca_nfnet_l0 test_nfnet"),
    *timm("resnetv2", "resnetv2_18 resnetv2_50x1_bit resnetv2_50d_evos resnetv2_50d_frn"),
    *timm("repvgg", "repvgg_a0 mobileone_s0 gernet_s repghostnet_050 repvit_m0_9"),
    *timm("hgnet", "hgnetv2_b0 hgnet_tiny"),
    *timm("convnext", "convnext_atto convnext_atto_ols convnextv2_atto convnext_zepto_rms test_convnext"),
    *timm("convmixer", "convmixer_768_32 inception_next_atto"),
    *timm("metaformer", "poolformer_s12 poolformerv2_s12 caformer_s18 focalnet_tiny_srf"),
    *timm("starnet", "starnet_s050 fasternet_t0 lcnetv2_small test_mambaout"),
]

MOBILE: list[Entry] = [
    *timm("efficientnet", "efficientnet_b0 efficientnet_lite0 efficientnet_es efficientnet_blur_b0 mixnet_s"),
    *timm("efficientnet", "efficientnet_b0_gn efficientnet_cc_b0_4e test_efficientnet"),
    *timm("efficientnet", "efficientnet_b0_g16_evos gc_efficientnetv2_rw_t"),
    *timm("same padding", "tf_efficientnet_b0 tf_efficientnet_lite0 tf_mixnet_s"),
    *timm("same padding", "tf_mobilenetv3_small_075 tf_mobilenetv3_small_minimal_100"),
    *timm("mobilenet", "mobilenetv1_100 mobilenetv2_050 mobilenetv3_small_050 mobilenetv3_rw"),
    *timm("mobilenet", "mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium_075 mobilenet_edgetpu_100"),
    *timm("mnasnet", "mnasnet_small semnasnet_050 spnasnet_100 fbnetc_100 fbnetv3_b hardcorenas_a"),
    *timm("ghostnet", "ghostnet_050 ghostnetv2_100 ghostnetv3_050"),
    *timm("lcnet", "lcnet_035 tinynet_e rexnet_100 rexnetr_100"),
    *timm("mobilevit", "mobilevit_xxs mobilevitv2_050 edgenext_xx_small"),
    *timm("efficientformer", "efficientformer_l1 efficientformerv2_s0", size=224),
    *timm("efficientvit", "efficientvit_b0 swiftformer_xs"),
    # At 64 x 64 their last batch norms see a single place: derivatives hang on the last bit of the input.
    *timm("efficientvit", "efficientvit_m0 shvit_s1", size=128),
    *timm("fastvit", "fastvit_t8 fastvit_sa12"),
    *timm("levit", "levit_128s levit_conv_128s", size=224),
    *timm("tinyvit", "tiny_vit_5m_224"),
    *timm("visformer", "visformer_tiny", size=64, img_size=64),
]

ATTENTION: list[Entry] = [
    *timm("vit", "vit_tiny_patch16_224 vit_relpos_small_patch16_224 flexivit_small", **VIT),
    *timm("vit", "samvit_base_patch16_224 naflexvit_base_patch16_gap", **VIT),
    *timm("vit", "vit_small_patch14_dinov2 vit_small_patch14_reg4_dinov2", 56, **VIT14),
    *timm("vit", "test_vit test_vit2 test_vit3 test_vit4", img_size=64),
    *timm("deit", "deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224", **VIT),
    *timm("vit hybrid", "vit_tiny_r_s16_p8_224", **VIT),
    *timm("beit", "beit_base_patch16_224 beitv2_base_patch16_224", **VIT),
    *timm("eva", "eva02_tiny_patch14_224", 56, **VIT14),
    *timm("eva", "vit_small_patch16_dinov3 vit_small_patch16_rope_224", **VIT),
    *timm("cait", "cait_xxs24_224 xcit_nano_12_p16_224 convit_tiny", **VIT),
    *timm("volo", "volo_d1_224", img_size=64),
    *timm("crossvit", "crossvit_tiny_240", size=240),
    *timm("tnt", "tnt_s_patch16_224", img_size=64, depth=3),
    *timm("pit", "pit_ti_224", size=224),
    *timm("swin", "swin_tiny_patch4_window7_224", 56, img_size=56, **SHALLOW, embed_dim=48),
    *timm("swin", "swinv2_tiny_window8_256 swinv2_cr_tiny_224", img_size=64, **SHALLOW, embed_dim=48),
    *timm("pvt", "pvt_v2_b0"),
    *timm("twins", "twins_pcpvt_small twins_svt_small", img_size=64, **SHALLOW),
    *timm("coat", "coat_lite_tiny coat_tiny", img_size=64),
    *timm("maxvit", "test_maxvit test_coatnet maxxvit_rmlp_nano_rw_256", img_size=64),
    *timm("mvit", "mvitv2_tiny nest_tiny_jx gcvit_xxtiny", img_size=64),
    *timm("davit", "davit_tiny", embed_dims=(24, 48, 96, 96), num_heads=(2, 2, 4, 4), **SHALLOW),
    *timm("hiera", "hiera_tiny_224", size=224, stages=(1, 1, 2, 1)),
    *timm("nextvit", "nextvit_small"),
    *timm("sequencer", "sequencer2d_s", img_size=64, layers=(1, 1, 2, 1)),
    *timm("halonet", "halonet26t botnet26t_256", size=256),
    *timm("mixer", "mixer_s32_224 gmixer_12_224 resmlp_12_224 gmlp_ti16_224", img_size=64),
]

CLASSES = {"num_classes": 10}
VIDEO_CLASSES = CLASSES | {"module": ".video"}
BACKBONES = ".detection.backbone_utils"
# The first linear layers of a VGG hold 100 million weights.
ALEXNET = {"classifier.1": (9216, 64), "classifier.4": (64, 4096)}
VGG = {"classifier.0": (25088, 64), "classifier.3": (64, 4096)}
SEGMENTATION = "fcn_resnet50 deeplabv3_resnet50 lraspp_mobilenet_v3_large"

TORCHVISION: list[Entry] = [
    *torchvision("tv resnet", "resnet18 resnext50_32x4d regnet_x_400mf regnet_y_400mf", **CLASSES),
    *torchvision("tv mobile", "mobilenet_v2 mobilenet_v3_small mnasnet0_5 shufflenet_v2_x0_5", **CLASSES),
    *torchvision("tv mobile", "efficientnet_b0 squeezenet1_1", **CLASSES),
    *torchvision("tv plain", "alexnet", linear=ALEXNET, **CLASSES),
    *torchvision("tv plain", "vgg11 vgg11_bn", linear=VGG, **CLASSES),
    *torchvision("tv inception", "googlenet", 2, 3, 96, 96, init_weights=False, **CLASSES),
    *torchvision(
        "tv inception", "inception_v3", 2, 3, 96, 96, init_weights=False, aux_logits=False, **CLASSES
    ),
    *torchvision("tv attention", "convnext_tiny swin_t swin_v2_t", **CLASSES),
    *torchvision("tv attention", "vit_b_16", image_size=64, **CLASSES),
    *torchvision("tv segmentation", SEGMENTATION, module=".segmentation", **CLASSES),
    *torchvision("tv detection", "resnet_fpn_backbone:resnet18", module=BACKBONES),
    *torchvision("tv detection", "mobilenet_backbone:mobilenet_v3_large", module=BACKBONES, fpn=True),
    *torchvision("tv video", "r3d_18 mc3_18 r2plus1d_18 swin3d_t", 2, 3, 8, 32, 32, **VIDEO_CLASSES),
]

CLASSIFY = "ForSequenceClassification"
CAUSAL = "ForCausalLM"
GENERATE = "ForConditionalGeneration"
IMAGE = "ForImageClassification"
VIDEO = "ForVideoClassification"
CTC = "ForCTC"

LANGUAGE: list[Entry] = [
    *hf("bert", CLASSIFY, "Bert MPNet MegatronBert FNet", text, small.BERT),
    *hf("bert", CLASSIFY, "Albert Electra RoFormer", text, small.BERT, embedding_size=16),
    *hf("bert", CLASSIFY, "DistilBert", text, small.DISTILBERT),
    *hf("bert", CLASSIFY, "Esm", text, small.BERT, mask_token_id=3, position_embedding_type="rotary"),
    *hf("bert", CLASSIFY, "LayoutLM", text, small.BERT, max_2d_position_embeddings=64),
    *hf("bert", CLASSIFY, "ModernBert", text, small.BERT, local_attention=8, cls_token_id=1),
    *hf("bert", "ForMaskedLM", "Bert", text, small.BERT),
    *hf("bert", "ForTokenClassification", "Roberta XLMRobertaXL", text, small.BERT),
    *hf("deberta", CLASSIFY, "Deberta DebertaV2", text, small.DEBERTA),
    *hf("bert variants", CLASSIFY, "ConvBert", text, small.BERT, embedding_size=16, conv_kernel_size=3),
    *hf("bert variants", CLASSIFY, "MobileBert", text, small.MOBILEBERT),
    *hf("bert variants", CLASSIFY, "SqueezeBert", text, small.BERT, embedding_size=32),
    *hf("bert variants", CLASSIFY, "Longformer", text, small.BERT, attention_window=4),
    *hf("bert variants", CLASSIFY, "BigBird", text, small.BERT, attention_type="original_full"),
    *hf("bert variants", CLASSIFY, "Funnel", text, small.FUNNEL),
    *hf("bert variants", CLASSIFY, "XLNet", text, small.XLNET),
    *hf("gpt", "LMHeadModel", "GPT2", text, small.GPT),
    *hf("gpt", CAUSAL, "GPTBigCode", text, small.GPT),
    *hf("gpt", CAUSAL, "GPTJ CodeGen", text, small.GPT, rotary_dim=4),
    *hf("gpt", CAUSAL, "GPTNeo", text, small.GPT_NEO),
    *hf("gpt", CAUSAL, "GPTNeoX BioGpt Bloom Falcon", text, small.BERT, use_cache=False),
    *hf("gpt", CAUSAL, "OPT", text, small.BERT, ffn_dim=48, word_embed_proj_dim=16, use_cache=False),
    *hf("gpt", CAUSAL, "Mpt", text, small.MPT),
    *hf("llama", CAUSAL, "Llama Mistral Qwen2 Qwen3 Gemma Gemma2 Phi Phi3", text, small.LLM),
    *hf("llama", CAUSAL, "StableLm Starcoder2 Olmo2 Cohere", text, small.LLM),
    *hf("experts", CAUSAL, "Mixtral Qwen2Moe", text, small.EXPERTS),
    *hf("state space", CAUSAL, "Mamba", text, small.MAMBA),
    *hf("state space", CAUSAL, "Mamba2", text, small.MAMBA2),
    *hf("state space", CAUSAL, "Rwkv", text, small.BERT, attention_hidden_size=32, use_cache=False),
    *hf("state space", CAUSAL, "RecurrentGemma", text, small.LLM, lru_width=32, attention_window_size=8),
    *hf("encoder-decoder", GENERATE, "T5 SwitchTransformers", text_pair, small.T5),
    *hf("encoder-decoder", GENERATE, "Bart MBart Pegasus M2M100 Blenderbot", text_pair, small.SEQ),
    *hf("encoder-decoder", "MTModel", "Marian", text_pair, small.SEQ),
]

IMAGES32, IMAGES64, CAPTIONED = pixels(3, 32, 32), pixels(3, 64, 64), captioned(3, 32, 32)
FRAMES, SOUND, SPECTRA = pixels(4, 3, 32, 32), values("input_values", 1200), values("input_values", 24, 16)
SERIES = values("past_values", 32, 3)

SPEECH_AND_VISION: list[Entry] = [
    *hf("speech", GENERATE, "Whisper", transcribed(16, 60), small.WHISPER),
    *hf("speech", GENERATE, "Speech2Text", transcribed(16, 16), small.SPEECH),
    *hf("speech", CTC, "Wav2Vec2 Hubert WavLM UniSpeech", SOUND, small.WAV),
    *hf("speech", CTC, "SEW Data2VecAudio", SOUND, small.WAV, squeeze_factor=1),
    *hf("speech", CTC, "Wav2Vec2Conformer", SOUND, small.WAV),
    *hf("speech", "ForAudioClassification", "AST", SPECTRA, small.SPECTROGRAM),
    *hf("hf vit", IMAGE, "ViT DeiT ViTMSN Dinov2 Dinov2WithRegisters", IMAGES32, small.PATCHES),
    *hf("hf vit", IMAGE + "WithTeacher", "DeiT", IMAGES32, small.PATCHES),
    *hf("hf vit", IMAGE, "Beit Data2VecVision", IMAGES32, small.PATCHES, use_relative_position_bias=True),
    *hf("hf vit", "ForPreTraining", "ViTMAE", IMAGES32, small.MAE),
    *hf("hf stages", IMAGE, "Swin Swinv2", IMAGES32, small.SWIN),
    *hf("hf stages", "ForImageSuperResolution", "Swin2SR", pixels(3, 16, 16), small.SWIN2SR),
    *hf("hf stages", "ForSemanticSegmentation", "Segformer", IMAGES64, small.HEADS),
    *hf("hf stages", "ForDepthEstimation", "GLPN", IMAGES64, small.HEADS, decoder_hidden_size=16),
    *hf("hf stages", IMAGE, "Pvt PvtV2", IMAGES64, small.HEADS, image_size=64),
    *hf("hf stages", IMAGE, "Levit", IMAGES64, small.LEVIT),
    *hf("hf stages", IMAGE, "FocalNet", IMAGES32, small.FOCALNET),
    *hf("hf stages", IMAGE, "Hiera", IMAGES32, small.HIERA),
    *hf("hf convolutional", IMAGE, "ResNet", IMAGES64, small.STAGES, embedding_size=16),
    *hf("hf convolutional", IMAGE, "RegNet", IMAGES64, small.STAGES, embedding_size=16, groups_width=8),
    *hf("hf convolutional", IMAGE, "ConvNext ConvNextV2 PoolFormer", IMAGES64, small.STAGES),
    *hf("hf convolutional", IMAGE, "SwiftFormer", IMAGES64, small.SWIFTFORMER),
    *hf("hf convolutional", IMAGE, "EfficientNet", IMAGES64, {}, width_coefficient=0.25, hidden_dim=320),
    *hf("hf convolutional", IMAGE, "MobileNetV1 MobileNetV2", IMAGES64, {}, depth_multiplier=0.35),
    *hf("hf convolutional", IMAGE, "MobileViT", IMAGES64, small.MOBILEVIT),
    *hf("hf convolutional", IMAGE, "MobileViTV2", IMAGES64, {}, width_multiplier=0.25),
    *hf("hf dense", "ForObjectDetection", "Yolos", IMAGES32, small.PATCHES | {"image_size": [32, 32]}),
    *hf("hf dense", "ForObjectDetection", "Detr", IMAGES64, small.DETR),
    *hf("hf dense", "ForDepthEstimation", "DPT", IMAGES32, small.DPT),
    *hf("hf video", VIDEO, "VideoMAE Timesformer", FRAMES, small.PATCHES, num_frames=4),
    *hf("hf video", VIDEO, "Vivit", FRAMES, small.PATCHES, num_frames=4, tubelet_size=[2, 8, 8]),
    *hf("image and text", "Model", "CLIP Siglip CLIPSeg", CAPTIONED, small.CLIP),
    *hf("image and text", "ForImageTextRetrieval", "Blip", CAPTIONED, small.BLIP),
    *hf("image and text", "Model", "Vilt", CAPTIONED, small.PATCHES | small.BERT),
    *hf("time series", "ForPrediction", "PatchTST PatchTSMixer", SERIES, small.PATCHTST),
]

MODELS: dict[str, Entry] = {
    entry.name: entry
    for entry in (*CONVOLUTIONAL, *MOBILE, *ATTENTION, *TORCHVISION, *LANGUAGE, *SPEECH_AND_VISION)
}


def is_first_of_family(name: str) -> bool:
    """Return whether a model is the first one listed of its family."""
    family = MODELS[name].family
    return name == next(entry.name for entry in MODELS.values() if entry.family == family)
