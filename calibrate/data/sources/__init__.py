"""Where pairs come from: embeddings, pictures under interventions or in several environments, pairs, shards, texts."""
