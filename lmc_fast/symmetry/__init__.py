"""Function-preserving changes of weights: canonical form, the group, its elements."""

from .canonical import canonicalize
from .groups import Group, legal_groups
from .legality import check_legal
from .transform import Transform

__all__ = ["Group", "Transform", "canonicalize", "check_legal", "legal_groups"]
