"""Making tar shards of images."""

SHARD_MEGABYTES = (
    256  # default size of a shard; here, because help texts show it before anything heavy is imported
)
