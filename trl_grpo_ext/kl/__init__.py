"""The KL of the policy against the reference: estimates, the exact sum, and the reference itself."""
