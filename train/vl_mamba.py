"""VL-Mamba (arXiv 2403.13600): SigLIP-SO400M, VSS-L2 connector with BSM, Mamba-2.8B on SlimPajama.

Two stages as LLaVA-1.5. The paper gives the parts, the stages, what trains in each and the data; learning rates and
batch sizes it does not give are LLaVA-1.5's (haotian-liu/LLaVA, scripts/v1_5/pretrain.sh and finetune.sh). "(ours)"
marks what neither gives.

    bash scripts/pretrain.sh vl_mamba
    bash scripts/finetune.sh vl_mamba
"""

from vlmamba.models.builder import ConnectorConfig, ImageConfig, ModelConfig
from vlmamba.training import published
from vlmamba.training.config import BatchConfig, DataConfig, OptimConfig, ScheduleConfig, TrainConfig


def pretrain(connector: str = "vss-l2") -> TrainConfig:
    """Stage 1: the connector alone learns to speak to the frozen language model."""
    return TrainConfig(
        output="runs/vl_mamba/pretrain",
        model=ModelConfig(
            vision=published.SIGLIP_SO400M,
            connector=ConnectorConfig(name=connector),
            language=published.MAMBA_SLIMPJ,
            chat="plain",  # LLaVA-1.5 (--version plain)
            image=ImageConfig(mode="pad"),  # LLaVA-1.5's stage 2, here in both (ours)
        ),
        train=("multi_modal_projector",),
        data=DataConfig(
            sources=(published.LLAVA_558K,),
            max_length=2048,
            image_position="front",  # LLaVA's preprocess_multimodal
            order="length",  # (ours)
        ),
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
        data=first.data.replace(sources=(published.LLAVA_MIX_665K,), order="modality_length"),  # LLaVA-1.5
        batch=BatchConfig(global_batch_size=128, micro_batch_size=16),
        optim=OptimConfig(name="adamw", lr=2e-5, weight_decay=0.0),
        gradient_checkpointing=True,
    )
