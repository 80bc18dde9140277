"""VLMambaProcessor: images and conversations to model inputs, the one place where prompts are built.

It joins an image processor, a tokenizer and a chat template, and is saved with every checkpoint; training,
evaluation, chat and demo all go through it. Each image becomes ``num_image_tokens`` placeholder ids, which the
model replaces by visual tokens.

Shapes: B batch, L length, n images, C channels, S image size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import BatchFeature, PreTrainedTokenizerBase
from transformers.image_utils import load_image
from transformers.processing_utils import ProcessorMixin

from vlmamba.errors import ConfigError, DataError
from vlmamba.models.chat import (
    IMAGE_TOKEN,
    Message,
    Piece,
    Segment,
    plain_text,
    render_segments,
    split_images,
)

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class Encoded:
    """One encoded conversation.

    Attributes:
        input_ids: Token ids, images expanded to placeholder ids.
        labels: The same ids where the model is to be trained, `IGNORE_INDEX` elsewhere.
        num_images: Images the conversation asks for.
    """

    input_ids: list[int]
    labels: list[int]
    num_images: int


class VLMambaProcessor(ProcessorMixin):
    """Images, tokenizer and chat template of one model.

    Args:
        image_processor: Gives ``{"pixel_values": (n, C, S, S)}``.
        tokenizer: A transformers tokenizer; the image token is added to it when it is not there yet.
        chat_template: Jinja text (see `vlmamba.models.chat`).
        num_image_tokens: Visual tokens an image becomes (729 for SigLIP-SO400M/14 at 384 px and an MLP connector).

    Raises:
        ConfigError: `num_image_tokens` is not positive.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_image_tokens: int = 729,
        **kwargs: Any,
    ) -> None:
        if num_image_tokens < 1:
            raise ConfigError(f"num_image_tokens must be at least 1, got {num_image_tokens}")
        if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
            tokenizer.add_special_tokens(
                {"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.num_image_tokens = num_image_tokens
        self.image_token = IMAGE_TOKEN
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        # What the tokenizer puts before any text by itself (Llama's BOS; GPT-NeoX has none).
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        full = tokenizer("a")["input_ids"]
        self._prefix_ids: list[int] = full[: full.index(bare[0])] if bare and bare[0] in full else []

    @property
    def pad_token_id(self) -> int:
        """Id that fills padded rows; attention masks, never this id, say what padding is."""
        return int(self.tokenizer.pad_token_id)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the inputs that `__call__` and `apply_chat_template` return."""
        return ["input_ids", "attention_mask", "pixel_values"]

    def encode_messages(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> Encoded:
        """Ids and labels of a conversation, by construction from the template's segments.

        Args:
            messages: See `vlmamba.models.chat.render_segments`.
            add_generation_prompt: End with what precedes the next answer.

        Returns:
            The ids, the labels (supervised exactly inside the template's generation blocks) and the image count.
        """
        return self._encode(self._segments(messages, add_generation_prompt))

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        padding: bool | str = False,
        padding_side: str = "left",
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Encode ready-made prompts in which ``<image>`` stands for an image.

        Args:
            images: PIL images, arrays, paths or a list (or list of lists) of these, in the order of the placeholders.
            text: A prompt or a list of prompts.
            padding: Pad rows to the longest.
            padding_side: "left" (for generation) or "right".
            return_tensors: "pt" for tensors.
            **kwargs: `truncation` and `max_length` are refused, since cutting a prompt could cut an image; anything
                else is an error.

        Returns:
            ``input_ids`` and ``attention_mask`` (B, L), and with images ``pixel_values`` (n, C, S, S).

        Raises:
            DataError: The prompts hold another number of placeholders than there are images.
        """
        unknown = {k: v for k, v in kwargs.items() if v not in (None, False) and k != "add_special_tokens"}
        if unknown:
            raise ConfigError(f"VLMambaProcessor does not take {', '.join(map(repr, sorted(unknown)))}")
        if text is None:
            return self._images(images, None, return_tensors)
        prompts = [text] if isinstance(text, str) else list(text)
        encoded = [self._encode([Segment(split_images(prompt), supervised=False)]) for prompt in prompts]
        batched = not isinstance(text, str) or return_tensors is not None
        return self._batch(encoded, images, padding, padding_side, return_tensors, batched)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str | None = None,
        padding: bool | str | None = None,
        padding_side: str = "left",
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render conversations, and with ``tokenize=True`` encode them and their images.

        Images stand in the messages as ``{"type": "image", "image": PIL image, path or URL}`` (or ``"path"``,
        ``"url"``). Text of the messages is literal. Several conversations are padded on the left.

        Args:
            conversation: A list of messages, or a list of such lists.
            chat_template: Another template than the model's own.
            add_generation_prompt: End with what precedes the next answer.
            continue_final_message: Leave the last (assistant) message open, to be continued.
            tokenize: Return ids rather than text.
            return_dict: With `tokenize`, return all model inputs rather than the ids alone.
            return_tensors: "pt" for tensors.
            padding: Pad several conversations; on by default when there are several.
            padding_side: "left" (for generation) or "right".
            processor_kwargs: Taken for transformers' sake; `padding` and `return_tensors` in it count.
            **kwargs: Further template variables.

        Returns:
            Text, ids, or a `BatchFeature` with ``input_ids``, ``attention_mask`` and ``pixel_values``.
        """
        options = dict(processor_kwargs or {})
        padding = options.pop("padding", padding)
        return_tensors = options.pop("return_tensors", return_tensors)
        if options:
            raise ConfigError(f"VLMambaProcessor does not take {', '.join(map(repr, sorted(options)))}")
        batched = bool(conversation) and not isinstance(conversation[0], Mapping)
        conversations = list(conversation) if batched else [conversation]
        rendered = [
            self._segments(messages, add_generation_prompt, chat_template, kwargs, continue_final_message)
            for messages in conversations
        ]
        if not tokenize:
            texts = [plain_text(segments) for segments in rendered]
            return texts if batched else texts[0]
        images = [
            load_image(_image_of(part))
            for messages in conversations
            for message in messages
            if not isinstance(message["content"], str)
            for part in message["content"]
            if part.get("type") == "image"
        ]
        encoded = [self._encode(segments) for segments in rendered]
        padding = len(encoded) > 1 if padding is None else padding
        batch = self._batch(
            encoded, images, padding, padding_side, return_tensors, batched or return_tensors is not None
        )
        return batch if return_dict else batch["input_ids"]

    def _segments(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> list[Segment]:
        template = chat_template or self.chat_template
        if not isinstance(template, str):
            raise ConfigError(
                "the processor has no chat template: give one, or load a checkpoint that has one"
            )
        special = {
            name: token for name, token in self.tokenizer.special_tokens_map.items() if isinstance(token, str)
        }
        segments = render_segments(
            template,
            [dict(m) for m in messages],
            special_tokens=self.tokenizer.all_special_tokens,
            add_generation_prompt=add_generation_prompt,
            variables={**special, **(variables or {})},
        )
        return _reopen_last(segments, special.get("eos_token", "")) if continue_final_message else segments

    def _encode(self, segments: Sequence[Segment]) -> Encoded:
        pieces = [(piece, segment.supervised) for segment in segments for piece in segment.pieces]
        ids: list[int] = list(self._prefix_ids)
        labels: list[int] = [IGNORE_INDEX] * len(ids)
        for (piece, supervised), tokens in zip(pieces, self._tokenize([p for p, _ in pieces]), strict=True):
            ids += tokens
            labels += tokens if supervised and piece.kind != "image" else [IGNORE_INDEX] * len(tokens)
        return Encoded(ids, labels, sum(piece.kind == "image" for piece, _ in pieces))

    def _tokenize(self, pieces: Sequence[Piece]) -> list[list[int]]:
        """Ids of each piece, those of all texts in one call of the tokenizer, which costs more than its work."""
        found = [[self.image_token_id] * self.num_image_tokens if p.kind == "image" else [] for p in pieces]
        for kind in ("text", "literal"):
            places = [place for place, piece in enumerate(pieces) if piece.kind == kind]
            if places:
                encoded = _ids(
                    self.tokenizer, [pieces[place].text for place in places], literal=kind == "literal"
                )
                for place, ids in zip(places, encoded, strict=True):
                    found[place] = ids
        return found

    def _batch(
        self,
        encoded: Sequence[Encoded],
        images: Any,
        padding: bool | str,
        padding_side: str,
        return_tensors: str | None,
        batched: bool,
    ) -> BatchFeature:
        expected = sum(e.num_images for e in encoded)
        pixels = self._images(images, expected, return_tensors)
        rows = [e.input_ids for e in encoded]
        masks = [[1] * len(row) for row in rows]
        if padding:
            width = max(map(len, rows))
            for row, mask in zip(rows, masks, strict=True):
                at = len(row) if padding_side == "right" else 0
                row[at:at] = [self.pad_token_id] * (width - len(row))
                mask[at:at] = [0] * (width - len(mask))
        data: dict[str, Any] = {
            "input_ids": rows if batched else rows[0],
            "attention_mask": masks if batched else masks[0],
        }
        return BatchFeature({**data, **pixels}, tensor_type=return_tensors)

    def _images(self, images: Any, expected: int | None, return_tensors: str | None) -> BatchFeature:
        flat = _flatten(images)
        if expected is not None and len(flat) != expected:
            raise DataError(
                f"the text holds {expected} {IMAGE_TOKEN} placeholder(s) but {len(flat)} image(s) were given; "
                f"put one {IMAGE_TOKEN} in the text for each image"
            )
        if not flat:
            return BatchFeature({})
        return self.image_processor(
            [load_image(i) if isinstance(i, str) else i for i in flat], return_tensors=return_tensors
        )


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, literal: bool) -> list[list[int]]:
    """Ids of texts; `literal`: what looks like a special token is plain text.

    Where nothing is to be cut or padded the tokenizer's own backend is called, without the offsets that nobody reads.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.padding is not None or backend.truncation is not None:
        plain: list[list[int]] = tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=literal,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        return plain
    if backend.encode_special_tokens != literal:
        backend.encode_special_tokens = literal
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _image_of(part: Mapping[str, Any]) -> Any:
    for key in ("image", "path", "url"):
        if part.get(key) is not None:
            return part[key]
    raise DataError("an image part has none of the keys 'image', 'path' and 'url'")


def _flatten(images: Any) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in _flatten(item)]
    return [images]


def _reopen_last(segments: list[Segment], eos: str) -> list[Segment]:
    """Drop what follows the last answer, and its end-of-text token."""
    last = max((i for i, s in enumerate(segments) if s.supervised), default=None)
    if last is None:
        raise DataError("continue_final_message needs a conversation that ends with an assistant message")
    pieces = list(segments[last].pieces)
    if eos and pieces and pieces[-1].kind == "text":
        pieces[-1] = Piece("text", pieces[-1].text.removesuffix(eos))
    return [
        *segments[:last],
        Segment(tuple(p for p in pieces if p.kind != "text" or p.text), supervised=True),
    ]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse a tokenizer that cannot end an answer.

    Raises:
        ConfigError: It has no end-of-text token.
    """
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"the tokenizer at {where} has no eos_token: answers could not end; set one and save it"
        )
