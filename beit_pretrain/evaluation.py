"""Measures of what a model has learnt: neighbours in feature space, masked prediction, and its baselines.

Legend: B images, N patches, V vocabulary, M hidden patches of an image, T hidden patches of a batch;
S supporting images, Q queried images, D width, K neighbours, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from beit_pretrain.errors import ConfigError

_SIMILARITIES = 2**24  # similarities held at once: 64 MiB of float32


class Encoder(Protocol):
    """What is asked of an encoder here."""

    @property
    def depth(self) -> int: ...

    def features(self, image: Tensor, blocks: Sequence[int]) -> list[Tensor]: ...


class Labelled(Protocol):
    """A batch with images (B, 3, H, W) uint8 and labels (B,)."""

    @property
    def image(self) -> Tensor: ...

    @property
    def label(self) -> Tensor: ...


@torch.no_grad()
def block_features(
    encoder: Encoder,
    normalize: Callable[[Tensor], Tensor],
    loader: Iterable[Labelled],
    device: torch.device,
) -> tuple[list[Tensor], Tensor]:
    """Mean over the patch tokens (CLS left out) after each block, and the labels, of a loader's images.

    One (S, D) float32 tensor per block and labels (S,), on the CPU. The encoder is left in the mode it is in:
    call it in evaluation mode.
    """
    blocks = range(encoder.depth)
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in loader:
        image = normalize(batch.image.to(device, non_blocking=True))  # (B, 3, H, W)
        tokens = encoder.features(image, blocks)  # depth x (B, L, D)
        rows.append(torch.stack([t[:, 1:].float().mean(1) for t in tokens]).cpu())  # (depth, B, D)
        labels.append(batch.label.cpu())
    return list(torch.cat(rows, dim=1)), torch.cat(labels)


@torch.no_grad()
def knn_predict(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    classes: int,
) -> Tensor:
    """The class (Q,) that the `k` nearest supporting images vote for, by cosine similarity.

    support (S, D), support_labels (S,), query (Q, D). A neighbour of similarity s weighs exp(s / temperature)
    (Wu et al., 2018, arXiv 1805.01978, Sec. 3.4); of equal classes the lowest wins.
    Raises ConfigError when there are fewer than `k` supporting images.
    """
    if not 1 <= k <= len(support):
        raise ConfigError(
            f"k is {k} nearest neighbours, but the labelled subset holds {len(support)} images: "
            f"set k between 1 and {len(support)}, or label more images"
        )
    votes: list[Tensor] = []
    with torch.autocast(
        support.device.type, enabled=False
    ):  # a half-precision product would reorder neighbours
        support = F.normalize(support.float(), dim=1)  # (S, D)
        for part in query.split(max(1, _SIMILARITIES // len(support))):
            similarity = F.normalize(part.float(), dim=1) @ support.T  # (Q, S)
            nearest, index = similarity.topk(k, dim=1)  # (Q, K)
            labels = support_labels.to(index.device)[index]  # (Q, K)
            # On the CPU, in float64 (not every accelerator has it): the sums then hang on no order of adding.
            weight = ((nearest - nearest[:, :1]).cpu().double() / temperature).exp()
            score = weight.new_zeros(len(part), classes).scatter_add_(
                1, labels.cpu().long(), weight
            )  # (Q, C)
            votes.append(score.argmax(dim=1))
    return torch.cat(votes).to(query.device)


def knn_accuracy(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    classes: int,
) -> float:
    """The share of queries whose class `knn_predict` finds."""
    found = knn_predict(support, support_labels, query, k=k, temperature=temperature, classes=classes)
    return (found == query_labels.to(found.device)).double().mean().item()


def entropy(counts: Tensor) -> Tensor:
    """The entropy in nats of the distributions counted along the last dimension, (..., V) -> (...).

    NaN where nothing was counted. The estimate is the plug-in one, which is below the true entropy as long as
    few ids have been seen for each entry of the vocabulary.
    """
    share = counts.double() / counts.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1)


def perplexity(ids: Tensor, vocabulary: int) -> Tensor:
    """How many ids are in use, as exp(entropy) of the given ids: between 1 and `vocabulary`."""
    return entropy(torch.bincount(ids.flatten(), minlength=vocabulary)).exp()


class UnigramCounts(nn.Module):
    """How often each id was seen at each patch: what a model that sees no picture could know of the ids.

    A step first notes the ids of its micro-batches and then either commits them or, when it is refused, drops
    them without a trace. Committed ids stay on their rank until `merge_ranks`, which all ranks must call
    before `baselines` and before a checkpoint is written.
    """

    counts: Tensor

    def __init__(self, *, patches: int, vocabulary: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(patches, vocabulary, dtype=torch.int64))  # (N, V)
        # Neither is a buffer: DDP overwrites buffers with those of rank 0 before each forward.
        self._local: Tensor | None = None  # (N, V), committed on this rank since the last merge
        self._pending: list[Tensor] = []

    def note(self, ids: Tensor) -> None:
        """Keeps the ids (B, N) of a micro-batch until the step is decided."""
        patches, vocabulary = self.counts.shape
        if ids.ndim != 2 or ids.shape[1] != patches:
            raise ValueError(
                f"ids must have shape (B, N={patches}) for {vocabulary} ids, got {tuple(ids.shape)}"
            )
        self._pending.append(ids.detach())

    def commit(self) -> None:
        """Counts what was noted; the step was taken."""
        patches, vocabulary = self.counts.shape
        if self._local is None:
            self._local = torch.zeros_like(self.counts)
        first = torch.arange(patches, device=self.counts.device) * vocabulary  # (N,)
        for ids in self._pending:
            entries = (ids.to(first) + first).flatten()  # (B * N,)
            self._local.view(-1).scatter_add_(0, entries, torch.ones_like(entries))
        self._pending.clear()

    def drop(self) -> None:
        """Forgets what was noted; the step was refused."""
        self._pending.clear()

    def merge_ranks(self) -> None:
        """Adds what every rank has committed since the last merge to `counts`, equal on all ranks."""
        local = torch.zeros_like(self.counts) if self._local is None else self._local
        self.counts += sum_over_ranks(local)
        self._local = None

    def baselines(self) -> dict[str, float]:
        """Loss (nats) and accuracy of always giving the counted shares, per patch and over the whole grid.

        The loss is the mean entropy, the accuracy the mean share of the most frequent id. Both come from the
        very ids that they describe and so err on the side of the baseline.
        """
        together = self.counts.sum(0)  # (V,)
        return {
            "loss_position": entropy(self.counts).mean().item(),
            "accuracy_position": _top_share(self.counts).mean().item(),
            "loss_global": entropy(together).item(),
            "accuracy_global": _top_share(together).item(),
        }


class MaskedScore:
    """Loss and accuracy on hidden patches over a whole validation epoch, with standard errors over images.

    The mean is over hidden patches of all ranks, however they fall into batches. Patches of one image are not
    independent, so the standard errors take the image as the unit: with x_i the sum and n_i the number of
    hidden patches of image i, R = sum x / sum n and
    se^2 = I / (I - 1) * sum (x_i - R n_i)^2 / (sum n)^2   (ratio estimator; Cochran, 1977, ch. 6).
    """

    def __init__(self) -> None:
        self._images: list[Tensor] = []  # each (3, B): loss, correct, hidden patches

    @torch.no_grad()
    def update(self, logits: Tensor, targets: Tensor, mask: Tensor) -> None:
        """Adds a batch: logits (T, V) and targets (T,) at the patches that mask (B, N) hides, in order."""
        hidden = mask.flatten(1).sum(1)  # (B,)
        loss = F.cross_entropy(logits.float(), targets, reduction="none")  # (T,)
        correct = (logits.argmax(-1) == targets).to(loss)  # (T,)
        image = torch.arange(len(mask), device=mask.device)
        image = image.repeat_interleave(hidden, output_size=len(targets))  # (T,)
        sums = loss.new_zeros(3, len(mask))
        sums[0].index_add_(0, image, loss)
        sums[1].index_add_(0, image, correct)
        sums[2] = hidden
        self._images.append(sums)

    def reset(self) -> None:
        """Forgets all batches."""
        self._images.clear()

    def result(self) -> dict[str, float]:
        """loss (nats), accuracy, loss_se, accuracy_se, images, tokens over all ranks, which must all ask.

        Without a hidden patch everything but the numbers is NaN, with a single image the standard errors are.
        """
        images = torch.cat(
            [torch.zeros(3, 0), *(sums.cpu() for sums in self._images)], dim=1
        ).double()  # (3, I)
        totals = torch.cat([torch.tensor([images.shape[1]]), images.sum(1), (images @ images.T).flatten()])
        total, *moments = sum_over_ranks(totals).tolist()
        (loss, correct, tokens), products = moments[:3], moments[3:]
        loss_se = _ratio_error(total, loss, tokens, products[0], products[2], products[8])
        accuracy_se = _ratio_error(total, correct, tokens, products[4], products[5], products[8])
        return {
            "loss": loss / tokens if tokens else math.nan,
            "accuracy": correct / tokens if tokens else math.nan,
            "loss_se": loss_se,
            "accuracy_se": accuracy_se,
            "images": int(total),
            "tokens": int(tokens),
        }


class ClassScore:
    """Loss, top-1, top-5, and what was taken for what, over all held-out images of all ranks.

    `confusion` is the table of (true, predicted) pairs for up to `confusion_classes` classes; above that nobody could
    read it. The most frequent mistakes are known for up to `pair_classes`; above that the pairs are too many to count.
    """

    def __init__(self, classes: int, confusion_classes: int = 100, pair_classes: int = 1000) -> None:
        self.classes = classes
        self.full = classes <= confusion_classes
        self.counts_pairs = self.full or classes <= pair_classes
        self.reset()

    def reset(self) -> None:
        """Forgets all batches."""
        self._sums = torch.zeros(4, dtype=torch.float64)  # loss, top-1, top-5, images
        self._support = torch.zeros(self.classes, dtype=torch.int64)  # (C,)
        self._correct = torch.zeros(self.classes, dtype=torch.int64)  # (C,)
        self._pairs = torch.zeros(self.classes**2 if self.counts_pairs else 0, dtype=torch.int64)  # (C * C,)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch: logits (B, C), labels (B,)."""
        logits, labels = logits.float(), labels.long()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        best = logits.topk(min(5, self.classes), dim=1).indices  # (B, 5)
        hits = best == labels[:, None]
        # One transfer for all of them; float64 only on the CPU, not every accelerator has it.
        loss, top1, top5 = torch.stack([loss, hits[:, 0].sum().float(), hits.sum().float()]).tolist()
        self._sums += torch.tensor([loss, top1, top5, len(labels)], dtype=torch.float64)
        labels, predicted = labels.cpu(), best[:, 0].cpu()
        self._support += labels.bincount(minlength=self.classes)
        self._correct += labels[labels == predicted].bincount(minlength=self.classes)
        if self.counts_pairs:
            self._pairs += (labels * self.classes + predicted).bincount(minlength=self.classes**2)

    def result(self) -> dict[str, Any]:
        """`loss` (nats), `top1`, `top5`, `images`, and the tables `support`, `correct` and `confusion`.

        Over all ranks, which must all ask. Tables are lists, rows of `confusion` are true classes; it is None for
        too many of them. NaN without an image; top-5 of fewer classes is over all of them.
        """
        loss, top1, top5, images = sum_over_ranks(self._sums).tolist()
        per = images or math.nan
        pairs = sum_over_ranks(self._pairs).view(self.classes, -1).tolist() if self.full else None
        return {
            "loss": loss / per,
            "top1": top1 / per,
            "top5": top5 / per,
            "images": int(images),
            "support": sum_over_ranks(self._support).tolist(),
            "correct": sum_over_ranks(self._correct).tolist(),
            "confusion": pairs,
        }

    def mistakes(self, most: int = 20) -> list[list[int]]:
        """The most frequent mistakes, each [true class, predicted class, images]; all ranks must ask."""
        if not self.counts_pairs:
            return []
        wrong = sum_over_ranks(self._pairs).clone().view(self.classes, -1).fill_diagonal_(0).flatten()
        places = wrong.argsort(descending=True, stable=True)[:most].tolist()
        return [[*divmod(place, self.classes), int(wrong[place])] for place in places if wrong[place]]


def _ratio_error(images: float, x: float, n: float, xx: float, xn: float, nn: float) -> float:
    """Standard error of x / n from the sums over images of x_i, n_i, x_i^2, x_i n_i and n_i^2."""
    if images < 2 or not n:
        return math.nan
    ratio = x / n
    residuals = max(0.0, xx - 2 * ratio * xn + ratio**2 * nn)  # rounding may leave it just below zero
    return math.sqrt(images / (images - 1) * residuals) / n


def _top_share(counts: Tensor) -> Tensor:
    """The share of the most frequent entry, (..., V) -> (...)."""
    return counts.amax(-1).double() / counts.sum(-1)


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks, or `value` itself in a single process."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    # NCCL carries tensors of the GPU only, and not every rank need have one at hand.
    total = value.cuda() if dist.get_backend() == "nccl" else value.clone()
    dist.all_reduce(total)
    return total.to(value.device)
