"""From sources of any size to moments: resumable, in bounded memory, on one machine or on a Ray cluster."""
