"""Programs that turn image folders into triplets."""
