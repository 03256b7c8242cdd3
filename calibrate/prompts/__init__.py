"""CDC: several learned templates beside the hand-written one, and how sure each is (docs/cdc.md)."""
