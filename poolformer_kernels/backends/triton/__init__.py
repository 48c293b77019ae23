DEVICES = ("cuda",)
UNAVAILABLE = "not built yet"
