"""One file a format. Each reader parses headers into `Extent`s; none of them reads a tensor."""
