"""What changes the bytes of a record, as digests."""
