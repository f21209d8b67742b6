"Linear attention as recurrences, in chunks, and as kernels: each op picks a form that suits."
from .dispatch import gdn, gla, lightning

__all__ = ["lightning", "gla", "gdn"]
