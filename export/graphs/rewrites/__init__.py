"""Exact savings, as data: each has a name, says where it applies, what it does, and what must hold afterwards."""

from invariclip.export.graphs.rewrites.plan import NAMES, REWRITES, chosen, require_held, rewrite_encoder, rewrite_graph
from invariclip.export.graphs.rewrites.rewrite import Rewrite, RewriteNotApplicableError, Subject, Tower

__all__ = [
    "NAMES",
    "REWRITES",
    "Rewrite",
    "RewriteNotApplicableError",
    "Subject",
    "Tower",
    "chosen",
    "require_held",
    "rewrite_encoder",
    "rewrite_graph",
]
