"""What an audit found, in the files of other people's trainers: one file a trainer in ``trainers/``."""
