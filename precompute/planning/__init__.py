"""What is to be encoded: which record goes into which shard, and what is missing."""
