"""CDC: learned prompts beside the hand-written one, and how certain each is (docs/cdc.md)."""
