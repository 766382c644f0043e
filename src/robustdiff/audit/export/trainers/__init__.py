"""One trainer a file, found by being there; each is a subclass of ``TrainerFiles``."""
