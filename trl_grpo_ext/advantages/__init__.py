"""Token rewards of several sources to group-relative advantages."""
