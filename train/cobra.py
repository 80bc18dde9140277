"""Cobra (arXiv 2403.14520): DINOv2 + SigLIP fused on the channel axis, a three-layer MLP, Mamba-2.8B-Zephyr.

Values from its released configuration (OpenHelix-Team/cobra, cobra/conf/models.py, Cobra_3B): no stage 1 by default,
two epochs of stage 2, batch 128, lr 2e-5, clipping 1.0. Its stage 1 is defined there but unused. "(ours)" marks what
differs:

- weight decay: its configuration says 0.1, but its rule "none for at most one dimension" ran after FSDP had flattened
  every parameter to one, so most likely none acted: 0 here. As written: --optim.weight_decay 0.1.
- its 2,048 tokens are of text, with the 729 patches on top; here a sample has 2,048 in all. As there:
  --data.max_length 2777.

    bash scripts/finetune.sh cobra
"""

from vlmamba.models.builder import ConnectorConfig, ImageConfig, ModelConfig
from vlmamba.training import published
from vlmamba.training.config import BatchConfig, DataConfig, OptimConfig, ScheduleConfig, TrainConfig

INSTRUCT = (published.LLAVA_MIX_665K, published.LVIS_INSTRUCT4V, published.LRV_INSTRUCT)


def pretrain() -> TrainConfig:
    """Stage 1, which Cobra defines and leaves out: the connector alone (batch 256, lr 1e-3, one epoch)."""
    return finetune().replace(
        output="runs/cobra/pretrain",
        model=_model(chat="plain"),  # captions end with a newline, Cobra's with the end-of-text token (ours)
        train=("multi_modal_projector",),
        data=DataConfig(sources=(published.LLAVA_558K,), max_length=2048, image_position="front"),
        batch=BatchConfig(global_batch_size=256, micro_batch_size=16),
        optim=OptimConfig(name="adamw", lr=1e-3, weight_decay=0.0),
        epochs=1,
        gradient_checkpointing=False,
    )


def finetune() -> TrainConfig:
    """Connector and language model together, from a fresh connector, for two epochs."""
    return TrainConfig(
        output="runs/cobra/finetune",
        model=_model(chat="cobra"),
        train=("multi_modal_projector", "language_model"),
        data=DataConfig(
            sources=INSTRUCT, max_length=2048, image_position="front", order="modality_length"
        ),  # 2,048 (ours)
        batch=BatchConfig(global_batch_size=128, micro_batch_size=8),
        optim=OptimConfig(name="adamw", lr=2e-5, weight_decay=0.0),  # (ours)
        schedule=ScheduleConfig(name="cosine", warmup_ratio=0.03),
        epochs=2,
        precision="bf16",
        grad_clip=1.0,
        gradient_checkpointing=True,
        seed=7,
    )


def _model(chat: str) -> ModelConfig:
    return ModelConfig(
        vision=published.DINOSIGLIP,
        # prismatic's "fused-gelu-mlp": a hidden width of four times the fused vision width, 4 * (1024 + 1152).
        connector=ConnectorConfig(name="mlp", options={"depth": 3, "hidden_dim": 8704}),
        language=published.MAMBA_ZEPHYR,
        chat=chat,
        image=ImageConfig(mode="resize"),  # "resize-naive"
    )
