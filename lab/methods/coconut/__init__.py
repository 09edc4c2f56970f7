"""COCONUT: chain of continuous thought (arXiv 2412.06769), a curriculum that replaces written steps by thoughts stage by stage."""
