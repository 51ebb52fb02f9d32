"""Text of the policy to steps, and steps to the policy's tokens."""
