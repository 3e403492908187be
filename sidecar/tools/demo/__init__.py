"""`sidecar demo`: an engine, a sidecar, traffic and a small kubelet on one machine. Nothing else imports it."""
