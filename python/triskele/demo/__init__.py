"""`triskele demo`: the trained models (or a user's own folder), plain and with each arm, from kernel to picture."""
