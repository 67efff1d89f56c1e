"""Update rules, and when they act."""
