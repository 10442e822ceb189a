"""Annotators: conditioning images drawn from pictures, the same in training and at inference."""
