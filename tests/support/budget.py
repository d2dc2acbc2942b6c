"""How many cases the property tests search: few by default, many in a campaign (benchmarks/campaign.py)."""

import os

QUICK = 0.25


def budget(cases):
    """Return how many cases to search, where `cases` is what a thorough run takes.

    The environment variable SOUNDNET_SEARCH multiplies it: 1 is thorough, 10 a long campaign; by
    default a quarter.
    """
    return max(5, round(cases * float(os.environ.get("SOUNDNET_SEARCH", QUICK))))
