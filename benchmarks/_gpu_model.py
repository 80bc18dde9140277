"""Pieces of the GPU check about whole models: a stage-2 training step and decoding.

Shapes: B rows, L length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from _common import quartiles
from _gpu_ops import Row, Setting
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vlmamba.models import VLMambaConfig, VLMambaForConditionalGeneration
from vlmamba.models.language import MambaLM, mamba_config, parameter_count
from vlmamba.models.vision.presets import PRESETS
from vlmamba.training.flops import FlopCount, peak_flops
from vlmamba.training.precision import autocast, set_precision

SIZES = ("2.8b", "1.4b", "790m", "370m", "130m")
ROW = 8192
"""Tokens of the packed training row."""
SAMPLE = 930
"""Tokens of a sample: 729 of its image and 201 of text."""
BYTES_PER_WEIGHT = 16
"""Master weight, gradient and AdamW's two moments, fp32."""
ACTIVATIONS = 64 * 2560
"""Layers times width of the size whose activations need 3.2 MB a token without recomputation."""


def train(setting: Setting) -> Iterator[Row]:
    """A stage-2 step of VL-Mamba: SigLIP-SO400M frozen, VSS-L2 and Mamba training, one packed row of 8192 tokens.

    FLOPs are counted operator by operator (torch's FlopCounterMode over one step: matrix products, convolutions and
    attention, forward and backward); the scan's own arithmetic is not in them.
    """
    device = torch.device(setting.device)
    for size in fitting(setting):
        try:
            yield from _train_size(setting, device, size)
            return
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            yield Row(
                "stage-2 step", f"VL-Mamba-{size}", text="out of memory; the next smaller size is tried"
            )


def fitting(setting: Setting) -> list[str]:
    """The sizes whose weights, optimizer states and activations fit by arithmetic, the largest first."""
    if setting.tiny:
        return ["tiny"]
    total = torch.cuda.get_device_properties(0).total_memory
    found = []
    for size in SIZES:
        config = mamba_config(size)
        activations = 3.2e6 * ROW * config.num_hidden_layers * config.hidden_size / ACTIVATIONS
        if parameter_count(config) * BYTES_PER_WEIGHT + activations + 4e9 < 0.95 * total:
            found.append(size)
    return found or [SIZES[-1]]


def _train_size(setting: Setting, device: torch.device, size: str) -> Iterator[Row]:
    model = vl_mamba(size, device)
    model.vision_tower.requires_grad_(False)
    set_precision(model, "bf16")
    model.train()
    model.vision_tower.eval()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, weight_decay=0.0, fused=device.type == "cuda")
    batch = packed_batch(model, device, setting.tiny)

    def step() -> float:
        with autocast("bf16", device):
            loss: Tensor = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    started = time.monotonic()
    step()  # compiles and tunes kernels
    warm_up = time.monotonic() - started
    with FlopCounterMode(display=False) as counter:
        first = step()
    flops = counter.get_total_flops()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    losses = [first]
    while len(seconds) < 3 or (len(seconds) < 15 and not setting.late(15.0)):
        _wait(device)
        started = time.perf_counter()
        losses.append(step())
        _wait(device)
        seconds.append(time.perf_counter() - started)
        if setting.late(2.0):
            break
    low, median, high = quartiles(seconds)
    tokens, images = batch["input_ids"].numel(), batch["pixel_values"].shape[0]
    values = {
        "step s": median,
        "quartiles' distance %": 100 * (high - low) / median,
        "tokens/s": tokens / median,
        "TFLOP/step": flops / 1e12,
        "TFLOP/s": flops / median / 1e12,
    }
    peak = peak_flops(device)
    if peak is not None:
        values["MFU %"] = 100 * flops / median / peak
        supervised = int((batch["labels"] != -100).sum())
        counted = FlopCount.of(model).total(tokens=tokens, supervised=supervised, images=images)
        values["MFU % with scan and convolution, as the log has it"] = 100 * counted / median / peak
    if device.type == "cuda":
        values["memory GiB"] = torch.cuda.max_memory_allocated() / 2**30
    values["first step s"] = warm_up
    finite = all(loss == loss and abs(loss) < 1e4 for loss in losses)
    name = f"VL-Mamba-{size}, bf16, one packed row of {tokens} tokens, {images} images"
    yield Row("stage-2 step", name, values, finite, "" if finite else f"loss is not finite: {losses}")


