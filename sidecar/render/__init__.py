"""Prompts as an engine would make them: token ids, placeholders and image hashes, from headers only."""
