"""What takes more than one question to a model: captions that are filtered, retrieval that is ranked twice."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .engine import Engine, Vectors
from .errors import InputError
from .filtering import filtered
from .inputs import ImageLike, listed, pixels_of
from .requests import Filtered, Found


def capfilt(
    engine: Engine,
    images: Sequence[ImageLike],
    texts: Sequence[str | None] | None = None,
    *,
    captioner: str = "caption",
    judge: str = "itm",
    **options: Any,
) -> list[Filtered]:
    """Caption every image, and keep of the caption and the text it came with those that fit.

    `texts` is None, or has a text or None for each image; `captioner` and `judge` are names of the engine's models.
    Kept is what the matching head finds likelier to fit than not (Li et al. 2022, section 3.3,
    https://arxiv.org/abs/2201.12086, where captions are sampled: `do_sample=True, top_p=0.9`). Options:
    `requests.GenerationOptions`. Raises InputError for another number of texts; else errors are as of `Engine.caption`.
    """
    images = listed("images", images)
    given = [None] * len(images) if texts is None else listed("texts", texts)
    if len(given) != len(images):
        raise InputError(f"{len(images)} images and {len(given)} texts: there must be a text or None for each image")
    captions = engine.caption(images, model=captioner, **options)
    webs = [[] if text is None else [text] for text in given]
    pairs = [
        (image, text)
        for image, web, caption in zip(images, webs, captions, strict=True)
        for text in (*web, caption.text)
    ]
    found = iter(engine.match([image for image, _ in pairs], [text for _, text in pairs], model=judge))
    results = []
    for web, caption in zip(webs, captions, strict=True):
        chances = {text: next(found).itm for text in (*web, caption.text)}
        results.append(filtered(caption, web[0] if web else None, chances))
    return results


@dataclass(frozen=True)
class _Search:
    """A retrieval model with images, decoded once, and how texts are read."""

    engine: Engine
    model: str
    options: Mapping[str, Any]
    images: list[ImageLike]
    texts: list[str]

    @classmethod
    def over(
        cls, engine: Engine, images: Sequence[ImageLike], texts: Sequence[str], model: str, options: Mapping[str, Any]
    ) -> "_Search":
        size = engine.image_size(model)
        pixels: list[ImageLike] = [pixels_of(image, size) for image in listed("images", images)]
        return cls(engine, model, options, pixels, listed("texts", texts))

    def similarity(self, vectors: Vectors | None) -> Vectors:
        """Cosines (images, texts)."""
        if vectors is None:
            vectors = self.engine.embed(images=self.images, model=self.model)
        if len(vectors) != len(self.images):
            raise InputError(f"{len(self.images)} images and {len(vectors)} vectors: there must be one for each image")
        return vectors @ self.engine.embed(texts=self.texts, model=self.model, **self.options).T

    def rerank(self, similarity: Vectors, k: int, pair: Callable[[int, int], tuple[int, int]]) -> list[list[Found]]:
        """Match the `k` nearest of every row of (queries, others) cosines; `pair` gives (image, text)."""
        if k < 1:
            raise InputError(f"k must be 1 or more, not {k}")
        near = np.argsort(-similarity, axis=1, kind="stable")[:, :k].tolist()
        pairs = [pair(query, other) for query, row in enumerate(near) for other in row]
        matches = iter(
            self.engine.match(
                [self.images[image] for image, _ in pairs],
                [self.texts[text] for _, text in pairs],
                model=self.model,
                **self.options,
            )
        )
        found = ([(other, next(matches)) for other in row] for row in near)
        return [
            sorted((Found(n, m.itm_logit + m.itc, m) for n, m in row), key=lambda entry: -entry.score) for row in found
        ]


def find_images(
    engine: Engine,
    texts: Sequence[str],
    images: Sequence[ImageLike],
    k: int = 16,
    *,
    image_vectors: Vectors | None = None,
    model: str = "itm",
    **options: Any,
) -> list[list[Found]]:
    """For every text the `k` images of the largest cosine, best first by the matching head's logit + the cosine.

    `image_vectors` (images, projection) are those of `Engine.embed`, if they were kept. Source: `evaluation` in
    `train_retrieval.py` of https://github.com/salesforce/BLIP, which sets `enc_token` and has k = 128 or 256. Options:
    `requests.MatchOptions`. Errors are as of `Engine.match`.
    """
    search = _Search.over(engine, images, texts, model, options)
    return search.rerank(search.similarity(image_vectors).T, k, lambda text, image: (image, text))


def find_texts(
    engine: Engine,
    images: Sequence[ImageLike],
    texts: Sequence[str],
    k: int = 16,
    *,
    image_vectors: Vectors | None = None,
    model: str = "itm",
    **options: Any,
) -> list[list[Found]]:
    """For every image the `k` texts of the largest cosine, best first; else as `find_images`."""
    search = _Search.over(engine, images, texts, model, options)
    return search.rerank(search.similarity(image_vectors), k, lambda image, text: (image, text))
