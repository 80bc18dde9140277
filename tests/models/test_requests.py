"""Random requests to tiny models: each gives what its samples give alone, or the library's error.

A `Request` says what is asked, in small numbers that shrink well. `reference` answers in the plainest form: every
sample alone through the language model's own forward pass, no padding, no packing, no cache, every token of an answer
from a full pass. `forward_answer` and `generate_answer` ask the model as users do. Both speak of tokens by their place
among all tokens of the request's samples, so a batch is one table of places (-1 is padding), and whatever is done to
columns and rows is done to that table, too.

Shapes: B rows of the batch, L columns, N tokens of all samples, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from vlmamba.errors import ConfigError, ShapeError, VLMambaError
from vlmamba.models.language import family_of
from vlmamba.models.language.laws import BOUND
from vlmamba.models.language.recurrent import NEVER
from vlmamba.models.language.versions import cache_of
from vlmamba.testing import tiny_model

FAMILIES = (
    "mamba",
    "llama",
    "mistral",
    "gemma2",
    "granite",
    "mamba2",
    "jamba",
    "falcon_h1",
    "qwen3_5_text",
)
ENDS = [0, *range(1, 330, 3)]  # a third of the tokens, for answers that end early
NEVER_ENDS = 10**6
IGNORED = -100


# --- what is asked --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A sample: so many tokens of text, and for each picture how many of them stand in front of it."""

    text: int
    pictures: tuple[int, ...] = ()


@dataclass(frozen=True)
class Generate:
    """What `generate` is asked besides its inputs."""

    tokens: int
    beams: int = 1
    sequences: int = 1  # with one beam: sampled from the best token alone
    ends: bool = False
    cached: bool = True
    given: str = ""  # "", an "empty" cache, or one "filled" with all but the last column


@dataclass(frozen=True)
class Request:
    """One request; the defaults are the plainest form."""

    family: str
    connector: str
    rows: tuple[Row, ...]
    seed: int = 0
    padding: str = "left"  # "left", "right" or "inner"
    wider: int = 0  # columns of padding that no row needs
    packed: str = ""  # "", by "seq_idx" or by "position_ids"
    split: int = 0  # samples of the first of two packed rows
    shares: bool = False  # masked padding has the number of the sample in front of it, not one of its own
    mask: bool = False  # given even where every column is a token
    bool_mask: bool = False
    positions: bool = False  # given where they follow from something else
    embeds: bool = False
    labels: bool = False
    divisor: str = ""  # "", "num_items", "num_items_in_batch"
    keep: str = "all"
    kept: int = 1
    layers: bool = False
    as_tuple: bool = False
    gradients: bool = False
    use_cache: bool = False
    cuts: tuple[int, ...] = ()  # columns at which the input is cut into parts, each onto the cache
    between: str = ""  # what is done to the cache's rows after the first part
    cache_name: str = "cache"
    say_again: bool = True  # use_cache=True with later parts, too
    generate: Generate | None = None
    bad: str = ""


@st.composite
def _rows(draw: Callable[..., Any], least: int) -> tuple[Row, ...]:
    found = []
    for _ in range(draw(st.integers(1, 4))):
        text = draw(st.integers(least, 12))
        pictures = draw(st.lists(st.integers(0, text), max_size=2)) if draw(st.booleans()) else []
        found.append(Row(text, tuple(sorted(pictures))))
    if not any(row.text or row.pictures for row in found):
        found[0] = Row(1)
    return tuple(found)


@st.composite
def _generations(draw: Callable[..., Any]) -> Generate:
    beams = draw(st.integers(1, 3))
    cached = draw(st.booleans())
    alone = beams == 1
    return Generate(
        tokens=draw(st.integers(1, 4)),
        beams=beams,
        sequences=draw(st.integers(1, 2 if alone else beams)),
        ends=alone and draw(st.booleans()),
        cached=cached,
        given=draw(st.sampled_from(["", "empty", "filled"])) if cached and alone else "",
    )


