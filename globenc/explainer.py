"""GlobEnc: a model and its tokenizer or processor in, attributions out. The only file that knows the whole way."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .attribution import Attribution
from .backends import check_backend
from .capture import unwrap
from .encoders import (
    find_family,
    find_layers,
    max_length,
    takes_any_length,
)
from .functional import attribute, patch_grid, patch_size
from .loading import load, load_processor
from .methods import get_method
from .pictures import PictureAttribution, open_picture, seen
from .rollouts import Target, check_target, plain_target
from .tokenization import Encoding, by_length, encode, pad


class GlobEnc:
    """Attribution by GlobEnc: which tokens of a text, or patches of a picture, an encoder's answer came from.

    `.model` is the model. Whether all of its weights were loaded cannot be seen in a model that is already made, and
    those that were not are random numbers: `from_pretrained` looks.

    Args:
        model: a transformers encoder of a known family with any head (`globenc.supported_encoders()`).
        tokenizer: its tokenizer, or for pictures its image processor; None loads the one that belongs to the model's
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
        eager: Any = unwrap(model)
        family = find_family(eager)
        find_layers(eager.base_model, family)
        self.model = eager
        self.backend = backend
        self._family = family
        self._tokenizer = tokenizer
        check_backend(backend, self.device)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        backend: str = "auto",
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> GlobEnc:
        """Load a model with its head, and its tokenizer, from a folder or the Hugging Face hub.

        Weights are read from safetensors files of the model's own and from nothing else, and all that the answer
        depends on must be there. A part that is left out, such as a head for several texts at once, is said in a
        warning.

        Args:
            name_or_path: folder or hub name; None is the small sentiment classifier that ships with globenc.
            device: where to run; None is the GPU where there is one, else the CPU.
            dtype: of the weights, such as "float32"; None is the stored one on a GPU, and float32 on a CPU where half
                precision is stored.
            backend: as in the constructor.
            revision: branch, tag or commit on the hub.
            trust_remote_code: allow code that comes with the model to run.

        Raises:
            OSError: there is no such model, it has no safetensors file or no tokenizer, a file cannot be used, or
                weights are missing, of other sizes, or more than its config.json has a place for.
            TypeError: the name is neither a string nor a path.
            ValueError: it is no supported encoder, or the dtype or the device is unknown.
            RuntimeError: there is no such device here.
        """
        model, tokenizer = load(name_or_path, device, dtype, revision, trust_remote_code)
        return cls(model, tokenizer, backend)

    def __repr__(self) -> str:
        name = self.model.config._name_or_path or type(self.model).__name__
        return f"GlobEnc({name!r}, device={str(self.device)!r}, dtype={self.model.dtype}, backend={self.backend!r})"

    @property
    def reads_pictures(self) -> bool:
        """Whether the model is a vision encoder."""
        return self._family.patches is not None

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
                self._tokenizer = load_processor(name, self.reads_pictures)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"tokenizer is needed: none could be loaded for {name!r} ({error}); GlobEnc(model, tokenizer)"
                ) from error
        return self._tokenizer

    def __call__(
        self,
        texts: Any,
        text_pair: str | Iterable[str] | None = None,
        *,
        method: str = "N-Enc",
        target: Target = "cls",
        layers: bool = False,
        row_normalize: bool = False,
        max_length: int | None = None,
        batch_tokens: int | None = None,
    ) -> Any:
        """Attribute a text, or many at once; or pictures.

        Args:
            texts: a text, or several: a list, an array, a column of a table, any iterable of strings. For a vision
                encoder a picture, or a list of them: paths, PIL images or uint8 arrays [height, width, 3].
            text_pair: the second text of a pair (a premise's hypothesis, a question's context), one for each text.
            method, target, layers, row_normalize: as in `globenc.attribute`; positions count all tokens, [CLS] is 0.
                A weight tensor goes with a single text.
            max_length: most tokens of a text, special ones included; None is the model's own limit. Longer texts are
                cut, with a warning, and say so in `Attribution.truncated`.
            batch_tokens: most tokens, padding included, in one forward pass; None goes by the free memory.
                Texts are sorted by length inside and come back in the order given; their scores do not depend on it.

        Returns:
            An Attribution for a text, a list of them for a list; of pictures a PictureAttribution.

        Raises:
            OSError: a picture's file cannot be read.
            TypeError: a text is not a string; it is named by its place.
            ValueError: an empty text, no text, a target outside a text, an unknown method or target.
            FloatingPointError: the model's activations are not finite.
        """
        if self.reads_pictures:
            return self._pictures(
                texts, text_pair, method=method, target=target, layers=layers, row_normalize=row_normalize
            )
        single = isinstance(texts, str)
        firsts, seconds = _check_texts(texts, text_pair)
        get_method(method)
        for name, number in (("max_length", max_length), ("batch_tokens", batch_tokens)):
            if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
                raise ValueError(f"{name} must be a positive whole number, got {number!r}")
        limit = self.limit(max_length)
        encodings = encode(self.tokenizer, firsts, seconds, limit)
        for i, (encoding, text) in enumerate(zip(encodings, firsts, strict=True)):
            if encoding.empty:
                where = "text" if single else f"text {i}"
                raise ValueError(f"{where} has no token: the tokenizer finds nothing in {text!r}")
            if encoding.unknown:
                where = "the text" if single else f"text {i}"
                warnings.warn(f"the tokenizer knows no word of {where}: is it this model's?", stacklevel=2)
        _warn_truncated(encodings, limit, single)
        for i, encoding in enumerate(encodings):
            try:
                check_target(target, len(encoding), many=len(encodings) > 1)
            except ValueError as error:
                raise ValueError(str(error) if single else f"text {i}: {error}") from None
        options = {"method": method, "target": plain_target(target), "layers": layers, "row_normalize": row_normalize}
        results: list[Attribution | None] = [None] * len(encodings)
        for batch in self.batches([len(e) for e in encodings], batch_tokens or self.budget()):
            scored = self.score([encodings[i] for i in batch], **options)
            for row, i in enumerate(batch):
                pair = None if seconds is None else seconds[i]
                results[i] = self._result(scored, row, encodings[i], firsts[i], pair, options)
        return results[0] if single else results

    def _pictures(self, pictures: Any, text_pair: Any, **options: Any) -> Any:
        if text_pair is not None:
            raise ValueError(f"text_pair has no meaning for {self._family.model_type!r}, which reads pictures")
        single = not isinstance(pictures, list | tuple)
        opened = [
            open_picture(given, "the picture" if single else f"pictures[{k}]")
            for k, given in enumerate([pictures] if single else pictures)
        ]
        if not opened:
            raise ValueError("pictures is an empty list: give at least one picture")
        options["target"] = plain_target(options["target"])
        results = [self._picture(picture, options) for picture in opened]
        return results[0] if single else results

    def _picture(self, picture: Any, options: dict[str, Any]) -> PictureAttribution:
        pixels = self.tokenizer(picture, return_tensors="pt")["pixel_values"]
        inputs = pixels.to(self.device, self.model.dtype)
        grid, names = patch_grid(self.model, inputs), []
        if self._family.patches is not None:
            names = self._family.patches.special(self.model.config)
        out = attribute(self.model, backend=self.backend, pixel_values=inputs, **options)
        labels, probabilities = _answers(self.model, out.model_output, 1)
        scores, scale, layer_scores, layer_scale = (
            None if tensor is None else tensor.cpu().numpy()
            for tensor in (out.scores, out.log2_scale, out.layer_scores, out.layer_log2_scale)
        )
        assert scores is not None
        assert scale is not None
        return PictureAttribution(
            picture=seen(pixels, self.tokenizer)[0],
            tokens=[*names, *(f"{row},{column}" for row in range(grid[0]) for column in range(grid[1]))],
            grid=grid,
            patch=patch_size(self.model),
            scores=scores[0],
            log2_scale=scale[0] if scale[0].ndim else float(scale[0]),
            layer_scores=None if layer_scores is None else layer_scores[:, 0],
            layer_log2_scale=None if layer_scale is None else layer_scale[:, 0],
            label=labels[0],
            probability=probabilities[0],
            method=options["method"],
            target=options["target"],
            row_normalize=options["row_normalize"],
            model=self.model.config._name_or_path or type(self.model).__name__,
        )

    def score(self, encodings: Sequence[Encoding], **options: Any) -> BatchScores:
        """One padded batch through the model: scores as arrays, answers; options as in `globenc.attribute`."""
        out = attribute(self.model, backend=self.backend, **options, **pad(encodings, self.tokenizer, self.model))
        labels, probabilities = _answers(self.model, out.model_output, len(encodings))
        return BatchScores(
            scores=out.scores.cpu().numpy(),
            log2_scale=out.log2_scale.cpu().numpy(),
            layer_scores=None if out.layer_scores is None else out.layer_scores.cpu().numpy(),
            layer_log2_scale=None if out.layer_log2_scale is None else out.layer_log2_scale.cpu().numpy(),
            labels=labels,
            probabilities=probabilities,
        )

    def limit(self, max_length_: int | None = None) -> int | None:
        """Most tokens of a text that the model, its tokenizer and `max_length_` allow; None where nothing does.

        Where positions are relative, `max_length_` may go beyond the length that the model was made for.
        """
        if max_length_ is not None and takes_any_length(self.model):
            return max_length_
        limits = [max_length(self.model), self.tokenizer.model_max_length, max_length_]
        return min((limit for limit in limits if limit is not None), default=None)

    def batches(self, lengths: Sequence[int], budget: int) -> list[list[int]]:
        """Indices of texts of these lengths, in batches of up to `budget` tokens, padding included."""
        return by_length(lengths, budget, self._family.pads)

    def budget(self) -> int:
        """Tokens of a batch, padding included, for the memory that is free now: 256 to 4,096 on a CPU, whose caches
        gain nothing by more, 1,024 to 65,536 on a GPU."""
        cuda = self.device.type == "cuda"
        free = torch.cuda.mem_get_info(self.device)[0] if cuda else _free_memory()
        config = self.model.config
        depth, width, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
        size = max(self.model.dtype.itemsize, 2) + 2  # half precision is accompanied by float32
        token = size * (8 * width * depth + 4 * getattr(config, "intermediate_size", 4 * width) + heads * heads)
        low, high = (1024, 65536) if cuda else (256, 4096)
        fitting = high if free is None else max(low, min(high, free // 2 // token))
        return 1 << fitting.bit_length() - 1

    def _result(
        self,
        scored: BatchScores,
        row: int,
        encoding: Encoding,
        first: str,
        second: str | None,
        options: dict[str, Any],
    ) -> Attribution:
        n = len(encoding)
        whole = isinstance(options["target"], str) and options["target"] == "all"
        scores, scale, layer_scores, layer_scale = scored.of(row, n, whole)
        special, spans = (encoding.segments < 0).tolist(), None if encoding.spans is None else encoding.spans.tolist()
        return Attribution(
            text=first,
            text_pair=second,
            tokens=self.tokenizer.convert_ids_to_tokens(encoding.ids.tolist()),
            offsets=[None if hidden or spans is None else tuple(spans[k]) for k, hidden in enumerate(special)],
            segments=[None if segment < 0 else segment for segment in encoding.segments.tolist()],
            word_ids=[None if word < 0 else word for word in encoding.word_ids.tolist()],
            scores=scores,
            log2_scale=scale if scale.ndim else float(scale),
            layer_scores=layer_scores,
            layer_log2_scale=layer_scale,
            label=scored.labels[row],
            probability=scored.probabilities[row],
            method=options["method"],
            target=options["target"],
            row_normalize=options["row_normalize"],
            model=self.model.config._name_or_path or type(self.model).__name__,
            truncated=encoding.lost,
        )


@dataclass(frozen=True)
class BatchScores:
    """What `globenc.attribute` gives for a batch, as arrays on the CPU, with the answers of a text classifier.

    Attributes:
        scores, log2_scale, layer_scores, layer_log2_scale: as in `globenc.AttributionOutput`.
        labels, probabilities: one for each text; None for models that are no text classifiers.
    """

    scores: np.ndarray
    log2_scale: np.ndarray
    layer_scores: np.ndarray | None
    layer_log2_scale: np.ndarray | None
    labels: list[str | None]
    probabilities: list[float | None]

    def of(self, row: int, n: int, whole: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
        """The four arrays of one text of n tokens, without padding; `whole`: its targets are all of its tokens."""
        scores, scale = self.scores[row, ..., :n], self.log2_scale[row]
        layer_scores = None if self.layer_scores is None else self.layer_scores[:, row, ..., :n]
        layer_scale = None if self.layer_log2_scale is None else self.layer_log2_scale[:, row]
        if whole:
            scores, scale = scores[:n], scale[:n]
            layer_scores = None if layer_scores is None else layer_scores[:, :n]
            layer_scale = None if layer_scale is None else layer_scale[:, :n]
        return scores, scale, layer_scores, layer_scale


def _check_texts(
    texts: str | Iterable[str], text_pair: str | Iterable[str] | None
) -> tuple[list[str], list[str] | None]:
    """Texts and pairs as lists of equal length, every one a string with something in it."""

    def checked(name: str, value: str | Iterable[str]) -> list[str]:
        if isinstance(value, bytes | Mapping) or not isinstance(value, Iterable):
            raise TypeError(f"{name} must be a string or a list of strings, got {type(value).__name__}")
        values = [value] if isinstance(value, str) else list(value)
        for i, text in enumerate(values):
            where = name if isinstance(value, str) else f"{name}[{i}]"
            if not isinstance(text, str):
                got = "None" if text is None else type(text).__name__
                pairs = "; second texts of pairs go to text_pair" if isinstance(text, list | tuple) else ""
                raise TypeError(f"{where} must be a string, got {got}{pairs}")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(f"{where} is no valid text: it holds half of a surrogate pair")
            if not text.strip():
                raise ValueError(f"{where} is empty: there is no token to attribute to")
        return values

    firsts = checked("texts", texts)
    if not firsts:
        raise ValueError("texts is an empty list: give at least one text")
    if text_pair is None:
        return firsts, None
    if isinstance(text_pair, str) != isinstance(texts, str):
        raise TypeError("text_pair must be a string for a text and a list for a list of texts")
    seconds = checked("text_pair", text_pair)
    if len(seconds) != len(firsts):
        raise ValueError(f"text_pair must hold one text for each of the {len(firsts)} texts, got {len(seconds)}")
    return firsts, seconds


def _warn_truncated(encodings: list[Encoding], limit: int | None, single: bool) -> None:
    cut = [(i, e.lost, len(e) + e.lost) for i, e in enumerate(encodings) if e.lost]
    if not cut:
        return
    shown = "; ".join(
        f"{'the text' if single else f'text {i}'} lost {lost:,} of its {full:,} tokens ({lost / full:.0%})"
        for i, lost, full in cut[:5]
    )
    more = f"; and {len(cut) - 5} more" if len(cut) > 5 else ""
    warnings.warn(f"longer than the {limit} tokens that fit, so they were cut: {shown}{more}", stacklevel=3)


def _answers(model: Any, output: Any, count: int) -> tuple[list[str | None], list[float | None]]:
    """Labels and probabilities of a text classifier's answers; None for other heads and for regression."""
    logits = getattr(output, "logits", None)
    kind = model.config.problem_type
    many = model.config.num_labels > 1 and kind != "regression"
    classifies = type(model).__name__.endswith(("ForSequenceClassification", "ForImageClassification"))
    if not classifies or not many or logits is None:
        return [None] * count, [None] * count
    rows = logits.double()
    several = kind == "multi_label_classification"
    probabilities, indices = (rows.sigmoid() if several else rows.softmax(-1)).max(-1)
    if not bool(torch.isfinite(probabilities).all()):
        raise FloatingPointError("the model's logits are not finite: its classification head holds NaN or infinity")
    names = model.config.id2label or {}
    return [str(names.get(i, f"LABEL_{i}")) for i in indices.tolist()], probabilities.tolist()


def _free_memory() -> int | None:
    """Bytes of main memory that are free or can be freed; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
