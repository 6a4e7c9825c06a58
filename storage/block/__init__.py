"""The block driver: devices that every node sees; made, grown and fenced by a site's hooks."""

from storage.block.driver import BlockPool, make_block_pool

__all__ = ["BlockPool", "make_block_pool"]