@st.composite
def requests(draw: Callable[..., Any], families: Sequence[str] = FAMILIES) -> Request:
    """Three forward passes to one `generate`; one in ten is bad."""
    flag = partial(draw, st.booleans())
    kind = draw(st.integers(0, 9))
    common: dict[str, Any] = {
        "family": draw(st.sampled_from(families)),
        "connector": draw(st.sampled_from(["mlp", "qmamba"])),
        "rows": draw(_rows(least=int(kind >= 7))),
        "seed": draw(st.integers(0, 999)),
        "padding": draw(st.sampled_from(["left", "left", "right", "inner"])),
        "wider": draw(st.integers(0, 2)),
        "mask": flag(),
        "bool_mask": flag(),
    }
    if kind == 6:
        return Request(**common, bad=draw(st.sampled_from(SPOILED)))
    if kind >= 7:
        return Request(**common, embeds=flag(), generate=draw(_generations()), cache_name=draw(CACHE_NAMES))
    packed = draw(st.sampled_from(["", "", "", "seq_idx", "position_ids"]))
    cuts = () if packed else tuple(draw(st.lists(st.integers(1, 50), max_size=2)))
    return Request(
        **common,
        packed=packed,
        split=draw(st.integers(0, 3)) if packed else 0,
        shares=bool(packed) and flag(),
        positions=flag(),
        embeds=flag(),
        labels=not cuts and flag(),
        divisor=draw(st.sampled_from(["", "num_items", "num_items_in_batch"])),
        keep=draw(st.sampled_from(["all", "none", "last", "columns", "places", "mask"])),
        kept=draw(st.integers(1, 3)),
        layers=flag(),
        as_tuple=flag(),
        gradients=flag(),
        use_cache=flag() and not packed,
        cuts=cuts,
        between=draw(st.sampled_from(["", "select", "reorder", "repeat"])) if cuts else "",
        cache_name=draw(CACHE_NAMES),
        say_again=flag(),
    )


CACHE_NAMES = st.sampled_from(["cache", "past_key_values"])


# --- the model and the samples --------------------------------------------------------------------------------


@cache
def model_of(family: str, connector: str = "mlp") -> Any:
    """A tiny model whose texts differ: its weights are large enough that something is said."""
    model, _ = tiny_model(connector, language=family)
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.25 * torch.randn(parameter.shape, generator=noise))
    return model


def randomness(request: Request, what: int) -> torch.Generator:
    """The same numbers for the same request and use."""
    return torch.Generator().manual_seed(10 * request.seed + what)


@dataclass(frozen=True)
class Sample:
    """Ids (n,), and pictures with the place of each one's first token."""

    ids: Tensor
    pixels: Tensor
    starts: tuple[int, ...]


def samples_of(request: Request) -> list[Sample]:
    model = model_of(request.family, request.connector)
    tokens = model.multi_modal_projector.num_tokens
    generator = randomness(request, 0)
    found = []
    for row in request.rows:
        text = torch.randint(1, 330, (row.text,), generator=generator)
        pixels = torch.randn(len(row.pictures), 3, 16, 16, generator=generator)
        picture = torch.full((tokens,), model.config.image_token_id)
        pieces, starts, before = [], [], 0
        for number, at in enumerate(row.pictures):
            pieces += [text[before:at], picture]
            starts.append(at + number * tokens)
            before = at
        found.append(Sample(torch.cat([*pieces, text[before:]]), pixels, tuple(starts)))
    return found


def table_of(request: Request, samples: Sequence[Sample]) -> Tensor:
    """(B, L) places of tokens among all tokens, -1 at padding: the batch."""
    ends = torch.tensor([0, *(s.ids.numel() for s in samples)]).cumsum(0).tolist()
    lines = [torch.arange(a, b) for a, b in pairwise(ends)]
    if request.packed:
        split = request.split % len(lines)
        groups = [lines[:split], lines[split:]] if split else [lines]
        lines = [torch.cat(group) for group in groups]
    width = max(line.numel() for line in lines) + request.wider
    table = torch.full((len(lines), max(width, 1)), -1)
    generator = randomness(request, 1)
    for row, line in zip(table, lines, strict=True):
        columns = torch.arange(line.numel())
        if request.padding == "left":
            columns = columns + row.numel() - line.numel()
        elif request.padding == "inner" and request.packed != "position_ids":
            columns = torch.randperm(row.numel(), generator=generator)[: line.numel()].sort().values
        row[columns] = line
    return table


