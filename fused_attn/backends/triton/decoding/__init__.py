"""Few queries against many keys, which lie in one piece or in pages: keys in parts, and the parts put together (split-key decoding)."""
