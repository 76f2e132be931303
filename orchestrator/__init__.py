"""Jobs: manifests, plans, the ledger in Redis, the control loop, the command line. Never imports torch."""
