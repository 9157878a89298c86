"""Any model of transformers that embeds words or patches."""
