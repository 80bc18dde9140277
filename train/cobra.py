"""Cobra (arXiv 2403.14520): DINOv2 + SigLIP fused on the channel axis, a three-layer MLP, Mamba-2.8B-Zephyr.

Values from its released configuration (OpenHelix-Team/cobra, cobra/conf/models.py, Cobra_3B): no stage 1 by default,
two epochs of stage 2, batch 128, lr 2e-5, weight decay 0.1, clipping 1.0. Its stage 1 is defined there but unused.

    bash scripts/finetune.sh cobra
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

DINOSIGLIP = VisionConfig(
    family="fused",
    path=(
        "dinov2=checkpoints/dinov2-with-registers-large",
        "siglip=checkpoints/siglip-so400m-patch14-384",
    ),
    feature_layer=-2,  # second-to-last block of both
    image_size=384,
    preset="dinov2-with-registers-large+siglip-so400m-patch14-384",
    hint="hf download facebook/dinov2-with-registers-large --local-dir checkpoints/dinov2-with-registers-large; "
    "hf download google/siglip-so400m-patch14-384 --local-dir checkpoints/siglip-so400m-patch14-384",
)
MAMBA_ZEPHYR = LanguageConfig(
    path="checkpoints/mamba-2.8b-zephyr",
    tokenizer="checkpoints/gpt-neox-20b",
    preset="2.8b",
    hint="hf download xiuyul/mamba-2.8b-zephyr --local-dir checkpoints/mamba-2.8b-zephyr; its tokenizer: "
    "hf download EleutherAI/gpt-neox-20b --include 'tokenizer*' 'special_tokens*' --local-dir checkpoints/gpt-neox-20b",
)
PRETRAIN_558K = SourceConfig(
    annotations="playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
    image_root="playground/data/LLaVA-Pretrain/images",
    expected_rows=558_128,
    hint="hf download liuhaotian/LLaVA-Pretrain --repo-type dataset --local-dir playground/data/LLaVA-Pretrain, "
    "then unzip images.zip into its images/",
)
INSTRUCT = (
    SourceConfig(
        annotations="playground/data/llava_v1_5_mix665k.json",
        image_root="playground/data",
        expected_rows=665_298,
        hint="see docs/data.md: LLaVA-1.5's mix and its five image folders",
    ),
    SourceConfig(
        annotations="playground/data/lvis_instruct4v_220k.json",
        image_root="playground/data",
        expected_rows=220_000,
        hint="hf download X2FD/LVIS-Instruct4V lvis_instruct4v_220k.json --repo-type dataset "
        "--local-dir playground/data",
    ),
    SourceConfig(
        annotations="playground/data/lrv_instruct_400k.json",
        image_root="playground/data/vg",
        expected_rows=400_000,
        hint="github.com/FuxiaoLiu/LRV-Instruction: the annotations, in LLaVA's JSON (docs/data.md)",
    ),
)


def pretrain() -> TrainConfig:
    """Stage 1, which Cobra defines and leaves out: the connector alone (batch 256, lr 1e-3, one epoch)."""
    return finetune().replace(
        output="runs/cobra/pretrain",
        model=_model(chat="plain"),
        train=("multi_modal_projector",),
        data=DataConfig(sources=(PRETRAIN_558K,), max_length=2048),
        batch=BatchConfig(global_batch_size=256, micro_batch_size=16),
        optim=OptimConfig(name="adamw", lr=1e-3, weight_decay=0.0),
        epochs=1,
        gradient_checkpointing=False,
    )


def finetune() -> TrainConfig:
    """Connector and language model together, from a fresh connector, for two epochs."""
    return TrainConfig(
        output="runs/cobra/finetune",
        model=_model(chat="zephyr"),
        train=("multi_modal_projector", "language_model"),
        data=DataConfig(sources=INSTRUCT, max_length=2048, order="modality_length"),
        batch=BatchConfig(global_batch_size=128, micro_batch_size=8),
        optim=OptimConfig(name="adamw", lr=2e-5, weight_decay=0.1),
        schedule=ScheduleConfig(name="cosine", warmup_ratio=0.03),
        epochs=2,
        precision="bf16",
        grad_clip=1.0,
        gradient_checkpointing=True,
        seed=7,
    )


def _model(chat: str) -> ModelConfig:
    return ModelConfig(
        vision=DINOSIGLIP,
        # prismatic's "fused-gelu-mlp": a hidden width of four times the fused vision width, 4 * (1024 + 1152).
        connector=ConnectorConfig(name="mlp", options={"depth": 3, "hidden_dim": 8704}),
        language=MAMBA_ZEPHYR,
        chat=chat,
        image=ImageConfig(mode="resize"),  # "resize-naive"
    )
