"""ResNets: building them, loading and saving their weights, and changing them for speed."""
