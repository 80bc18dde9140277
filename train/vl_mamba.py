"""VL-Mamba (arXiv 2403.13600): SigLIP-SO400M, VSS-L2 connector with BSM, Mamba-2.8B on SlimPajama.

Two stages as LLaVA-1.5. The paper gives the parts, the stages, what trains in each and the data; learning rates and
batch sizes it does not give are LLaVA-1.5's (haotian-liu/LLaVA, scripts/v1_5/pretrain.sh and finetune.sh). "(ours)"
marks what neither gives.

    bash scripts/pretrain.sh vl_mamba
    bash scripts/finetune.sh vl_mamba
"""

from vlmamba.models.builder import ConnectorConfig, ImageConfig, LanguageConfig, ModelConfig, VisionConfig
from vlmamba.training.config import (
    BatchConfig,
    DataConfig,
    OptimConfig,
    ScheduleConfig,
    SourceConfig,
    TrainConfig,
)

SIGLIP = VisionConfig(
    family="siglip",
    path="checkpoints/siglip-so400m-patch14-384",
    feature_layer=-2,  # LLaVA-1.5 (mm_vision_select_layer)
    preset="siglip-so400m-patch14-384",
    hint="hf download google/siglip-so400m-patch14-384 --local-dir checkpoints/siglip-so400m-patch14-384",
)
MAMBA_SLIMPJ = LanguageConfig(
    path="checkpoints/mamba-2.8b-slimpj",
    tokenizer="checkpoints/gpt-neox-20b",
    preset="2.8b",
    hint="hf download state-spaces/mamba-2.8b-slimpj --local-dir checkpoints/mamba-2.8b-slimpj; its tokenizer: "
    "hf download EleutherAI/gpt-neox-20b --include 'tokenizer*' 'special_tokens*' --local-dir checkpoints/gpt-neox-20b",
)
PRETRAIN_558K = SourceConfig(
    annotations="playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
    image_root="playground/data/LLaVA-Pretrain/images",
    expected_rows=558_128,
    hint="hf download liuhaotian/LLaVA-Pretrain --repo-type dataset --local-dir playground/data/LLaVA-Pretrain, "
    "then unzip images.zip into its images/",
)
MIX_665K = SourceConfig(
    annotations="playground/data/llava_v1_5_mix665k.json",
    image_root="playground/data",
    expected_rows=665_298,
    hint="hf download liuhaotian/LLaVA-Instruct-150K llava_v1_5_mix665k.json --repo-type dataset --local-dir "
    "playground/data, and the images of COCO train2017, GQA, OCR-VQA, TextVQA and Visual Genome beside it "
    "(docs/data.md)",
)


def pretrain(connector: str = "vss-l2") -> TrainConfig:
    """Stage 1: the connector alone learns to speak to the frozen language model."""
    return TrainConfig(
        output="runs/vl_mamba/pretrain",
        model=ModelConfig(
            vision=SIGLIP,
            connector=ConnectorConfig(name=connector),
            language=MAMBA_SLIMPJ,
            chat="plain",  # LLaVA-1.5 (--version plain)
            image=ImageConfig(mode="pad"),  # LLaVA-1.5's stage 2, here in both (ours)
        ),
        train=("multi_modal_projector",),
        data=DataConfig(sources=(PRETRAIN_558K,), max_length=2048, order="length"),  # order (ours)
        batch=BatchConfig(global_batch_size=256, micro_batch_size=32),
        optim=OptimConfig(name="adamw", lr=1e-3, weight_decay=0.0),
        schedule=ScheduleConfig(name="cosine", warmup_ratio=0.03),
        epochs=1,
        precision="bf16",
        grad_clip=1.0,  # (ours)
    )


def finetune(connector: str = "vss-l2") -> TrainConfig:
    """Stage 2: connector and language model learn to follow instructions; the encoder stays frozen."""
    first = pretrain(connector)
    return first.replace(
        output="runs/vl_mamba/finetune",
        init_from="runs/vl_mamba/pretrain",
        model=first.model.replace(chat="vicuna_v1"),  # LLaVA-1.5 (--version v1)
        train=("multi_modal_projector", "language_model"),
        data=DataConfig(sources=(MIX_665K,), max_length=2048, order="modality_length"),  # LLaVA-1.5
        batch=BatchConfig(global_batch_size=128, micro_batch_size=16),
        optim=OptimConfig(name="adamw", lr=2e-5, weight_decay=0.0),
        gradient_checkpointing=True,
    )
