"""Fewer tokens: patches that look alike merged inside the image tower, and the search for how many may go."""

from invariclip.export.graphs.tokens.names import MERGE_NODES, name_merges
from invariclip.export.graphs.tokens.schedule import Schedule, TowerShape
from invariclip.export.graphs.tokens.thin import image_shape, refusal, thin_tokens

__all__ = ["MERGE_NODES", "Schedule", "TowerShape", "image_shape", "name_merges", "refusal", "thin_tokens"]
