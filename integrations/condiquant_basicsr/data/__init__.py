"""Images, data sets and metrics."""