# --- the reference --------------------------------------------------------------------------------------------


def embedded(model: Any, sample: Sample) -> Tensor:
    """(1, n, D): the sample's text, and its pictures, one by one."""
    embeds = model.get_input_embeddings()(sample.ids)
    for picture, start in zip(sample.pixels, sample.starts, strict=True):
        tokens = model.get_image_features(picture[None])[0]
        embeds = torch.cat([embeds[:start], tokens, embeds[start + len(tokens) :]])
    return embeds[None]


def alone(model: Any, embeds: Tensor) -> Any:
    return model.language_model(inputs_embeds=embeds, use_cache=False, output_hidden_states=True)


def reference(request: Request, samples: Sequence[Sample]) -> tuple[Tensor, list[Tensor]]:
    """Logits (N, V) of all samples' tokens, and hidden states (N, D) of every layer."""
    model = model_of(request.family, request.connector)
    outputs = [alone(model, embedded(model, sample)) for sample in samples if sample.ids.numel()]
    layers = zip(*(output.hidden_states for output in outputs), strict=True)
    return torch.cat([o.logits[0] for o in outputs]), [torch.cat([h[0] for h in layer]) for layer in layers]


def reference_loss(request: Request, table: Tensor, logits: Tensor, labels: Tensor, sample: Tensor) -> Tensor:
    """Every token from the one in front of it, where both stand side by side; `labels`, `sample` (N,)."""
    pairs = [
        (a, b)
        for row in table.tolist()
        for a, b in pairwise(row)
        if min(a, b) >= 0 and sample[a] == sample[b] and labels[b] != IGNORED
    ]
    losses = [F.cross_entropy(logits[a], labels[b]) for a, b in pairs]
    return sum(losses, torch.zeros(())) / (7 if request.divisor else max(len(losses), 1))


@dataclass
class Text:
    """An answer of the reference, and whether rounding could have chosen another one."""

    tokens: list[int]
    tie: bool = False


def reference_texts(request: Request, sample: Sample) -> list[Text]:
    """The best texts of a sample, best first: plain beam search, which is greedy with one beam."""
    asked = request.generate
    assert asked is not None
    model = model_of(request.family, request.connector)
    start, placeholder = embedded(model, sample), model.config.image_token_id
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    tie = False
    for _ in range(asked.tokens):
        scored = []
        for score, tokens in beams:
            later = model.get_input_embeddings()(torch.tensor([tokens], dtype=torch.long))
            logits = alone(model, torch.cat([start, later], dim=1)).logits[0, -1].double()
            rounding = 8 * asked.tokens * BOUND * logits.abs().max().item()
            scores = logits.log_softmax(0).index_fill(0, torch.tensor(placeholder), -torch.inf)
            best = scores.topk(asked.beams + 1)
            scored += [(score + s, [*tokens, t]) for s, t in zip(*map(Tensor.tolist, best), strict=True)]
        scored.sort(key=lambda one: -one[0])
        tie |= any(a[0] - b[0] < rounding for a, b in pairwise(scored[: asked.beams + 1]))
        beams = scored[: asked.beams]
        if asked.ends and beams[0][1][-1] in ENDS:
            break
    if asked.beams == 1:
        beams = beams * asked.sequences
    return [Text(tokens, tie) for _, tokens in beams[: asked.sequences]]


# --- the model, asked as users ask it ---------------------------------------------------------------------------


@dataclass
class Answer:
    """Logits (n, V) and hidden states (n, D), the places (n,) of the tokens they belong to, and the loss."""

    logits: list[Tensor] = field(default_factory=list)
    logits_at: list[Tensor] = field(default_factory=list)
    layers: list[list[Tensor]] = field(default_factory=list)
    layers_at: list[Tensor] = field(default_factory=list)
    loss: Tensor | None = None


