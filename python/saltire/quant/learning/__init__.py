"""What is learned after the closed forms: transforms, group by group, then the whole model."""
