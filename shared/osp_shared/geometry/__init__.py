"""Latent sizes, token counts, rotary angles, permutations, chunks and tiles: integers and float64 tables."""