class Inputs:
    """The arguments of a call for some columns of the table."""

    def __init__(self, request: Request, samples: Sequence[Sample]) -> None:
        self.request = request
        self.model = model_of(request.family, request.connector)
        self.samples = samples
        self.ids = torch.cat([s.ids for s in samples])
        lengths = torch.tensor([s.ids.numel() for s in samples])
        self.sample = torch.arange(len(samples)).repeat_interleave(lengths)
        first = (lengths.cumsum(0) - lengths).tolist()
        self.pictures = {
            at + start: pixels
            for at, s in zip(first, samples, strict=True)
            for start, pixels in zip(s.starts, s.pixels, strict=True)
        }
        labels = torch.where(
            torch.rand(self.ids.shape, generator=randomness(request, 2)) < 0.4, IGNORED, self.ids
        )
        self.labels = labels.masked_fill(self.ids == self.model.config.image_token_id, IGNORED)

    def fill(self, table: Tensor, values: Tensor, padding: Tensor | int) -> Tensor:
        return torch.where(table >= 0, values[table], padding)

    def noise(self, table: Tensor) -> Tensor:
        """Ids that stand at padding and must not be seen."""
        return torch.randint(1, 330, table.shape, generator=randomness(self.request, 3))

    def mask(self, table: Tensor) -> Tensor:
        return (table >= 0) if self.request.bool_mask else (table >= 0).long()

    def content(self, table: Tensor, columns: slice) -> dict[str, Any]:
        """Ids and the pictures that start in these columns; embeddings if a picture is cut in two, or if asked."""
        now = table[:, columns]
        placeholder, tokens = self.model.config.image_token_id, self.model.multi_modal_projector.num_tokens
        ids = self.fill(now, self.ids, self.noise(now))
        starts = [at for at in now.flatten().tolist() if at in self.pictures]
        whole = [at + token for at in starts for token in range(tokens)] == now[ids == placeholder].tolist()
        if whole:
            pixels = torch.stack([self.pictures[at] for at in starts]) if starts else None
            if self.request.embeds:
                return {"inputs_embeds": self.model.embed(ids, pixels)}
            return {"input_ids": ids, "pixel_values": pixels}
        embeds = torch.cat([embedded(self.model, s)[0] for s in self.samples])
        noise = self.model.get_input_embeddings()(self.noise(now))
        return {"inputs_embeds": torch.where((now >= 0)[..., None], embeds[now], noise)}

    def structure(self, table: Tensor, columns: slice) -> dict[str, Any]:
        """Mask, samples and positions."""
        request, seen, now = self.request, table[:, : columns.stop], table[:, columns]
        given: dict[str, Any] = {}
        sample = self.fill(now, self.sample, -1)
        needed = bool((seen < 0).any())
        if request.packed:  # padding may also be one more sample, unless it stands within one
            needed = needed and (request.padding == "inner" or request.shares)
            if needed and request.shares:
                sample = sample.cummax(dim=1).values
            given["seq_idx"] = sample.int()
        elif columns.start and not family_of(self.model.language_model).needs_mask_after_prompt:
            needed = bool((now < 0).any())
        if request.packed != "position_ids" and (needed or request.mask):
            given["attention_mask"] = self.mask(seen)
        if request.packed == "position_ids" or request.positions:
            if request.packed:
                positions = restarting(sample)
            elif "attention_mask" in given:
                positions = (seen >= 0).long().cumsum(1).sub(1).clamp(min=0)[:, columns]
            else:
                positions = torch.arange(columns.start, columns.stop).expand(len(now), -1)
            same = bool((positions == positions[:1]).all())
            given["position_ids"] = positions[:1] if same else positions
        if request.packed == "position_ids":
            del given["seq_idx"]
        return given

    def kept(self, table: Tensor, masked: bool) -> tuple[Any, Tensor]:
        """`logits_to_keep`, and the places whose logits it asks for."""
        rows, width = table.shape
        number, generator = self.request.kept, randomness(self.request, 4)
        match self.request.keep:
            case "none":
                return None, table[:, :0]
            case "last" if number == 1 and masked:  # then it is each row's last token
                last = ((table >= 0) * torch.arange(width)).amax(dim=1, keepdim=True)
                return 1, table.gather(1, last)
            case "last":
                return number, table[:, -number:]
            case "columns":
                columns = torch.randint(0, width, (number,), generator=generator)
                return columns, table[:, columns]
            case "places":
                columns = torch.randint(0, width, (rows, number), generator=generator)
                return columns, table.gather(1, columns)
            case "mask":
                chosen = torch.rand(table.shape, generator=generator) < 0.5
                return chosen, table[chosen]
        return 0, table


