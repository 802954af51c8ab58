"""The ``tokenize`` stage: tokenizer and token shards. ``TokenShards.open(folder)`` reads them."""

from components.tokenization.shards import Shard, ShardError, TokenShards

__all__ = ["Shard", "ShardError", "TokenShards"]
