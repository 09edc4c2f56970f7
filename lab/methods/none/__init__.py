"""No thinking beside the words: the plain backbone, the base every method is compared with."""
