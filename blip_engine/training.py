"""BLIP's losses of images with their texts: contrast (ITC) and matching (ITM).

Source: Li et al. 2022, https://arxiv.org/abs/2201.12086, section 3.2; momentum encoder, queue and soft targets are of
Li et al. 2021, https://arxiv.org/abs/2107.07651. The third loss, of captions, is `BlipForConditionalGeneration`'s.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import InputError, OptionError
from .models import BlipForImageTextRetrieval
from .outputs import ModelOutput

_TEMPERATURES: Final = (0.001, 0.5)  # the range that Salesforce keeps it in


@dataclass
class ImageTextLosses(ModelOutput):
    """Of `ImageTextObjective`: numbers, with gradients."""

    loss: Tensor  # the sum of both
    contrastive_loss: Tensor  # ITC
    matching_loss: Tensor  # ITM


@dataclass(frozen=True)
class _Keys:
    """What the images and texts of a batch are compared with: the batch itself, first, and the queue."""

    images: Tensor  # (N, projection), unit length
    texts: Tensor  # (N, projection), of the same pairs
    ids: Tensor  # (N,) which image a pair belongs to


class ImageTextObjective(nn.Module):
    """A retrieval model and what only its training needs: temperature, momentum encoder and queue.

    `objective(**inputs).loss.backward()` reaches every parameter of `model`, which keeps the tensors of a checkpoint;
    give the optimizer `objective.parameters()`, so that the temperature is learned too.

    With `momentum` (Salesforce: 0.995) images and texts are compared with those of a slowly following copy of the
    model, and with the last `queue_size` pairs (Salesforce: 57,600) that this copy has seen. Without it the batch is
    compared with itself. The copy follows and the queue moves in training mode only. `enc_token_id` stands in for a
    text's first id where it is fused with an image, as Salesforce trains it (30523, [ENC], in BLIP's vocabulary); None
    leaves [CLS] there, as transformers does. Raises OptionError for values out of range.
    """

    queued_images: Tensor
    queued_texts: Tensor
    queued_ids: Tensor
    seen: Tensor

    def __init__(
        self,
        model: BlipForImageTextRetrieval,
        *,
        momentum: float | None = None,
        queue_size: int = 0,
        temperature: float = 0.07,
        enc_token_id: int | None = None,
    ) -> None:
        super().__init__()
        _check(momentum, queue_size, temperature, enc_token_id, model.config.text_config.vocab_size)
        self.model, self.momentum, self.enc_token_id = model, momentum, enc_token_id
        self.temperature = nn.Parameter(torch.tensor(float(temperature), device=model.device))
        self.teacher = None if momentum is None else deepcopy(model).requires_grad_(requires_grad=False)
        width = model.config.image_text_hidden_size
        self.register_buffer("queued_images", torch.zeros(queue_size, width, device=model.device))
        self.register_buffer("queued_texts", torch.zeros(queue_size, width, device=model.device))
        self.register_buffer("queued_ids", torch.zeros(queue_size, dtype=torch.long, device=model.device))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))  # pairs that went through the queue

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
        alpha: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> ImageTextLosses:
        """The losses of texts `input_ids` (B, T) that belong to images `pixel_values` (B, 3, H, W), row by row.

        Rows of equal `image_ids` (B,), whole numbers from 0, are of one image: none of them is another one's negative,
        in the queue neither; without them every row is its own. `alpha` (Salesforce: 0.4, after a ramp) is the share of
        the copy's own judgement in the contrastive targets. `generator`, on the model's device, draws the negatives of
        the matching loss. Raises InputError for a batch without negatives, OptionError for an `alpha` without a copy.
        """
        if not 0 <= alpha <= 1 or (alpha and self.teacher is None):
            raise OptionError(f"alpha must be 0 to 1, and 0 without momentum, not {alpha!r}")
        self.temperature.data.clamp_(*_TEMPERATURES)  # .data: a graph that another call left behind stays valid
        states = self.model.vision_model(pixel_values).last_hidden_state
        images, texts = self.model.project_image(states).float(), _texts(self.model, input_ids, attention_mask)
        keys = self._keys(images, texts, self._ids(image_ids, images), pixel_values, input_ids, attention_mask)
        same = keys.ids[: len(images), None] == keys.ids
        contrastive = contrastive_loss(images, texts, keys.images, keys.texts, same, self.temperature, alpha)
        matching = self._matching_loss(
            states, images @ texts.T, same[:, : len(images)], input_ids, attention_mask, generator
        )
        if self.training and len(self.queued_ids):
            self._enqueue(keys, len(images))
        return ImageTextLosses(contrastive + matching, contrastive, matching)

    def _ids(self, image_ids: Tensor | None, images: Tensor) -> Tensor:
        if image_ids is None:  # ids that no other row has, of this batch or of the queue
            return -1 - int(self.seen) - torch.arange(len(images), device=images.device)
        if image_ids.shape != images.shape[:1]:
            raise InputError(f"image_ids must be one per image ({len(images)},), not {tuple(image_ids.shape)}")
        return image_ids.to(images.device)

    def _keys(
        self, images: Tensor, texts: Tensor, ids: Tensor, pixels: Tensor, input_ids: Tensor, mask: Tensor | None
    ) -> _Keys:
        if self.teacher is None:
            return _Keys(images, texts, ids)
        with torch.no_grad():
            if self.training:
                self._follow(self.teacher)
            images = self.teacher.project_image(self.teacher.vision_model(pixels).last_hidden_state).float()
            texts = _texts(self.teacher, input_ids, mask)
            held = min(int(self.seen), len(self.queued_ids))
            return _Keys(
                torch.cat([images, self.queued_images[:held]]),
                torch.cat([texts, self.queued_texts[:held]]),
                torch.cat([ids, self.queued_ids[:held]]),
            )

    def _follow(self, teacher: BlipForImageTextRetrieval) -> None:
        share = 1.0 - (self.momentum or 0.0)
        for follower, leader in zip(teacher.parameters(), self.model.parameters(), strict=True):
            follower.lerp_(leader, share)

    def _enqueue(self, keys: _Keys, rows: int) -> None:
        """Put the batch's pairs in place of the oldest."""
        size = len(self.queued_ids)
        first = max(0, rows - size)  # of a batch that is larger than the queue the last ones stay
        places = (int(self.seen) + torch.arange(first, rows, device=keys.ids.device)) % size
        self.queued_images[places] = keys.images[first:rows]
        self.queued_texts[places] = keys.texts[first:rows]
        self.queued_ids[places] = keys.ids[first:rows]
        self.seen += rows

    def _matching_loss(
        self,
        states: Tensor,
        similarity: Tensor,
        same: Tensor,
        input_ids: Tensor,
        mask: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Cross-entropy of "matches": true pairs, each text with a wrong image and each image with a wrong text."""
        logits = (similarity / self.temperature).detach()
        image_of_text = hard_negatives(logits.T, same.T, generator)
        text_of_image = hard_negatives(logits, same, generator)
        if self.enc_token_id is not None:
            input_ids = input_ids.clone()
            input_ids[:, 0] = self.enc_token_id
        rows = torch.arange(len(states), device=states.device)
        shown, said = torch.cat([rows, image_of_text, rows]), torch.cat([rows, rows, text_of_image])
        fused = self.model.fuse(input_ids[said], None if mask is None else mask[said], states[shown])
        matches = (torch.arange(len(shown), device=states.device) < len(rows)).long()
        return F.cross_entropy(self.model.itm_head(fused[:, 0]).float(), matches)


def contrastive_loss(
    images: Tensor,
    texts: Tensor,
    key_images: Tensor,
    key_texts: Tensor,
    same: Tensor,
    temperature: Tensor | float,
    alpha: float = 0.0,
) -> Tensor:
    """How badly each of B images finds its texts, and each text its image, among N keys: one number.

    The keys' first B rows are the batch's own, as the momentum encoder sees them where there is one. `same` (B, N) is
    True where key and row belong together; a row's truth is spread evenly over these. `alpha` of the target is what the
    keys' own rows find instead of the truth. Vectors (·, width) are of unit length.
    """
    truth = same / same.sum(1, keepdim=True)
    directions = (images, key_images, key_texts), (texts, key_texts, key_images)
    losses = []
    for queries, judges, keys in directions:
        judged = (judges[: len(queries)] @ keys.T / temperature).softmax(1).detach() if alpha else truth
        losses.append(F.cross_entropy(queries @ keys.T / temperature, torch.lerp(truth, judged, alpha)))
    return (losses[0] + losses[1]) / 2


def hard_negatives(logits: Tensor, same: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """For each of N rows the column of a wrong one, (N,), drawn by the softmax of `logits` (N, M).

    Never one that `same` (N, M) says belongs to the row. Raises InputError when all do.
    """
    lonely = same.all(1).nonzero()
    if len(lonely):
        raise InputError(f"row {int(lonely[0])} has no negative: a batch needs pairs of at least two different images")
    return logits.masked_fill(same, -torch.inf).softmax(1).multinomial(1, generator=generator).squeeze(1)


def _texts(model: BlipForImageTextRetrieval, input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Unit vectors (B, projection) of texts by themselves."""
    return model.project_text(model.text_encoder(input_ids, mask).last_hidden_state).float()


def _check(momentum: float | None, queue_size: int, temperature: float, enc_token_id: int | None, words: int) -> None:
    if momentum is not None and not 0 <= momentum <= 1:
        raise OptionError(f"momentum must be 0 to 1, or None for no momentum encoder, not {momentum!r}")
    if queue_size < 0 or (queue_size and momentum is None):
        raise OptionError(f"queue_size must be 0 or more, and 0 without momentum, not {queue_size!r}")
    if not _TEMPERATURES[0] <= temperature <= _TEMPERATURES[1]:
        raise OptionError(f"temperature must be {_TEMPERATURES[0]} to {_TEMPERATURES[1]}, not {temperature!r}")
    if enc_token_id is not None and not 0 <= enc_token_id < words:
        raise OptionError(f"enc_token_id must be 0 to {words - 1}, the model's last word, not {enc_token_id!r}")
