"""With how many blocks a ControlNet computes the same in diffusers and in ComfyUI.

A base of L blocks adds the residuals of N ControlNet blocks to its own: in diffusers block b gets
residual int(b / (L / N)); in ComfyUI each residual goes to L // N blocks in a row, and blocks that
are left over get none. The two agree where N divides L.
"""


def counts_everywhere(num_base_blocks: int) -> list[int]:
    """Return the numbers of ControlNet blocks that compute the same in diffusers and ComfyUI.

    At most half the base's blocks: with more, the last residual has no effect, since the base adds
    none to its last block.
    """
    candidates = range(1, num_base_blocks // 2 + 1)
    return [count for count in candidates if num_base_blocks % count == 0]


def in_words(num_base_blocks: int) -> str:
    """Return `counts_everywhere` as text: `1, 2 or 19`."""
    *others, last = map(str, counts_everywhere(num_base_blocks))
    return f"{', '.join(others)} or {last}" if others else last


def describe_count(num_blocks: int, num_base_blocks: int) -> str | None:
    """Return a sentence on what differs in ComfyUI with so many blocks; None if nothing does."""
    if num_blocks in counts_everywhere(num_base_blocks):
        return None
    return (
        f"{num_blocks} ControlNet blocks do not divide the base's {num_base_blocks}, so ComfyUI "
        "spreads their residuals over it otherwise than diffusers; "
        f"{in_words(num_base_blocks)} blocks are the same in both"
    )
