"""Attribution of whole corpora: read, batch by length, write Parquet shards, resume; local and Ray engines."""
