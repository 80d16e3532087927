"""Small trained models, written by `examples/train_*.py`; found through `triskele.digits.asset_path`."""
