"""What an owner checks before it lets a peer at its memory. Shared by the backends of this port."""

from __future__ import annotations

from penstock.errors import Refused, StaleEpoch
from penstock.transport.api import Offer


def check(asked: Offer, mine: Offer) -> None:
    """Raises StaleEpoch for an offer of another incarnation, Refused for one of another shape."""
    if (asked.owner, asked.epoch) != (mine.owner, mine.epoch):
        raise StaleEpoch(
            f"the offer is of {asked.owner} in epoch {asked.epoch}, here is {mine.owner} in epoch {mine.epoch}: "
            "ask it for its offer again"
        )
    if (asked.layout, asked.blocks) != (mine.layout, mine.blocks):
        raise Refused(
            f"the offer is of {asked.blocks} blocks of {asked.layout}, {mine.owner} has {mine.blocks} of {mine.layout}"
        )