def restarting(sample: Tensor) -> Tensor:
    """Positions (B, L) that count from 0 wherever the number changes."""
    found = torch.zeros_like(sample)
    for column in range(1, sample.shape[1]):
        found[:, column] = torch.where(
            sample[:, column] == sample[:, column - 1], found[:, column - 1] + 1, 0
        )
    return found


def parts_of(request: Request, width: int) -> Iterator[slice]:
    ends = sorted({0, width, *(cut % width for cut in request.cuts)})
    return (slice(a, b) for a, b in pairwise(ends))


def forward_answer(request: Request, samples: Sequence[Sample], table: Tensor) -> Answer:
    """The forward pass, in one part or in several onto a cache."""
    inputs = Inputs(request, samples)
    model, answer, held = inputs.model, Answer(), None
    cached = request.use_cache or bool(request.cuts)
    for columns in parts_of(request, table.shape[1]):
        now = table[:, columns]
        call = {**inputs.content(table, columns), **inputs.structure(table, columns)}
        keep, at = inputs.kept(now, "attention_mask" in call)
        call |= {"logits_to_keep": keep, "output_hidden_states": request.layers}
        if cached and (held is None or request.say_again):
            call["use_cache"] = True
        if held is not None:
            call[request.cache_name] = held
        if request.labels:
            hidden = inputs.noise(now) if "attention_mask" in call else IGNORED  # a mask hides labels, too
            call["labels"] = inputs.fill(now, inputs.labels, hidden)
            if request.divisor:
                call[request.divisor] = torch.tensor(7) if request.kept == 2 else 7
        if request.bad:
            spoil(request, call, model)
        output = model(**call, return_dict=not request.as_tuple)
        if request.as_tuple:  # what is None is left out
            wanted = {
                "loss": request.labels,
                "logits": keep is not None,
                "cache": "use_cache" in call or (held is not None and request.family == "mamba"),
                "hidden_states": request.layers,
            }
            names = [name for name, there in wanted.items() if there]
            output = dict(zip(names, output, strict=True))
        else:
            output = {**output, "cache": cache_of(output)}
        held = output.get("cache") if output.get("cache") is not None else held
        answer.loss = output.get("loss")
        if keep is not None:
            answer.logits.append(output["logits"].flatten(0, -2))
            answer.logits_at.append(at.flatten())
        if request.layers:
            answer.layers.append([layer.flatten(0, 1) for layer in output["hidden_states"]])
            answer.layers_at.append(now.flatten())
        if request.between and columns.start == 0:
            table = table[change_rows(request, held, len(table))]
    return answer


def change_rows(request: Request, held: Any, rows: int) -> Tensor:
    """Select, reorder or repeat the rows of a cache; which rows it holds now."""
    generator = randomness(request, 5)
    if request.between == "repeat":
        held.batch_repeat_interleave(2)
        return torch.arange(rows).repeat_interleave(2)
    if request.between == "reorder":
        chosen = torch.randint(0, rows, (rows,), generator=generator)
        held.reorder_cache(chosen)
    else:
        chosen = torch.randperm(rows, generator=generator)[: 1 + request.seed % rows]
        held.batch_select_indices(chosen)
    return chosen


