"""Q-Mamba: SigLIP-SO400M, a trained VL-Mamba connector, 256 learned queries through 24 Mamba blocks, Mamba-2.8B-Zephyr.

Values are the paper's: RAdam, cosine, warm-up 0.03, one epoch a stage; stage 1 batch 256 and lr 1e-4 on CC3M-595K;
stage 2 batch 128 and lr 2e-5 on LLaVA-1.5's mix, LVIS-Instruct-4V and LRV-Instruct. "(ours)" marks what it leaves open.

    bash scripts/pretrain.sh q_mamba
    bash scripts/finetune.sh q_mamba --model.connector.options.num_queries 729
"""

from vlmamba.models.builder import ConnectorConfig, ImageConfig, ModelConfig
from vlmamba.training import published
from vlmamba.training.config import BatchConfig, DataConfig, OptimConfig, ScheduleConfig, TrainConfig

INSTRUCT = (published.LLAVA_MIX_665K, published.LVIS_INSTRUCT4V, published.LRV_INSTRUCT)


def pretrain(num_queries: int = 256) -> TrainConfig:
    """Stage 1: Q-Mamba learns in front of the frozen language model."""
    return TrainConfig(
        output="runs/q_mamba/pretrain",
        model=ModelConfig(
            vision=published.SIGLIP_SO400M,
            connector=ConnectorConfig(
                name="qmamba",
                options={"num_queries": num_queries},
                # Table 3: from a trained VL-Mamba is better than from scratch; remove "pre" for the latter.
                init={"pre": "runs/vl_mamba/finetune", "layers": "checkpoints/mamba-130m"},
            ),
            language=published.MAMBA_ZEPHYR,
            chat="cobra",  # whose code and language model it shares; in stage 1 too (ours)
            image=ImageConfig(mode="resize"),  # as Cobra (ours)
        ),
        train=("multi_modal_projector",),
        data=DataConfig(
            sources=(published.CC3M_595K,), max_length=2048, image_position="front", order="length"
        ),  # length and order (ours)
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
        data=DataConfig(
            sources=INSTRUCT, max_length=2048, image_position="front", order="modality_length"
        ),  # length and order (ours)
        batch=BatchConfig(global_batch_size=128, micro_batch_size=16),
        optim=OptimConfig(name="radam", lr=2e-5),
        gradient_checkpointing=True,
    )
