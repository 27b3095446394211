"""Does work items somewhere: what a runner is (`protocol`), who gets which item next, who is to blame for a death."""