def generate_answer(request: Request, samples: Sequence[Sample], table: Tensor) -> list[list[int]]:
    """The new tokens of every sequence."""
    asked = request.generate
    assert asked is not None
    inputs = Inputs(request, samples)
    model, whole = inputs.model, slice(0, table.shape[1])
    call = inputs.content(table, whole)
    if request.mask or bool((table < 0).any()):
        call["attention_mask"] = inputs.mask(table)
    if given_cache(request, table, inputs):
        if asked.given == "empty":
            first: dict[str, Any] = {}
            model._prepare_cache_for_generation(model.generation_config, first)
            call[request.cache_name] = next(iter(first.values()))
        else:
            prompt = {**call, "input_ids": call["input_ids"][:, :-1]}
            if "attention_mask" in call:
                prompt["attention_mask"] = call["attention_mask"][:, :-1]
            call[request.cache_name] = cache_of(model(**prompt, use_cache=True))
            call["pixel_values"] = None
    tokens = model.generate(
        **call,
        max_new_tokens=asked.tokens,
        use_cache=asked.cached,
        **({"do_sample": True, "top_k": 1} if asked.beams < asked.sequences else {"do_sample": False}),
        num_beams=asked.beams,
        num_return_sequences=asked.sequences,
        eos_token_id=ENDS if asked.ends else NEVER_ENDS,
        pad_token_id=0,
        suppress_tokens=[model.config.image_token_id],
    )
    return (tokens[:, whole.stop :] if "input_ids" in call else tokens).tolist()


def given_cache(request: Request, table: Tensor, inputs: Inputs) -> bool:
    """Whether a cache is given: one filled with all but the last column needs tokens of text there."""
    asked = request.generate
    assert asked is not None
    if asked.given != "filled":
        return asked.given == "empty" and asked.sequences == 1
    last = inputs.fill(table[:, -1], inputs.ids, inputs.model.config.image_token_id)
    text = bool((last != inputs.model.config.image_token_id).all())
    return asked.sequences == 1 and text and not request.embeds and table.shape[1] > 1


# --- requests that are wrong ------------------------------------------------------------------------------------

SPOILED = (
    "a picture too many",
    "a picture too few",
    "ids and embeddings",
    "neither ids nor embeddings",
    "pictures and embeddings",
    "a mask too wide",
    "a mask too narrow",
    "a mask of more rows",
    "seq_idx too wide",
    "seq_idx of more rows",
    "seq_idx on a cache",
    "seq_idx for a cache",
    "positions from 1",
    "positions beside the mask",
    "positions too wide",
    "a cache of another family",
    "a cache of other rows",
    "two caches",
    "an unknown argument",
    "a mask of logits too wide",
    "labels too wide",
    "no columns",
    "no rows",
    "ids of one dimension",
)


