"""GlobEnc: a model and its tokenizer or image processor; texts or images in, attributions out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import nn

from .attribution import Attribution
from .batch_results import CallOptions, image_result, scored_batch, text_result
from .batching import BatchScores, by_length, image_batches, memory_budget, pad
from .class_score_batches import PREDICTED, Label, known_labels, labels_of
from .contributions.backend import check_backend
from .encoders import Encoder
from .errors import blames_text, refuses_target
from .images import ImageAttribution
from .loading import ModelSource, load, load_processor
from .methods import get_method
from .rollouts import Position, plain_position
from .texts import all_encoded, check_encodings, check_positions, check_texts, encode_each, error_of_text
from .tokenization import Encoding

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    from typing_extensions import Unpack

    Image = Path | PIL.Image.Image | np.ndarray[Any, np.dtype[np.uint8]] | torch.Tensor


class GlobEnc:
    """Attribution by GlobEnc: which tokens of a text, or patches of an image, an encoder's answer came from.

    `.model` is the model. Whether all of its weights were loaded cannot be seen in a model that is already made, and
    those that were not are random numbers: `from_pretrained` looks.

    Args:
        model: a transformers encoder of a known family with any head (`globenc.supported_encoders()`).
        tokenizer: its tokenizer, or for images its image processor; None loads the one that belongs to the model's
            name.
        backend: "auto", "torch", "triton" or "reference", see `globenc.attribute`.

    Raises:
        TypeError, ValueError: the model is no supported encoder, the backend is unknown.
        RuntimeError: backend "triton" where it cannot run.

    Example:
        >>> import globenc
        >>> explainer = globenc.GlobEnc.from_pretrained()  # the sentiment classifier in the package
        >>> a = explainer("a charming and often affecting journey")
        >>> a.label, a.scores.shape == (len(a.tokens),)
        ('positive', True)
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, backend: str = "auto"):
        encoder = Encoder.of(model)
        self.model: Any = encoder.model
        self.backend = backend
        self._encoder = encoder  # of its layers as they were: what limits a text does not depend on them
        self._family = encoder.family
        self._tokenizer = tokenizer
        check_backend(backend, self.device)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path | ModelSource | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        backend: str = "auto",
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> GlobEnc:
        """Load a model with its head, and its tokenizer, from a folder or the Hugging Face hub.

        Weights are read from safetensors files of the model's own and from nothing else, and all that the answer
        depends on must be there. The head of a class that the encoder was pretrained as (masked words and the like)
        gives no answer: where it is missing, the bare encoder is taken. A part that is left out, such as a head for
        several texts at once, is said in a warning.

        Args:
            name_or_path: folder or hub name; None is the small sentiment classifier that ships with globenc. Or a
                ModelSource, which has the other arguments in it.
            device: where to run; None is the GPU where there is one, else the CPU.
            dtype: of the weights, such as "float32"; None is the stored one on a GPU, and float32 on a CPU where half
                precision is stored.
            backend: as in the constructor.
            revision: branch, tag or commit on the hub.
            trust_remote_code: allow code that comes with the model to run.

        Raises:
            OSError: there is no such model, it has no safetensors file or no tokenizer, a file cannot be used, or
                weights are missing, of other sizes, or more than its config.json has a place for.
            TypeError: the name is neither a string nor a path, or a ModelSource comes with other arguments.
            ValueError: it is no supported encoder, or the dtype or the device is unknown.
            RuntimeError: there is no such device here.
        """
        name = None if isinstance(name_or_path, ModelSource) else name_or_path
        source = ModelSource(name, device, dtype, backend, revision, trust_remote_code)
        if isinstance(name_or_path, ModelSource):
            if source != ModelSource():
                raise TypeError("device, dtype, backend, revision and trust_remote_code belong into the ModelSource")
            source = name_or_path
        model, tokenizer = load(source)
        return cls(model, tokenizer, source.backend)

    @classmethod
    def of(cls, model: str | Path | ModelSource | GlobEnc | None) -> GlobEnc:
        """What is given as a model, loaded where it is not yet: a GlobEnc, a ModelSource, or a folder or hub name."""
        return model if isinstance(model, GlobEnc) else cls.from_pretrained(model)

    def __repr__(self) -> str:
        name = self.model.config._name_or_path or type(self.model).__name__
        return f"GlobEnc({name!r}, device={str(self.device)!r}, dtype={self.model.dtype}, backend={self.backend!r})"

    @property
    def reads_images(self) -> bool:
        """Whether the model is a vision encoder."""
        return self._family.reads_images

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return next(self.model.parameters()).device

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or its image processor."""
        if self._tokenizer is None:
            name = self.model.config._name_or_path
            if not name:
                raise ValueError(
                    "tokenizer is needed: this model has no name to load one by; GlobEnc(model, tokenizer)"
                )
            try:
                self._tokenizer = load_processor(name, self.reads_images)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"tokenizer is needed: none could be loaded for {name!r} ({error}); GlobEnc(model, tokenizer)"
                ) from error
        return self._tokenizer

    # A string is a text to these signatures: give the path of an image as a Path.
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, texts: str, text_pair: str | None = None, **options: Unpack[CallOptions]
    ) -> Attribution: ...
    @overload
    def __call__(self, texts: Image, text_pair: None = None, **options: Unpack[CallOptions]) -> ImageAttribution: ...
    @overload
    def __call__(
        self, texts: Iterable[str], text_pair: Iterable[str] | None = None, **options: Unpack[CallOptions]
    ) -> list[Attribution]: ...
    @overload
    def __call__(
        self, texts: Sequence[Image], text_pair: None = None, **options: Unpack[CallOptions]
    ) -> list[ImageAttribution]: ...
    @refuses_target
    def __call__(
        self,
        texts: Any,
        text_pair: str | Iterable[str] | None = None,
        *,
        method: str = "N-Enc",
        position: Position = "cls",
        per_layer: bool = False,
        row_normalize: bool = False,
        label: Label = PREDICTED,
        reference: str = "zero",
        max_length: int | None = None,
        batch_tokens: int | None = None,
    ) -> Any:
        """Attribute a text, or many at once; or images.

        Args:
            texts: a text, or several: a list, an array, a column of a table, any iterable of strings. For a vision
                encoder an image, or a list of them: paths, PIL images or uint8 arrays [height, width, 3].
            text_pair: the second text of a pair (a premise's hypothesis, a question's context), one for each text.
            method, position, per_layer, row_normalize: as in `globenc.attribute`; positions count all tokens,
                [CLS] is 0. A weight tensor goes with a single text.
            label: whose logit `class_scores` explain, see `globenc.class_scores`: "predicted", a label's number or
                name, or of several texts one for each; of a masked language model a token; None leaves them out. A
                model that answers for tokens needs the `position` of one. "predicted" of a model without labels, or
                without such a position, is none.
            reference: of `class_scores`, "zero", "model" or "origin".
            max_length: most tokens of a text, special ones included; None is the model's own limit. Longer texts are
                cut, with a warning, and say so in `Attribution.truncated`. Not for images.
            batch_tokens: most tokens, padding included, in one forward pass; None goes by the free memory.
                Texts are sorted by length inside and come back in the order given; their scores do not depend on it.

        Returns:
            An Attribution for a text, a list of them for a list; of images an ImageAttribution.

        Raises:
            OSError: an image's file cannot be read.
            TypeError: a text is not a string; it is named by its index.
            ValueError: an empty text, no text, a token beyond the model's embeddings, a position outside a text, an
                unknown method, position, label or reference. Of several texts the one at fault is named by its index.
            FloatingPointError: the model's activations are not finite.
        """
        for name, number in (("max_length", max_length), ("batch_tokens", batch_tokens)):
            if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
                raise ValueError(f"{name} must be a positive whole number, got {number!r}")
        options = {"method": method, "position": position, "per_layer": per_layer, "row_normalize": row_normalize}
        options["reference"] = reference
        if self.reads_images:
            for name, value in (("text_pair", text_pair), ("max_length", max_length)):
                if value is not None:
                    raise ValueError(f"{name} has no meaning for {self._family.model_type!r}, which reads images")
            return self._images(texts, batch_tokens, label, options)
        single = isinstance(texts, str)
        firsts, seconds = check_texts(texts, text_pair)
        get_method(method)
        labels = known_labels(self.model, self.tokenizer, label, options, None if single else len(firsts))
        limit = self.limit(max_length)
        encodings = all_encoded(self.encode_each(firsts, seconds, limit))
        check_encodings(encodings, firsts, limit, single)
        check_positions(position, encodings, single)
        options["position"] = plain_position(position)
        results: list[Attribution | None] = [None] * len(encodings)

        def score(*batch: int) -> BatchScores:
            asked = {"label": labels_of(labels, batch), "required": labels != PREDICTED}
            return self.score([encodings[i] for i in batch], **asked, **options)

        for batch in self.batches([len(e) for e in encodings], batch_tokens or self.budget(labels is not None)):
            try:
                scored = score(*batch)
            except Exception as error:
                if single or not blames_text(error):
                    raise
                raise error_of_text(error, encodings, batch, score) from error
            for row, i in enumerate(batch):
                given = firsts[i], None if seconds is None else seconds[i]
                results[i] = text_result(self.model, self.tokenizer, encodings[i], given, scored, row, options)
        return results[0] if single else results

    def _images(self, images: Any, batch_tokens: int | None, label: Label, options: dict[str, Any]) -> Any:
        single = not isinstance(images, list | tuple)
        given = [images] if single else images
        if not given:
            raise ValueError("images is an empty list: give at least one image")
        options["position"] = position = plain_position(options["position"])
        labels = known_labels(self.model, None, label, options, None if single else len(given))
        results: list[ImageAttribution] = []
        for batch in image_batches(
            self._encoder, self.tokenizer, given, position, batch_tokens or self.budget(labels is not None), single
        ):
            inputs = {"pixel_values": torch.cat(batch).to(self.device, self.model.dtype)}
            chosen = labels_of(labels, range(len(results), len(results) + len(batch)))
            scored = self._scored(len(batch), inputs, label=chosen, required=labels != PREDICTED, **options)
            results += [
                image_result(self._encoder, self.tokenizer, pixels, scored, row, options)
                for row, pixels in enumerate(batch)
            ]
        return results[0] if single else results

    def encode_each(
        self, texts: Sequence[str], text_pair: Sequence[str] | None, limit: int | None
    ) -> list[Encoding | BaseException]:
        """The tokens of every text, or the error of one that fails in its stead, see `texts.encode_each`."""
        return encode_each(self.tokenizer, self.model, texts, text_pair, limit)

    def score(self, encodings: Sequence[Encoding], **options: Any) -> BatchScores:
        """One padded batch through the model: scores as arrays, predictions; options as in `scored_batch`, of which
        `label` is what `known_labels` gives, and None unless said."""
        return self._scored(len(encodings), pad(encodings, self.tokenizer, self.model), **options)

    def _scored(self, count: int, inputs: dict[str, Any], **options: Any) -> BatchScores:
        return scored_batch(self.model, self.tokenizer, self.backend, count, inputs, **options)

    def limit(self, max_length_: int | None = None) -> int | None:
        """Most tokens of a text that the model, its tokenizer and `max_length_` allow; None where nothing does.

        Where positions are relative, `max_length_` may go beyond the length that the model was made for.
        """
        if max_length_ is not None and self._encoder.takes_any_length:
            return max_length_
        limits = [self._encoder.max_length, self.tokenizer.model_max_length, max_length_]
        return min((limit for limit in limits if limit is not None), default=None)

    def batches(self, lengths: Sequence[int], budget: int) -> list[list[int]]:
        """Indices of texts of these lengths, in batches of up to `budget` tokens, padding included."""
        return by_length(lengths, budget, self._family.padding_invariant)

    def budget(self, explained: bool = False) -> int:
        """Tokens of a batch, padding included, for the memory that is free now, see `batching.memory_budget`."""
        return memory_budget(self.model, explained)
