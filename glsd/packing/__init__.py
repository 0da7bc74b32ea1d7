"""Making tar shards of images."""

SHARD_MEGABYTES = (
    256  # default size of a shard; here, because help texts show it before anything heavy is imported
)
NO_LABEL = "no label"  # why a row without label is left out; the text that it has instead follows in brackets
