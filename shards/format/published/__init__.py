"""What a cache tells readers other than ours."""
