"""Who serves a request: routing policies, one file each, see `api`. The router asks one of them for every request."""

from penstock.policy.routing.pairs import is_worth_asking

__all__ = ["is_worth_asking"]
