"""Q-Mamba: SigLIP-SO400M, a trained VL-Mamba connector, 256 learned queries through 24 Mamba blocks, Mamba-2.8B-Zephyr.

Values are the paper's: RAdam, cosine, warm-up 0.03, one epoch a stage; stage 1 batch 256 and lr 1e-4 on CC3M-595K;
stage 2 batch 128 and lr 2e-5 on LLaVA-1.5's mix, LVIS-Instruct-4V and LRV-Instruct. "(ours)" marks what it leaves open.

    bash scripts/pretrain.sh q_mamba
    bash scripts/finetune.sh q_mamba --model.connector.options.num_queries 729
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
    feature_layer=-2,  # as VL-Mamba and Cobra
    preset="siglip-so400m-patch14-384",
    hint="hf download google/siglip-so400m-patch14-384 --local-dir checkpoints/siglip-so400m-patch14-384",
)
MAMBA_ZEPHYR = LanguageConfig(
    path="checkpoints/mamba-2.8b-zephyr",
    tokenizer="checkpoints/gpt-neox-20b",
    preset="2.8b",
    hint="hf download xiuyul/mamba-2.8b-zephyr --local-dir checkpoints/mamba-2.8b-zephyr; its tokenizer: "
    "hf download EleutherAI/gpt-neox-20b --include 'tokenizer*' 'special_tokens*' --local-dir checkpoints/gpt-neox-20b",
)
CC3M_595K = SourceConfig(
    annotations="playground/data/LLaVA-CC3M-Pretrain-595K/chat.json",
    image_root="playground/data/LLaVA-CC3M-Pretrain-595K/images",
    expected_rows=595_375,
    hint="hf download liuhaotian/LLaVA-CC3M-Pretrain-595K --repo-type dataset --local-dir "
    "playground/data/LLaVA-CC3M-Pretrain-595K, then unzip images.zip into its images/",
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


def pretrain(num_queries: int = 256) -> TrainConfig:
    """Stage 1: Q-Mamba learns in front of the frozen language model."""
    return TrainConfig(
        output="runs/q_mamba/pretrain",
        model=ModelConfig(
            vision=SIGLIP,
            connector=ConnectorConfig(
                name="qmamba",
                options={"num_queries": num_queries},
                # Table 3: from a trained VL-Mamba is better than from scratch; remove "pre" for the latter.
                init={"pre": "runs/vl_mamba/finetune", "layers": "checkpoints/mamba-130m"},
            ),
            language=MAMBA_ZEPHYR,
            chat="zephyr",
            image=ImageConfig(mode="resize"),  # as Cobra (ours)
        ),
        train=("multi_modal_projector",),
        data=DataConfig(sources=(CC3M_595K,), max_length=2048, order="length"),  # order (ours)
        batch=BatchConfig(global_batch_size=256, micro_batch_size=32),
        optim=OptimConfig(name="radam", lr=1e-4),
        schedule=ScheduleConfig(name="cosine", warmup_ratio=0.03),
        epochs=1,
        precision="bf16",
        grad_clip=1.0,  # as Cobra (ours)
    )


def finetune(num_queries: int = 256) -> TrainConfig:
    """Stage 2: projector and language model."""
    first = pretrain(num_queries)
    return first.replace(
        output="runs/q_mamba/finetune",
        init_from="runs/q_mamba/pretrain",
        model=first.model.replace(connector=first.model.connector.replace(init={})),
        train=("multi_modal_projector", "language_model"),
        data=DataConfig(sources=INSTRUCT, max_length=2048, order="modality_length"),  # order (ours)
        batch=BatchConfig(global_batch_size=128, micro_batch_size=16),
        optim=OptimConfig(name="radam", lr=2e-5),
        gradient_checkpointing=True,
    )
