"""The commands of `nla`: their flags, and what they call."""
