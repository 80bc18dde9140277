"""Decoding: new tokens per second of whole language models, greedy, through `generate`.

Shapes: B batch, L prompt length.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from _common import Case, DisagreementError, alternate, check_same
from torch import Tensor, nn

from vlmamba.models.language import MambaLM, mamba_config

PROMPT = 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def decode_cases(options: Any) -> list[Case]:
    """The playground's size and 130M, one row and eight."""
    sizes = (
        [("playground", 1)]
        if options.quick
        else [("playground", 1), ("playground", 8), ("130m", 1), ("130m", 8)]
    )
    return [decode_case(size, batch, options) for size, batch in sizes]


def language_model(size: str, dtype: torch.dtype, device: str) -> MambaLM:
    """Random weights whose greedy text is not one token for ever."""
    fields: dict[str, Any] = {"tie_word_embeddings": False, "eos_token_id": 0, "pad_token_id": 0}
    if size == "playground":
        fields |= {"hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 600}
        size = "130m"
    torch.manual_seed(0)
    model = MambaLM(mamba_config(size, **fields)).to(device).eval()
    return model.to(dtype)


def decode_case(size: str, batch: int, options: Any) -> Case:
    """One size; all contenders must answer the same tokens."""
    device = options.device
    new = 16 if options.quick else 32
    title = f"decode {options.dtype} {size}, {batch} row(s), {new} new tokens behind {PROMPT}"
    model = language_model(size, DTYPES[options.dtype], device)
    ids = torch.randint(
        1, model.config.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(1)
    )
    ids = ids.to(device)
    generators: dict[str, Callable[[], Tensor]] = {"vlmamba generate": lambda: generate(model, ids, new)}
    if not options.no_peers:
        theirs = transformers_model(model)
        generators["transformers generate"] = lambda: generate(theirs, ids, new)
    want = generators["vlmamba generate"]()
    for name, run in generators.items():
        if not torch.equal(run(), want):
            raise DisagreementError(f"{title}: {name} answers other tokens. Nothing of this case is timed.")
    runs: dict[str, Callable[[], Any]] = dict(generators)
    runs["weights alone"] = _weights_alone(model, batch, new, device)
    rounds = options.rounds or (3 if options.quick else 9)
    timings = alternate(runs, rounds=rounds, device=device, budget=4.0 if options.quick else 30.0)
    case = Case(title, "vlmamba generate", timings, "tokens", float(batch * new))
    case.notes.append("The same tokens from all; 'weights alone' multiplies with every weight once a token.")
    return case


def generate(model: Any, ids: Tensor, new: int, **options: Any) -> Tensor:
    """Greedy continuation, of exactly `new` tokens."""
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


def transformers_model(model: MambaLM) -> Any:
    """The same weights in the MambaForCausalLM of transformers."""
    from transformers import MambaForCausalLM

    theirs = MambaForCausalLM(model.config).eval().to(model.device, model.dtype)
    theirs.load_state_dict(model.state_dict())
    return theirs


def _weights_alone(model: MambaLM, batch: int, new: int, device: str) -> Callable[[], Any]:
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    inputs = [torch.randn(batch, m.in_features, device=device, dtype=m.weight.dtype) for m in linears]

    def run() -> None:
        with torch.inference_mode():
            for _ in range(new):
                for module, x in zip(linears, inputs, strict=True):
                    module(x)

    return run


def weights_cases(options: Any) -> list[Case]:
    """Decoding with weights in fewer bits: is a token, which is bound by reading them, faster?"""
    return [weights_case("playground" if options.quick else "130m", 1, options)]


def weights_case(size: str, batch: int, options: Any) -> Case:
    """Fp32, bf16 and int8 weights in the same greedy loop; each may answer tokens of its own."""
    new = 2
    title = f"weights {size}, {batch} row(s), {new} new tokens behind {PROMPT}"
    full = language_model(size, torch.float32, options.device)
    ids = torch.randint(
        1, full.config.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(1)
    )
    models = {"fp32": full, "bf16": copy.deepcopy(full).bfloat16(), "int8": int8_weights(copy.deepcopy(full))}
    errors = {}
    with torch.inference_mode():
        exact = {"logits": full(ids.to(options.device), logits_to_keep=1).logits}
        for name, model in models.items():
            found = {"logits": model(ids.to(options.device), logits_to_keep=1).logits}
            errors[name] = check_same(title, name, found, exact, 0.1)
    runs = {name: _loop(model, ids.to(options.device), new) for name, model in models.items()}
    rounds = options.rounds or (3 if options.quick else 9)
    timings = alternate(runs, rounds=rounds, device=options.device, budget=4.0 if options.quick else 6.0)
    case = Case(title, "fp32", timings, "tokens", float(batch * new), errors)
    case.notes.append(
        "'error' is that of the logits behind the prompt over their largest; int8 is one scale a row."
    )
    return case


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 with one scale a row, through PyTorch's own (private) product."""

    weight_int8: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-12)
        self.register_buffer("weight_int8", torch.round(weight / scale[:, None]).to(torch.int8))
        self.register_buffer("scale", scale.bfloat16())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in bf16 inside."""
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        y = torch._weight_int8pack_mm(rows, self.weight_int8, self.scale).to(x.dtype)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y if self.bias is None else y + self.bias


def int8_weights(model: MambaLM) -> MambaLM:
    """The model with every large projection and the head in int8 (in place)."""
    for block in model.backbone.blocks():
        for name in ("in_proj", "x_proj", "out_proj"):
            setattr(block.mixer, name, Int8Linear(getattr(block.mixer, name)))
    model.lm_head = Int8Linear(model.lm_head)  # type: ignore[assignment]
    return model


def _loop(model: MambaLM, ids: Tensor, new: int) -> Callable[[], Any]:
    """Decodes `new` tokens behind those of the run before; the prompt is read once, here."""
    with torch.inference_mode():
        last: list[Any] = [model(ids, use_cache=True, logits_to_keep=1)]

    def run() -> None:
        with torch.inference_mode():
            for _ in range(new):
                token = last[0].logits[:, -1:].argmax(-1)
                last[0] = model(token, past_key_values=last[0].past_key_values, logits_to_keep=1)

    return run
