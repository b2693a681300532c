"""Warnings by name, for the ways in which training a codec goes wrong without an error."""

import logging
from collections.abc import Iterator


logger = logging.getLogger(__name__)

# Below this part of its codes in use a codebook has collapsed.
LEAST_USE = 0.1
# A discriminator that is right about this part of signals no longer teaches.
MOST_ACCURACY = 0.97
# Nor does one that is right about less than this: its gradient is as random as it is.
LEAST_ACCURACY = 0.51
# Decoded audio below this part of the original's level is silence.
LEAST_LEVEL = 0.01
# How far a loss's share of the gradient may be from its weight's.
SHARE_FACTOR = 4.0


def find_warnings(
    means: dict[str, float], use: list[float], shares: dict[str, float], weights: dict[str, float]
) -> Iterator[tuple[str, str]]:
    """(name, detail) of everything that looks wrong in the means of one log interval.

    Args:
        means: losses and measures by name, as the update returns them.
        use: part of the codes in use, for each codebook that the run trains; 0 where it had no turn yet.
        shares: part of the gradient that each loss has now; none if nothing balances them.
        weights: of the losses in the balancer.
    """
    collapsed = {stage: part for stage, part in enumerate(use) if 0 < part < LEAST_USE}
    if collapsed:
        worst = min(collapsed.values())
        yield "codebook_collapse", f"codebooks {list(collapsed)} use few of their codes, the worst {worst:.1%}"
    accuracy = means.get("discriminator_accuracy")
    if accuracy is not None and accuracy > MOST_ACCURACY:
        yield "discriminator_wins", f"it is right about {accuracy:.1%} of signals"
    if accuracy is not None and accuracy < LEAST_ACCURACY:
        yield "discriminator_blind", f"it is right about {accuracy:.1%} of signals"
    if means["level"] < LEAST_LEVEL:
        yield "silent_output", f"decoded audio has {means['level']:.2%} of the original's level"
    total = sum(weights[name] for name in shares)
    off = []
    for name, share in shares.items():
        wanted = weights[name] / total
        if not wanted / SHARE_FACTOR <= share <= wanted * SHARE_FACTOR:
            off.append(f"{name} has {share:.1%} of the gradient, its weight is {wanted:.1%}")
    if off:
        yield "shares_off", "; ".join(off)


class Guard:
    """Says each warning once, and again only after it had gone."""

    def __init__(self):
        self.standing: set[str] = set()

    def report(self, warnings: list[tuple[str, str]], update: int) -> None:
        """Log the warnings of this interval that did not stand before."""
        for name, detail in warnings:
            if name not in self.standing:
                logger.warning("update %d: %s: %s", update, name, detail)
        self.standing = {name for name, _ in warnings}