def spoil(request: Request, call: dict[str, Any], model: Any) -> None:
    """Make a good call a bad one."""
    ids = call["input_ids"]
    rows, width = ids.shape
    embed = model.get_input_embeddings()
    picture = torch.zeros(1, 3, 16, 16)
    ones = partial(torch.ones, dtype=torch.long)
    text = torch.full((rows, 3), 7)

    def cache_like(family: str, rows: int) -> Any:
        return cache_of(
            model_of(family, request.connector)(input_ids=text[:1].expand(rows, -1), use_cache=True)
        )

    match request.bad:
        case "a picture too many":
            given = call["pixel_values"]
            call["pixel_values"] = picture if given is None else torch.cat([given, picture])
        case "a picture too few":
            if call["pixel_values"] is None:
                ids[0, 0] = model.config.image_token_id
            else:
                call["pixel_values"] = call["pixel_values"][1:] if len(call["pixel_values"]) > 1 else None
        case "ids and embeddings":
            call["inputs_embeds"] = embed(ids)
        case "neither ids nor embeddings":
            call["input_ids"] = None
        case "pictures and embeddings":
            call |= {"input_ids": None, "inputs_embeds": embed(ids), "pixel_values": picture}
        case "a mask too wide":
            call["attention_mask"] = ones(rows, width + 1)
        case "a mask too narrow":
            call["attention_mask"] = ones(rows, width - 1)
        case "a mask of more rows":
            call["attention_mask"] = ones(rows + 1, width)
        case "seq_idx too wide":
            call["seq_idx"] = ones(rows, width + 1).int()
        case "seq_idx of more rows":
            call["seq_idx"] = ones(rows + 1, width).int()
        case "seq_idx on a cache":
            held = cache_like(request.family, rows)
            call |= {
                "seq_idx": ones(rows, width).int(),
                "cache": held,
                "attention_mask": ones(rows, 3 + width),
            }
        case "seq_idx for a cache":
            call |= {"seq_idx": ones(rows, width).int(), "use_cache": True}
        case "positions from 1":
            call |= {"position_ids": torch.arange(1, width + 1)[None], "attention_mask": None}
        case "positions beside the mask":
            call |= {
                "position_ids": torch.arange(1, width + 1).expand(rows, -1),
                "attention_mask": ones(rows, width),
            }
        case "positions too wide":
            call["position_ids"] = torch.arange(width + 1).expand(rows + 1, -1)
        case "a cache of another family":
            attention = {f for f in FAMILIES if kind_of(f) is DynamicCache}
            others = sorted(set(FAMILIES) - (attention if request.family in attention else {request.family}))
            other = others[request.seed % len(others)]
            call |= {"cache": cache_like(other, rows), "attention_mask": ones(rows, 3 + width)}
        case "a cache of other rows":
            call |= {"cache": cache_like(request.family, rows + 1), "attention_mask": ones(rows, 3 + width)}
        case "two caches":
            call |= {
                "cache": cache_like(request.family, rows),
                "past_key_values": cache_like(request.family, rows),
            }
        case "an unknown argument":
            call["pixel_value"] = picture
        case "a mask of logits too wide":
            call["logits_to_keep"] = ones(rows, width + 1).bool()
        case "labels too wide":
            call["labels"] = ones(rows, width + 1)
        case "no columns":
            call |= {"input_ids": ids[:, :0], "pixel_values": None, "attention_mask": None}
        case "no rows":
            call |= {"input_ids": ids[:0], "pixel_values": None, "attention_mask": None}
        case "ids of one dimension":
            call |= {"input_ids": text[0], "pixel_values": None, "attention_mask": None}


def kind_of(family: str) -> type:
    """The class of a family's caches."""
    first: dict[str, Any] = {}
    model = model_of(family)
    model._prepare_cache_for_generation(model.generation_config, first)
    return type(next(iter(first.values())))


# --- the property -----------------------------------------------------------------------------------------------


