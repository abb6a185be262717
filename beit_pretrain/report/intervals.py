"""How far an accuracy can be trusted, from the number of images that it was measured on."""

from __future__ import annotations

import math

Z = 1.959963984540054  # the normal distribution has 95% of its mass within this many standard deviations


def wilson(share: float, images: float) -> tuple[float, float]:
    """95% score interval of a share of `images` (at least 1) independent images (Wilson, 1927).

    Unlike the textbook's plus-minus it stays within 0 and 1, and is no point where all images are right.
    """
    spread = Z**2 / images
    middle = (share + spread / 2) / (1 + spread)
    reach = Z / (1 + spread) * math.sqrt(share * (1 - share) / images + spread / (4 * images))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def difference(one: float, other: float, images: tuple[float, float]) -> tuple[float, float]:
    """95% interval of `one` - `other`, shares of their numbers of `images` (Newcombe, 1998, method 10).

    Takes the two samples as independent; on the same images it errs on the wide side.
    """
    (low, high), (other_low, other_high) = wilson(one, images[0]), wilson(other, images[1])
    gap = one - other
    return gap - math.hypot(one - low, other_high - other), gap + math.hypot(high - one, other - other_low)
