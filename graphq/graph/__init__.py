"""torch.fx made pleasant: capture, views, patterns, passes, and the graphq:: operators."""
