"""Which job goes next, where, and on which replica."""
