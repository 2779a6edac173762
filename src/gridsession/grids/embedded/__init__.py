"""`embedded:`: one LMDB file, shared by the worker processes of one machine."""

from gridsession.grids.embedded.grid import EmbeddedGrid

__all__ = ["EmbeddedGrid"]
