"""Redis: the grid of a farm of machines."""

from gridsession.grids.redis.grid import RedisGrid

__all__ = ["RedisGrid"]
