"""Published weights and data sets that recipes use: where a run expects them, and where to get them.

Paths follow LLaVA's layout (docs/Data.md of haotian-liu/LLaVA); numbers of rows are those of the published files.
"""

from __future__ import annotations

from vlmamba.models.builder import LanguageConfig, VisionConfig
from vlmamba.training.config import SourceConfig


def _download(hub_id: str, folder: str) -> str:
    return f"hf download {hub_id} --local-dir {folder}"


_NEOX = (
    "its tokenizer: hf download EleutherAI/gpt-neox-20b --include 'tokenizer*' 'special_tokens*' "
    "--local-dir checkpoints/gpt-neox-20b"
)

# Encoders. Feature layer -2 as LLaVA-1.5 (mm_vision_select_layer), prismatic and Cobra.

SIGLIP_SO400M = VisionConfig(
    family="siglip",
    path="checkpoints/siglip-so400m-patch14-384",
    feature_layer=-2,
    preset="siglip-so400m-patch14-384",
    hint=_download("google/siglip-so400m-patch14-384", "checkpoints/siglip-so400m-patch14-384"),
)

CLIP_LARGE_336 = VisionConfig(
    family="clip",
    path="checkpoints/clip-vit-large-patch14-336",
    feature_layer=-2,
    preset="clip-vit-large-patch14-336",
    hint=_download("openai/clip-vit-large-patch14-336", "checkpoints/clip-vit-large-patch14-336"),
)

DINOSIGLIP = VisionConfig(
    family="fused",
    path=(
        "dinov2=checkpoints/dinov2-with-registers-large",
        "siglip=checkpoints/siglip-so400m-patch14-384",
    ),
    feature_layer=-2,
    image_size=384,
    preset="dinov2-with-registers-large+siglip-so400m-patch14-384",
    hint=_download("facebook/dinov2-with-registers-large", "checkpoints/dinov2-with-registers-large")
    + "; "
    + _download("google/siglip-so400m-patch14-384", "checkpoints/siglip-so400m-patch14-384"),
)

# Language models. The SlimPajama one is a base model; the Zephyr one went through UltraChat and UltraFeedback.

MAMBA_SLIMPJ = LanguageConfig(
    path="checkpoints/mamba-2.8b-slimpj",
    tokenizer="checkpoints/gpt-neox-20b",
    preset="2.8b",
    hint=f"{_download('state-spaces/mamba-2.8b-slimpj', 'checkpoints/mamba-2.8b-slimpj')}; {_NEOX}",
)

MAMBA_ZEPHYR = LanguageConfig(
    path="checkpoints/mamba-2.8b-zephyr",
    tokenizer="checkpoints/gpt-neox-20b",
    preset="2.8b",
    hint=f"{_download('xiuyul/mamba-2.8b-zephyr', 'checkpoints/mamba-2.8b-zephyr')}; {_NEOX}",
)

# Stage 1.

LLAVA_558K = SourceConfig(
    annotations="playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
    image_root="playground/data/LLaVA-Pretrain/images",
    expected_rows=558_128,
    hint="hf download liuhaotian/LLaVA-Pretrain --repo-type dataset --local-dir playground/data/LLaVA-Pretrain, "
    "then unzip images.zip into its images/",
)

CC3M_595K = SourceConfig(
    annotations="playground/data/LLaVA-CC3M-Pretrain-595K/chat.json",
    image_root="playground/data/LLaVA-CC3M-Pretrain-595K/images",
    expected_rows=595_375,
    hint="hf download liuhaotian/LLaVA-CC3M-Pretrain-595K --repo-type dataset --local-dir "
    "playground/data/LLaVA-CC3M-Pretrain-595K, then unzip images.zip into its images/",
)

# Stage 2.

LLAVA_MIX_665K = SourceConfig(
    annotations="playground/data/llava_v1_5_mix665k.json",
    image_root="playground/data",
    expected_rows=665_298,
    hint="hf download liuhaotian/LLaVA-Instruct-150K llava_v1_5_mix665k.json --repo-type dataset --local-dir "
    "playground/data, and the images of COCO train2017, GQA, OCR-VQA, TextVQA and Visual Genome beside it "
    "(docs/data.md)",
)

LVIS_INSTRUCT4V = SourceConfig(
    annotations="playground/data/lvis_instruct4v_220k.json",
    image_root="playground/data",
    expected_rows=222_700,  # about: Cobra counts 1,231 K with the other two
    hint="hf download X2FD/LVIS-Instruct4V lvis_instruct4v_220k.json --repo-type dataset "
    "--local-dir playground/data",
)

LRV_INSTRUCT = SourceConfig(
    annotations="playground/data/lrv_instruct_400k.json",
    image_root="playground/data",
    expected_rows=342_799,  # as prismatic-vlms' script for it counts, charts included
    hint="github.com/FuxiaoLiu/LRV-Instruction (download.txt) into playground/data/lrv, then vlmamba data convert lrv "
    "playground/data/lrv playground/data/lrv_instruct_400k.json (docs/data.md)",
)
