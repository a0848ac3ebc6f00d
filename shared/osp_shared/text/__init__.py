"""Text before the encoder: prompt files, templates, caption cleaning, tokens."""
