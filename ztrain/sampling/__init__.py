"""Pictures for people: `ztrain sample`, `load_adapter`, sizes by aspect, contact sheets."""
