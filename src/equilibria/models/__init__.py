"""Published DEQ models and the explicit models they are compared with, one file each."""
