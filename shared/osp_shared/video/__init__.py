"""Video in and out: decoding, resizing, writing, grids, and the two pixel metrics. numpy at every border."""
