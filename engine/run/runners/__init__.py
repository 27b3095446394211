"""Where work items are done: what a runner is (`protocol`), who gets which item next, who is to blame for a death."""
