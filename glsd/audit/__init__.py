"""Finding what is wrong with shards."""

NEAR_BITS = 6  # default: two hashes of one picture differ in at most this many of 64 bits