def vl_mamba(size: str, device: torch.device) -> VLMambaForConditionalGeneration:
    """VL-Mamba with random weights, built on the device."""
    if size == "tiny":
        from vlmamba.testing import tiny_model

        return tiny_model("vss-l2")[0].to(device)
    preset = PRESETS["siglip-so400m-patch14-384"]
    config = VLMambaConfig(
        vision_config={
            "family": preset.family, "feature_layer": -2, "image_size": preset.image_size,
            "config": dict(preset.config),
        },
        connector_config={"name": "vss-l2", "options": {}},
        text_config=mamba_config(size),
        image_token_id=50279,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        return VLMambaForConditionalGeneration(config)


def packed_batch(
    model: VLMambaForConditionalGeneration, device: torch.device, tiny: bool
) -> dict[str, Tensor]:
    """One row packed from samples of an image and text, and a last one of text alone that fills it."""
    visual = model.multi_modal_projector.num_tokens
    sample, length = (visual + 8, 4 * (visual + 8) + 5) if tiny else (SAMPLE, ROW)
    placeholder = model.config.image_token_id
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.text_config.vocab_size
    ids = torch.randint(1, min(placeholder, vocabulary), (length,), generator=generator)
    images = length // sample
    labels = ids.clone()
    for number in range(images):
        start = number * sample + 2
        ids[start : start + visual] = placeholder
    labels[ids == placeholder] = -100
    labels[torch.rand(length, generator=generator) < 0.5] = -100  # half of the text is answers
    tower = model.vision_tower
    pixels = torch.randn(images, 3, tower.image_size, tower.image_size, generator=generator)
    weight = next(tower.parameters())
    return {
        "input_ids": ids[None].to(device),
        "labels": labels[None].to(device),
        "seq_idx": (torch.arange(length) // sample).int()[None].to(device),
        "pixel_values": pixels.to(device, weight.dtype),
    }


def decode(setting: Setting) -> Iterator[Row]:
    """Prefill of 930 tokens and greedy decoding in bf16, with and without CUDA graphs, which must answer the same."""
    device = torch.device(setting.device)
    size = "tiny" if setting.tiny else _decodable()
    model: Any = language_model(size, device)
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    new = 8 if setting.tiny else 128
    for batch in (1,) if setting.tiny else (1, 16):
        if setting.late(10.0):
            yield Row("decode", "all", ok=False, text=f"out of time before {batch} rows")
            return
        ids = torch.randint(
            1, model.config.vocab_size, (batch, 16 if setting.tiny else SAMPLE), device=device
        )
        case = f"Mamba-{size}, bf16, {batch} row(s)"
        with torch.inference_mode():
            run = partial(model, ids, logits_to_keep=1, use_cache=True)
            prefill = _median(run, device, setting)
        values = {"ms": 1e3 * prefill, "tokens/s": ids.numel() / prefill}
        yield Row(f"{case}: prefill of {ids.shape[1]} tokens", "vlmamba", values)
        plain = generate(model, ids, new)
        variants: dict[str, dict[str, Any]] = {"generate": {}}
        if device.type == "cuda":
            variants["generate, CUDA graphs"] = {"cuda_graphs": True}
        for name, options in variants.items():
            try:
                same = torch.equal(generate(model, ids, new, **options), plain)
                run = partial(generate, model, ids, new, **options)
                seconds = _median(run, device, setting) - prefill
            except Exception as error:  # noqa: BLE001 - one way of decoding must not hide the others
                yield Row(
                    f"{case}: {new} new tokens", name, ok=False, text=f"{type(error).__name__}: {error}"[:300]
                )
                continue
            values = _rates(batch * new / seconds, batch, weight_bytes)
            yield Row(f"{case}: {new} new tokens", name, values, same, "" if same else "answers other tokens")
        if device.type == "cuda":
            yield _replay_alone(model, ids, new, case, setting, weight_bytes)


def _decodable() -> str:
    total = torch.cuda.get_device_properties(0).total_memory
    return next((s for s in SIZES if 2 * parameter_count(mamba_config(s)) + 3e9 < total), SIZES[-1])


def language_model(size: str, device: torch.device) -> MambaLM:
    """A Mamba language model with random weights, bf16, built on the device; the head is not tied."""
    config = mamba_config(
        "130m" if size == "tiny" else size, tie_word_embeddings=False, eos_token_id=0, pad_token_id=0
    )
    if size == "tiny":
        fields = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
        config = mamba_config("130m", tie_word_embeddings=False, eos_token_id=0, pad_token_id=0, **fields)
    torch.manual_seed(0)
    with device:
        return MambaLM(config).eval().bfloat16()


def generate(model: Any, ids: Tensor, new: int, **options: Any) -> Tensor:
    """Greedy continuation of exactly `new` tokens."""
    with torch.inference_mode():
        out: Tensor = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            **options,
        )
    return out


def _replay_alone(
    model: MambaLM, ids: Tensor, new: int, case: str, setting: Setting, weight_bytes: int
) -> Row:
    """Graph, head and argmax without `generate` around them: what the GPU itself needs."""
    from vlmamba.models.language import MambaCache

    cache = MambaCache(cuda_graphs=True)
    with torch.inference_mode():
        token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)

        def loop() -> None:
            held = token
            for _ in range(new):
                held = model(held, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)

        loop()
        seconds = _median(loop, ids.device, setting)
    return Row(
        f"{case}: {new} new tokens",
        "own loop, CUDA graphs",
        _rates(ids.shape[0] * new / seconds, ids.shape[0], weight_bytes),
    )


def _rates(tokens: float, batch: int, weight_bytes: int) -> dict[str, float]:
    return {
        "tokens/s": tokens,
        "ms a step": 1e3 * batch / tokens,
        "weights GB/s": weight_bytes * tokens / batch / 1e9,
    }


def _median(run: Callable[[], Any], device: torch.device, setting: Setting) -> float:
    run()
    seconds: list[float] = []
    while len(seconds) < 3 or (len(seconds) < 7 and sum(seconds) < 3.0 and not setting.late(8.0)):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return quartiles(seconds)[1]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
