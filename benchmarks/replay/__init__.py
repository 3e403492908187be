"""Fleet replay: request traces over simulated replicas, with the production ledger, estimator and prices inside."""
