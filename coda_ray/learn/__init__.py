"""Views, networks and objectives in plain PyTorch; nothing here knows Ray, MLflow or object storage."""