def may_refuse(request: Request, table: Tensor) -> bool:
    """Whether the family says beforehand that it cannot do this."""
    model = model_of(request.family, request.connector).language_model
    family, real = family_of(model), table >= 0
    asked = request.generate
    cached = asked.cached or request.embeds if asked else request.use_cache or bool(request.cuts)
    parts = list(parts_of(request, table.shape[1]))
    if asked and asked.given == "filled":  # all but the last column go onto the cache first
        parts = [slice(0, table.shape[1] - 1), slice(table.shape[1] - 1, table.shape[1])]
    several = [p.stop - p.start > 1 for p in parts][1:]
    lonely = [bool(real[:, p].all()) for p in parts if p.stop - p.start == 1]
    behind = bool((real[:, 1:] < real[:, :-1]).any())
    between = any("01" in "".join(map(str, row)).lstrip("0") for row in real.int().tolist())
    between = between or (behind and bool(asked))  # a text goes on behind the padding
    return (
        (bool(request.packed) and family.packs is not True)
        or (family.pads is not True and not bool(real.all()))
        or (family.continues is not True and ((cached and behind) or between))
        or (family.continues is not True and family.stateful and cached and not all(lonely))
        or (model.config.model_type in NEVER and any(several))
    )


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value."""
    if not found.numel():
        return 0.0
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def check(request: Request) -> str:
    """The property: the reference's answer, or the library's error for a reason. Which of them it was."""
    samples = samples_of(request)
    table = table_of(request, samples)
    refusable = may_refuse(request, table)
    try:
        with torch.set_grad_enabled(request.gradients):
            answer = (generate_answer if request.generate else forward_answer)(request, samples, table)
    except (VLMambaError, TypeError) as raised:
        if request.bad:
            wanted = TypeError if request.bad == "an unknown argument" else ShapeError
            said_no = isinstance(raised, ConfigError) and (refusable or says_no_first(request))
            assert isinstance(raised, wanted) or said_no, raised
        else:
            assert refusable, f"a good request was refused: {raised}"
            assert isinstance(raised, ConfigError), raised
        return "bad" if request.bad else "refused"
    assert not request.bad, "a bad request was answered"
    with torch.no_grad():
        if isinstance(answer, Answer):
            check_values(request, samples, table, answer)
            return "values"
        return check_texts(request, samples, answer)


def says_no_first(request: Request) -> bool:
    """A family that packs or continues nothing says so before anybody looks at shapes."""
    family = family_of(model_of(request.family, request.connector).language_model)
    packs = family.packs is True or "seq_idx" not in request.bad
    continues = request.family not in NEVER or "cache" not in request.bad
    return not (packs and continues)


def check_values(request: Request, samples: Sequence[Sample], table: Tensor, answer: Answer) -> None:
    logits, layers = reference(request, samples)
    found, at = (
        (torch.cat(values) for values in (answer.logits, answer.logits_at))
        if answer.logits
        else (logits[:0], table[0, :0])
    )
    assert len(found) == len(at)
    assert error(found[at >= 0], logits[at[at >= 0]]) <= BOUND, "logits"
    if request.layers:
        at = torch.cat(answer.layers_at)
        assert {len(part) for part in answer.layers} == {len(layers)}
        for number, wanted in enumerate(layers):
            hidden = torch.cat([part[number] for part in answer.layers])
            assert error(hidden[at >= 0], wanted[at[at >= 0]]) <= BOUND, f"hidden states {number}"
    if request.labels:
        inputs = Inputs(request, samples)
        loss = reference_loss(request, table, logits, inputs.labels, inputs.sample)
        assert abs(answer.loss - loss) <= BOUND * loss.clamp(min=1), "loss"


def check_texts(request: Request, samples: Sequence[Sample], answer: list[list[int]]) -> str:
    wanted = [text for sample in samples for text in reference_texts(request, sample)]
    assert len(answer) == len(wanted)
    for found, text in zip(answer, wanted, strict=True):
        if not text.tie:
            assert found[: len(text.tokens)] == text.tokens
            assert not any(found[len(text.tokens) :])
    return "ties" if any(text.tie for text in wanted) else "texts"


QUICK = settings(max_examples=100, derandomize=True, deadline=None, database=None)


@settings(QUICK, suppress_health_check=[HealthCheck.too_slow])
@given(request_=requests())
def test_some_requests(request_):
    event(check(request_))


@pytest.mark.parametrize("bad", SPOILED)
def test_a_wrong_request_is_refused_by_every_family(bad):
    for family in FAMILIES:
        check(Request(family, "mlp", (Row(5, (2,)), Row(3)), bad=bad))


@pytest.mark.parametrize("columns", [3, 5])
def test_generate_refuses_a_cache_that_leaves_nothing_of_the_prompt(columns):
    ids = torch.arange(20, 25)[None]
    for family in FAMILIES:
        model = model_of(family)
        held = cache_of(model(input_ids=ids, use_cache=True))
        with pytest.raises(ShapeError, match=f"the cache holds 5 columns and the prompt has {columns}"):
            model.generate(input_ids=ids[:, :columns], cache=held, max_new_tokens=2)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("family", FAMILIES)
def test_ten_thousand_requests(family):
    @settings(
        max_examples=1112,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(requests([family]))
    def run(request_):
        event(check(request_))

    run()
