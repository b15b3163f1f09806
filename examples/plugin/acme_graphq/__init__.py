"""A plug-in for graphq: the op acme::swiglu, a fused gated projection, and a target that runs it."""
