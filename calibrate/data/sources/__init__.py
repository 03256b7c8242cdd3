"""Where pairs come from: embeddings, images under interventions or in several environments, pairs, shards, texts."""
