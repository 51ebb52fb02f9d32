"""What each token earned and why, in one parquet file for each logged step, and the report of it."""
