"""The playground: a small real task that trains through both stages in minutes, without a GPU or a download.

Scenes of real handwritten digits (playground/make_data.py), a mini SigLIP encoder and a mini Mamba that knows the
language but no image (playground/build_mini.py). The stages, what trains in each, and the order of things are those of
train/vl_mamba.py; sizes and learning rates fit the mini parts.

    bash scripts/quickstart.sh
    bash scripts/quickstart.sh --connector qmamba
"""

from vlmamba.errors import ConfigError
from vlmamba.models.builder import ConnectorConfig, LanguageConfig, ModelConfig, VisionConfig
from vlmamba.training.config import (
    BatchConfig,
    DataConfig,
    OptimConfig,
    ScheduleConfig,
    SourceConfig,
    TrainConfig,
)

CONNECTORS = {
    "mlp": {},
    "vss-mlp": {"scan": "bsm", "state_size": 8},
    "vss-l2": {"scan": "bsm", "state_size": 8},
    "qmamba": {
        "num_queries": 32,
        "depth": 2,
        "width": 128,
        "num_heads": 4,
        "state_size": 8,
        # Its default, a vss-l2 in front, does not align within these epochs unless it has been trained (docs/log.md).
        "pre": None,
    },
}
STAGE_1_LR = {"qmamba": 1e-3}  # 3e-3 for the others; docs/log.md has what other rates gave
DATA = "playground/data/mini"
MAKE_DATA = "python playground/make_data.py"


def pretrain(
    connector: str = "vss-l2",
    run: str = "runs/quickstart",
    num_queries: int | None = None,
    front: str | None = None,
    short: bool = False,
) -> TrainConfig:
    """Stage 1: captions; the connector alone trains.

    `num_queries` and `front` (another connector, which had better be trained) are Q-Mamba's; `short` has half the
    epochs here and a third of them in stage 2, for tables of many runs.
    """
    if connector not in CONNECTORS:
        raise ConfigError(
            f"the playground has sizes for the connectors {', '.join(CONNECTORS)}, not for {connector!r}"
        )
    options = dict(CONNECTORS[connector])
    if num_queries is not None:
        options["num_queries"] = num_queries
    if front is not None:
        options.update(pre=front, pre_options=CONNECTORS[front])
    return TrainConfig(
        output=f"{run}/pretrain",
        model=ModelConfig(
            vision=VisionConfig(
                family="siglip", path="playground/mini/siglip", feature_layer=-2, final_norm=True
            ),
            connector=ConnectorConfig(name=connector, options=options),
            language=LanguageConfig(path="playground/mini/mamba"),
            chat="plain",
        ),
        train=("multi_modal_projector",),
        data=DataConfig(
            sources=(
                SourceConfig(
                    annotations=f"{DATA}/pretrain/captions.json",
                    image_root=f"{DATA}/pretrain/images",
                    hint=MAKE_DATA,
                ),
            ),
            max_length=512,
            order="length",
            num_workers=0,
            max_bad_fraction=0.0,
        ),
        batch=BatchConfig(global_batch_size=16, micro_batch_size=16),
        optim=OptimConfig(name="adamw", lr=STAGE_1_LR.get(connector, 3e-3), betas=(0.9, 0.95)),
        schedule=ScheduleConfig(name="cosine", warmup_ratio=0.03),
        epochs=2 if short else 4,
        precision="fp32",
        save_every=200,
        log_every=10,
    )


def finetune(
    connector: str = "vss-l2",
    run: str = "runs/quickstart",
    num_queries: int | None = None,
    front: str | None = None,
    short: bool = False,
) -> TrainConfig:
    """Stage 2: conversations; connector and language model train. For the arguments see `pretrain`."""
    first = pretrain(connector, run, num_queries, front, short)
    return first.replace(
        output=f"{run}/finetune",
        init_from=f"{run}/pretrain",
        model=first.model.replace(chat="vicuna_v1"),
        train=("multi_modal_projector", "language_model"),
        data=first.data.replace(
            sources=(
                SourceConfig(
                    annotations=f"{DATA}/finetune/conversations.json",
                    image_root=f"{DATA}/finetune/images",
                    hint=MAKE_DATA,
                ),
            ),
            order="modality_length",
        ),
        optim=OptimConfig(name="adamw", lr=1e-3, betas=(0.9, 0.95)),
        epochs=1 if short else 3,
    )
