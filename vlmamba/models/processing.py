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
from transformers.processing_utils import ProcessorMixin

from vlmamba.common.images import from_base64
from vlmamba.common.vocabulary import IGNORE_INDEX, IMAGE_TOKEN, Message
from vlmamba.errors import ConfigError, DataError
from vlmamba.models.chat import (
    IMAGE_KEYS,
    Piece,
    Segment,
    marks_answers,
    pieces_of,
    plain_messages,
    plain_text,
    render_segments,
    template_variables,
)
from vlmamba.models.processor_options import BatchOptions, read_options


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
        prefix = full[: full.index(bare[0])] if bare and bare[0] in full else []
        self._prefix = "".join(tokenizer.convert_ids_to_tokens(prefix))

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
        template = self._template()
        return self._encode(
            self._segments(plain_messages(messages, template), add_generation_prompt, template)
        )

    def __call__(
        self, images: Any = None, text: str | Sequence[str] | None = None, **options: Any
    ) -> BatchFeature:
        """Encode ready-made prompts in which ``<image>`` stands for an image.

        Args:
            images: PIL images, arrays, paths or a list (or list of lists) of these, in the order of the placeholders.
            text: A prompt or a list of prompts.
            **options: See `vlmamba.models.processor_options.BatchOptions` (`padding`, `return_tensors`, ...).

        Returns:
            ``input_ids`` and ``attention_mask`` (B, L), and with images ``pixel_values`` (n, C, S, S). One prompt is
            a batch of one.

        Raises:
            ConfigError: An option that would change the result and is not known here.
            DataError: The prompts hold another number of placeholders than there are images.
        """
        asked = read_options(options, self.tokenizer.model_max_length)
        if text is None:
            return self._images(images, asked.return_tensors)
        prompts = [text] if isinstance(text, str) else list(text)
        segments = [[Segment(pieces_of(prompt), supervised=False)] for prompt in prompts]
        if asked.add_special_tokens:
            segments = [self._with_prefix(row) for row in segments]
        return self._batch([self._encode(row) for row in segments], images, asked)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render conversations, and with ``tokenize=True`` encode them and their images.

        Images stand in the messages as ``{"type": "image", "image": PIL image, array or path}`` (or ``"path"``,
        ``"url"``, ``"base64"``; ``"image_url"`` as OpenAI has it). Text of the messages is literal. Rows are padded if
        tensors are asked for, on the left.

        Args:
            conversation: A list of messages, or a list of such lists.
            chat_template: Another template than the model's own.
            add_generation_prompt: End with what precedes the next answer.
            continue_final_message: Leave the last (assistant) message open, to be continued.
            return_assistant_tokens_mask: Also return ``assistant_masks``, 1 at what the model is to say.
            tokenize: Return ids rather than text.
            return_dict: With `tokenize`, return all model inputs rather than the ids alone.
            processor_kwargs: Options as of `__call__`.
            **kwargs: Variables of the template, and options as of `__call__`.

        Returns:
            Text (in which what only looks like a special token is marked, see `vlmamba.models.chat.plain_text`; give
            it to `__call__`), ids, or a `BatchFeature` with ``input_ids``, ``attention_mask`` and ``pixel_values``. One
            conversation is a batch of one, but its text is one string.

        Raises:
            ConfigError: An option that would change the result and is not known here, or `assistant_masks` of a
                template that does not say what the model is to say.
            DataError: The template refuses a conversation, or an image part holds no image.
        """
        template = self._template(chat_template)
        variables = {name: kwargs.pop(name) for name in template_variables(template) & kwargs.keys()}
        asked = read_options({**kwargs, **(processor_kwargs or {})}, self.tokenizer.model_max_length)
        if return_assistant_tokens_mask and not marks_answers(template):
            raise ConfigError(
                "assistant_masks were asked for, but the chat template does not say what the model is to say: put it "
                "between {% generation %} and {% endgeneration %}"
            )
        batched = bool(conversation) and not isinstance(conversation[0], Mapping)
        conversations = [
            plain_messages(messages, template) for messages in (conversation if batched else [conversation])
        ]
        rendered = [
            self._segments(messages, add_generation_prompt, template, variables, continue_final_message)
            for messages in conversations
        ]
        if not tokenize:
            texts = [plain_text(segments, marked=True) for segments in rendered]
            return texts if batched else texts[0]
        images = [
            [_image_of(part) for part in _parts(messages) if part.get("type") == "image"]
            for messages in conversations
        ]
        encoded = [self._encode(segments) for segments in rendered]
        batch = self._batch(encoded, images, asked, assistant_masks=return_assistant_tokens_mask)
        return batch if return_dict else batch["input_ids"]

    def _template(self, chat_template: str | None = None) -> str:
        template = chat_template or self.chat_template
        if not isinstance(template, str):
            raise ConfigError(
                "the processor has no chat template: give one, or load a checkpoint that has one"
            )
        return template

    def _segments(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        template: str,
        variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> list[Segment]:
        special = {
            name: token for name, token in self.tokenizer.special_tokens_map.items() if isinstance(token, str)
        }
        segments = render_segments(
            template,
            messages,
            special_tokens=self.tokenizer.all_special_tokens,
            add_generation_prompt=add_generation_prompt,
            variables={**special, **(variables or {})},
        )
        if continue_final_message:
            segments = _reopen_last(segments, special.get("eos_token", ""))
        return self._with_prefix(segments)

    def _with_prefix(self, segments: list[Segment]) -> list[Segment]:
        """What the tokenizer puts before any text, unless it stands there already."""
        first = segments[0].pieces[0] if segments and segments[0].pieces else Piece("text", "")
        if not self._prefix or (first.kind == "text" and first.text.startswith(self._prefix)):
            return segments
        return [Segment((Piece("text", self._prefix),), supervised=False), *segments]

    def _encode(self, segments: Sequence[Segment]) -> Encoded:
        pieces = [(piece, segment.supervised) for segment in segments for piece in segment.pieces]
        ids: list[int] = []
        labels: list[int] = []
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
        self, encoded: Sequence[Encoded], images: Any, asked: BatchOptions, *, assistant_masks: bool = False
    ) -> BatchFeature:
        _check_counts([e.num_images for e in encoded], images)
        rows = {
            "input_ids": [list(e.input_ids) for e in encoded],
            "attention_mask": [[1] * len(e.input_ids) for e in encoded],
        }
        if assistant_masks:
            rows["assistant_masks"] = [[int(label != IGNORE_INDEX) for label in e.labels] for e in encoded]
        width = asked.width([len(e.input_ids) for e in encoded])
        if width is not None:
            fills = {"input_ids": self.pad_token_id}
            for name, values in rows.items():
                for row in values:
                    at = len(row) if asked.padding_side == "right" else 0
                    row[at:at] = [fills.get(name, 0)] * (width - len(row))
        pixels = self._images(images, asked.return_tensors)
        return BatchFeature({**rows, **pixels}, tensor_type=asked.return_tensors)

    def _images(self, images: Any, return_tensors: str | None) -> BatchFeature:
        flat = _flatten(images)
        return self.image_processor(flat, return_tensors=return_tensors) if flat else BatchFeature({})


def _check_counts(expected: Sequence[int], images: Any) -> None:
    """Raise unless every row has as many images as placeholders; rows are told apart if images come as lists.

    Raises:
        DataError: It has another number.
    """
    nested = isinstance(images, (list, tuple)) and all(
        i is None or isinstance(i, (list, tuple)) for i in images
    )
    groups = [len(_flatten(i)) for i in images] if nested and len(images) == len(expected) else None
    given = len(_flatten(images))
    if sum(expected) != given:
        raise DataError(
            f"the text holds {sum(expected)} {IMAGE_TOKEN} placeholder(s) but {given} image(s) were given; "
            f"put one {IMAGE_TOKEN} in the text for each image"
        )
    if groups is not None and groups != list(expected):
        raise DataError(
            f"the rows hold {list(expected)} {IMAGE_TOKEN} placeholder(s) but come with {groups} image(s)"
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


def _parts(messages: Sequence[Message]) -> list[Mapping[str, Any]]:
    contents = [message.get("content", "") for message in messages]
    return [part for content in contents if not isinstance(content, str) for part in content]


def _image_of(part: Mapping[str, Any]) -> Any:
    for key in IMAGE_KEYS:
        if key in part:
            return from_base64(part[key]) if key == "base64" else part[key]
    raise DataError(f"an image part has none of the keys {', '.join(map(repr, IMAGE_KEYS))}")


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
