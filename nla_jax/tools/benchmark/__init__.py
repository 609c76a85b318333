"""`nla benchmark`: how fast the package's programs run at any shape, with random weights and no data."""
