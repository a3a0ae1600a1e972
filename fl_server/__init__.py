"""The coordinator: sees orders, updates and score histograms, never patients."""
